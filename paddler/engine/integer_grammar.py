"""Ranges of integers to GBNF, for the bounds of numbers in JSON Schemas. Pure."""

_MOST_DIGITS = 16


def gbnf_of_range(least: int | None, most: int | None) -> str:
    """Return an expression for the integers from `least` to `most`, where None is sixteen digits.

    Raises ValueError when there are none.
    """
    limit = 10**_MOST_DIGITS - 1
    low = -limit if least is None else max(least, -limit)
    high = limit if most is None else min(most, limit)
    if low > high:
        raise ValueError(f"no integers from {low} to {high}")
    alternatives = []
    if low < 0:
        alternatives += [f'"-" {digits}' for digits in _natural(max(-high, 1), -low)]
    if high >= 0:
        alternatives += _natural(max(low, 0), high)
    return " | ".join(alternatives)


def _natural(low: int, high: int) -> list[str]:
    """Return expressions for the numbers between two that are not negative, by their count of digits."""
    alternatives = []
    whole = []  # counts of digits of which all numbers are in
    for digits in range(len(str(low)), len(str(high)) + 1):
        shortest = 0 if digits == 1 else 10 ** (digits - 1)
        longest = 10**digits - 1
        if digits > 1 and low <= shortest and longest <= high:
            whole.append(digits)
        else:
            alternatives += _same_length(str(max(low, shortest)), str(min(high, longest)))
    if whole:
        alternatives.append(f"[1-9] [0-9]{{{whole[0] - 1},{whole[-1] - 1}}}")
    return alternatives


def _same_length(low: str, high: str) -> list[str]:
    """Return expressions for the numbers between two of as many digits, leading digit by leading digit."""
    if low == "0" * len(low) and high == "9" * len(high):
        return [f"[0-9]{{{len(low)}}}"]
    if len(low) == 1:
        return [f"[{low}-{high}]"]
    first, last = int(low[0]), int(high[0])
    if first == last:
        return [f'"{first}" {rest}' for rest in _same_length(low[1:], high[1:])]
    zeros, nines = "0" * (len(low) - 1), "9" * (len(low) - 1)
    alternatives = []
    if low[1:] != zeros:
        alternatives += [f'"{first}" {rest}' for rest in _same_length(low[1:], nines)]
        first += 1
    whole_last = last if high[1:] == nines else last - 1
    if first <= whole_last:
        alternatives.append(f"[{first}-{whole_last}] [0-9]{{{len(nines)}}}")
    if high[1:] != nines:
        alternatives += [f'"{last}" {rest}' for rest in _same_length(zeros, high[1:])]
    return alternatives
