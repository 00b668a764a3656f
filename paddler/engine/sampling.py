"""Choose the next token from a row of logits, in numpy: faster than llama.cpp's chain (engine notes §1.1).

Order: biases, penalties, then the largest logit, or top-k, top-p, min-p, temperature and a draw; then the
grammar tests the choice, and only where it refuses it the choice is made anew among what it allows. Any
settings that the wire lets through choose something.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from paddler.engine.pipe import Finish, Logprobs, SamplerSettings
from paddler.messages.state import InferenceParameters

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]

_HUGE = 1e30
"""Penalised logits are held within this, so that no two of them differ by infinity."""

_COLUMNS = 64
_FIRST_GUESS = 256

_LIKELY = (256, 8192)
"""So many tokens a grammar is asked about before the whole vocabulary (engine notes §5): of 152k that takes
0.1 to 0.3 s, in which all others wait."""

_MOST_MISFITS = 8
"""Choices in a row that would end the free part of an answer in a way its grammar cannot go on from."""

_LOWEST_LOGPROB = -9999.0
"""Said in the place of infinity, which JSON does not have."""


class GenerationRefused(Exception):
    """No token can be chosen for this request: it ends here, with this finish."""

    def __init__(self, finish: Finish, failure: str) -> None:
        super().__init__(failure)
        self.finish = finish
        self.failure = failure


class TokenGrammar(Protocol):
    """What a sampler needs of grammars.Grammar; all of it may raise GenerationRefused."""

    @property
    def bound(self) -> bool: ...
    def hide(self, row: Logits) -> None: ...
    def allows(self, token: int) -> bool: ...
    def allowed(self, ids: Ids) -> Ids: ...
    def accept(self, token: int) -> None: ...
    def watch(self, token: int) -> bool: ...


def settings_of(parameters: InferenceParameters) -> SamplerSettings:
    """Return the settings of requests that bring none."""
    return SamplerSettings(
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        min_p=parameters.min_p,
        penalty_repeat=parameters.penalty_repeat,
        penalty_frequency=parameters.penalty_frequency,
        penalty_presence=parameters.penalty_presence,
        penalty_last_n=parameters.penalty_last_n,
    )


class Sampler:
    """The choices of one request; `row` in pick() is written to."""

    logprobs: Logprobs | None = None
    """Of the token picked last, where the request asks for them; of the model's logits, before biases."""

    def __init__(
        self,
        settings: SamplerSettings,
        prompt: npt.NDArray[np.int32],
        *,
        n_vocab: int,
        end_tokens: frozenset[int] = frozenset(),
        text_of: Callable[[int], str] = str,
        grammar: TokenGrammar | None = None,
    ) -> None:
        """Begin behind a prompt. Raises GenerationRefused.

        `text_of` spells a token out for logprobs. A grammar says when an answer ends: `ignore_eos` gives
        way to it.
        """
        self._greedy = settings.temperature <= 0 or settings.top_k == 1
        self._temperature = settings.temperature
        self._top_k = settings.top_k
        self._top_p = settings.top_p
        self._min_p = min(settings.min_p, 1.0)
        self._penalties = _Penalties(settings, prompt) if _penalises(settings) else None
        self._random = np.random.default_rng(settings.seed)
        self._end_tokens = end_tokens
        self._bias = _Bias(settings.logit_bias, n_vocab) if settings.logit_bias else None
        banned = sorted(end_tokens) if settings.ignore_eos and grammar is None else []
        self._banned = np.array(banned, np.intp)
        self._top_logprobs = settings.top_logprobs
        self._text_of = text_of
        self._grammar = grammar
        self._plain = (
            self._penalties is None
            and self._bias is None
            and not len(self._banned)
            and self._top_logprobs is None
            and grammar is None
        )

    def pick(self, row: Logits) -> int:
        """Return the next token and remember it. Raises GenerationRefused."""
        if self._plain:
            return self._choose(row)
        raw = row.copy() if self._top_logprobs is not None else None
        if self._bias is not None:
            self._bias.apply(row)
        if self._penalties is not None:
            self._penalties.apply(row)
        row[self._banned] = -np.inf
        token = self._choose(row) if self._grammar is None else self._choose_within(row, self._grammar)
        if self._penalties is not None:
            self._penalties.remember(token)
        if raw is not None:
            self.logprobs = (self._logprobs_of(raw, token),)
        return token

    def _choose(self, row: Logits) -> int:
        return int(row.argmax()) if self._greedy else self._draw(row)

    def _choose_within(self, row: Logits, grammar: TokenGrammar) -> int:
        """Choose what the grammar allows, and tell it."""
        if not grammar.bound:
            return self._choose_freely(row, grammar)
        grammar.hide(row)
        token = self._choose(row)
        if not (np.isfinite(row[token]) and grammar.allows(token)):
            token = self._choose_allowed(row, grammar)
        if token not in self._end_tokens:
            grammar.accept(token)
        return token

    def _choose_allowed(self, row: Logits, grammar: TokenGrammar) -> int:
        for count in (*_LIKELY, len(row)):
            ids = _largest(row, count) if count < len(row) else np.arange(len(row))
            allowed = grammar.allowed(ids[np.isfinite(row[ids])])
            if len(allowed):
                return int(allowed[self._choose(row[allowed])])
        raise GenerationRefused(Finish.GRAMMAR_REJECTED, "grammar allows no token that the model can choose")

    def _choose_freely(self, row: Logits, grammar: TokenGrammar) -> int:
        """Choose before the grammar begins, but nothing that it could not go on from."""
        for _ in range(_MOST_MISFITS):
            token = self._choose(row)
            if grammar.watch(token):
                return token
            row[token] = -np.inf
        raise GenerationRefused(Finish.GRAMMAR_REJECTED, "grammar cannot begin as the model wants to go on")

    def _logprobs_of(self, row: Logits, token: int) -> tuple[str, float, tuple[tuple[str, float], ...]]:
        highest = float(row.max())
        log_total = highest + math.log(float(np.exp(row - np.float32(highest)).sum(dtype=np.float64)))

        def of(other: int) -> tuple[str, float]:
            logprob = float(row[other]) - log_total
            return self._text_of(other), max(_LOWEST_LOGPROB, logprob)  # NaN, too

        top = _largest(row, min(self._top_logprobs, len(row))) if self._top_logprobs else ()
        return (*of(token), tuple(of(int(other)) for other in top))

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


class _Bias:
    """What a request adds to single logits."""

    def __init__(self, biases: dict[int, float], n_vocab: int) -> None:
        for token in biases:
            if not 0 <= token < n_vocab:
                raise GenerationRefused(
                    Finish.FAILED, f"logit_bias names token {token}, the model has {n_vocab}"
                )
        self._ids = np.array(list(biases), np.intp)
        self._biases = np.array(list(biases.values()), np.float32)

    def apply(self, row: Logits) -> None:
        row[self._ids] += self._biases


def _penalises(settings: SamplerSettings) -> bool:
    return settings.penalty_last_n != 0 and (
        _repeat(settings) != 1 or settings.penalty_frequency != 0 or settings.penalty_presence != 0
    )


def _repeat(settings: SamplerSettings) -> float:
    return settings.penalty_repeat if settings.penalty_repeat > 0 else 1.0  # not a factor: no penalty


class _Penalties:
    """Which tokens the last n of prompt and answer hold, counted as they come and go."""

    def __init__(self, settings: SamplerSettings, prompt: npt.NDArray[np.int32]) -> None:
        self._repeat = _repeat(settings)
        self._frequency = settings.penalty_frequency
        self._presence = settings.penalty_presence
        last_n = settings.penalty_last_n
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
