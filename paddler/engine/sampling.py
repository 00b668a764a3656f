"""Choose the next token from a row of logits, in numpy: faster than llama.cpp's chain (engine notes §1.1).

Order: penalties, then the largest logit, or top-k, top-p, min-p, temperature and a draw. Any
parameters that the wire lets through choose something; none raises.
"""

import math
from collections import deque

import numpy as np
import numpy.typing as npt

from paddler.messages.state import InferenceParameters

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_HUGE = 1e30
"""Penalised logits are held within this, so that no two of them differ by infinity."""

_COLUMNS = 64
_FIRST_GUESS = 256


class Sampler:
    """The choices of one request; `row` in pick() is written to."""

    def __init__(
        self, parameters: InferenceParameters, prompt: npt.NDArray[np.int32], *, seed: int | None = None
    ) -> None:
        self._greedy = parameters.temperature <= 0 or parameters.top_k == 1
        self._temperature = parameters.temperature
        self._top_k = parameters.top_k
        self._top_p = parameters.top_p
        self._min_p = min(parameters.min_p, 1.0)
        self._penalties = _Penalties(parameters, prompt) if _penalises(parameters) else None
        self._random = np.random.default_rng(seed)

    def pick(self, row: Logits) -> int:
        """Return the next token and remember it for the penalties."""
        if self._penalties is not None:
            self._penalties.apply(row)
        token = int(row.argmax()) if self._greedy else self._draw(row)
        if self._penalties is not None:
            self._penalties.remember(token)
        return token

    def _draw(self, row: Logits) -> int:
        ids = self._candidates(row)
        logits = row[ids].astype(np.float64)
        weights = np.exp((logits - logits.max()) / self._temperature)
        heights = weights.cumsum()
        index = int(heights.searchsorted(self._random.random() * heights[-1], side="right"))
        return int(ids[min(index, len(ids) - 1)])  # a model that computes NaN still gets a token

    def _candidates(self, row: Logits) -> Ids:
        """Return the tokens that top-k, top-p and min-p leave, never none."""
        if 0 < self._top_k < len(row):
            ids = _largest(row, self._top_k)
            if self._top_p < 1:
                ids = _nucleus(row, ids, self._top_p)
        elif self._top_p < 1:
            ids = _nucleus_of_all(row, self._top_p)
        else:
            ids = np.arange(len(row))
        if self._min_p > 0:
            logits = row[ids]
            ids = ids[logits >= logits.max() + math.log(self._min_p)] if len(ids) > 1 else ids
        return ids if len(ids) else np.array([row.argmax()])


def _largest(row: Logits, count: int) -> Ids:
    """Return the ids of the `count` largest logits, descending; fewer if the row holds NaN.

    In a long row a lower bound for the count-th largest is found among the maxima of its columns, so
    that only the few logits above it are sorted.
    """
    height = len(row) // _COLUMNS
    if height >= 4 * count:
        maxima = row[: height * _COLUMNS].reshape(_COLUMNS, height).max(axis=0)
        bound = np.partition(maxima, height - count)[height - count]
        ids = np.flatnonzero(row >= bound)
    else:
        ids = np.argpartition(row, len(row) - count)[len(row) - count :]
    descending = np.argsort(-row[ids], kind="stable")
    return ids[descending[:count]]


def _nucleus(row: Logits, ids: Ids, top_p: float) -> Ids:
    """Return the shortest head of the descending `ids` that holds `top_p` of their probability."""
    if not len(ids):
        return ids
    logits = row[ids].astype(np.float64)
    heights = np.exp(logits - logits[0]).cumsum()
    return ids[: int(heights.searchsorted(top_p * heights[-1])) + 1]


def _nucleus_of_all(row: Logits, top_p: float) -> Ids:
    """Do the same for the whole row, sorting only as much of it as the nucleus needs."""
    highest = float(row.max())
    total = float(np.exp(row - np.float32(highest)).sum(dtype=np.float64))
    count = _FIRST_GUESS
    while count < len(row):
        ids = _largest(row, count)
        heights = np.exp(row[ids].astype(np.float64) - highest).cumsum()
        if len(heights) and heights[-1] >= top_p * total:
            return ids[: int(heights.searchsorted(top_p * total)) + 1]
        count *= 8
    return _nucleus(row, np.argsort(-row, kind="stable"), top_p)


def _penalises(parameters: InferenceParameters) -> bool:
    return parameters.penalty_last_n != 0 and (
        _repeat(parameters) != 1 or parameters.penalty_frequency != 0 or parameters.penalty_presence != 0
    )


def _repeat(parameters: InferenceParameters) -> float:
    return parameters.penalty_repeat if parameters.penalty_repeat > 0 else 1.0  # not a factor: no penalty


class _Penalties:
    """Which tokens the last n of prompt and answer hold, counted as they come and go."""

    def __init__(self, parameters: InferenceParameters, prompt: npt.NDArray[np.int32]) -> None:
        self._repeat = _repeat(parameters)
        self._frequency = parameters.penalty_frequency
        self._presence = parameters.penalty_presence
        last_n = parameters.penalty_last_n
        self._window: deque[int] | None = deque() if last_n > 0 else None  # below 0: the whole context
        self._last_n = last_n
        seen = prompt[-last_n:] if last_n > 0 else prompt
        if self._window is not None:
            self._window.extend(seen.tolist())
        ids, counts = np.unique(seen, return_counts=True)
        self._place = {token: place for place, token in enumerate(ids.tolist())}
        self._ids = ids.astype(np.intp)
        self._counts = counts.astype(np.float64)

    def apply(self, row: Logits) -> None:
        """Lower the logits of what was said, in llama.cpp's way."""
        present = self._counts[: len(self._place)] > 0
        ids = self._ids[: len(self._place)][present]
        counts = self._counts[: len(self._place)][present]
        logits = row[ids].astype(np.float64)
        logits = np.where(logits > 0, logits / self._repeat, logits * self._repeat)
        logits -= counts * self._frequency + self._presence
        row[ids] = logits.clip(-_HUGE, _HUGE)

    def remember(self, token: int) -> None:
        place = self._place_of(token)  # which may replace the arrays
        self._counts[place] += 1
        if self._window is not None:
            self._window.append(token)
            if len(self._window) > self._last_n:
                self._counts[self._place[self._window.popleft()]] -= 1

    def _place_of(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):  # amortised growth: one array per doubling
            self._ids = np.resize(self._ids, 2 * place + 16)
            self._counts = np.concatenate([self._counts, np.zeros(place + 16)])
        if self._counts[place] == 0:
            self._ids[place] = token
        return place
