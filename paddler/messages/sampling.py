"""How one request's tokens are chosen: the optional key `sampling`, beyond Paddler 4.1."""

import attrs

from paddler.messages.numbers import Float32, Int32, Unsigned

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIASES = 4096
MAX_LOGIT_BIAS = 100.0
MAX_TOP_LOGPROBS = 20


@attrs.frozen(kw_only=True)
class Sampling:
    """What differs from the cluster's parameters; an absent key leaves those in force."""

    temperature: Float32 | None = None
    top_k: Int32 | None = None
    top_p: Float32 | None = None
    min_p: Float32 | None = None
    penalty_repeat: Float32 | None = None
    penalty_frequency: Float32 | None = None
    penalty_presence: Float32 | None = None
    penalty_last_n: Int32 | None = None
    seed: Unsigned | None = None
    """The same seed, on one slot, gives the same text. None draws one."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these; they are not part of it."""
    logit_bias: dict[str, Float32] | None = None
    """Token id, as JSON writes keys, to what is added to its logit."""
    logprobs: bool = False
    """Each token message is followed by a `TokenLogprobs`."""
    top_logprobs: Int32 = 0
    """How many alternatives each of those lists."""
    ignore_eos: bool = False
    """Never choose an end of generation: for benchmarks."""


def sampling_objection(sampling: Sampling) -> str | None:
    """Return why a well-formed `sampling` cannot be used, naming the key, or None."""
    ranges = {
        "temperature": (0.0, 100.0),
        "top_k": (0, 2**31 - 1),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "penalty_repeat": (0.01, 100.0),
        "penalty_frequency": (-100.0, 100.0),
        "penalty_presence": (-100.0, 100.0),
        "penalty_last_n": (-1, 2**31 - 1),
        "top_logprobs": (0, MAX_TOP_LOGPROBS),
    }
    for name, (lowest, highest) in ranges.items():
        value = getattr(sampling, name)
        if value is not None and not lowest <= value <= highest:
            return f"`sampling.{name}` must be between {_number(lowest)} and {_number(highest)}"
    if sampling.top_logprobs and not sampling.logprobs:
        return "`sampling.top_logprobs` needs `sampling.logprobs`"
    if len(sampling.stop) > MAX_STOP_STRINGS:
        return f"`sampling.stop` has more than {MAX_STOP_STRINGS} strings"
    if not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in sampling.stop):
        return f"a string of `sampling.stop` is empty or longer than {MAX_STOP_CHARACTERS} characters"
    return _bias_objection(sampling.logit_bias or {})


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _bias_objection(logit_bias: dict[str, float]) -> str | None:
    if len(logit_bias) > MAX_LOGIT_BIASES:
        return f"`sampling.logit_bias` has more than {MAX_LOGIT_BIASES} tokens"
    for token, bias in logit_bias.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 9):
            return "a key of `sampling.logit_bias` is no token id"
        if abs(bias) > MAX_LOGIT_BIAS:
            return f"a value of `sampling.logit_bias` is beyond {MAX_LOGIT_BIAS:g}"
    return None
