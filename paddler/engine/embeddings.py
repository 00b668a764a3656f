"""Embeddings without a model: which documents share a batch, and what becomes of their vectors. Pure.

A pooled document must lie whole in one batch, or its vector is wrong without an error (engine notes §7).
"""

from typing import cast

import numpy as np
import numpy.typing as npt

from paddler.engine.sequences import Ids
from paddler.messages.inference import NormalizationMethod, RmsNorm

Vector = npt.NDArray[np.float32]


class Batch:
    """Documents that are computed together: each in a slot of its own, all of them in one decode."""

    def __init__(self, *, slots: int, n_batch: int) -> None:
        """Make an empty batch of at most one document per slot and `n_batch` tokens in all."""
        self.documents: list[Ids] = []
        self._slots = slots
        self._room = n_batch

    @property
    def is_full(self) -> bool:
        """Say whether not even the shortest document fits."""
        return len(self.documents) >= self._slots or self._room < 1

    def add(self, document: Ids) -> bool:
        """Take a document of one token or more; false when it does not fit."""
        assert len(document), "an empty document corrupts llama.cpp's memory"
        if self.is_full or len(document) > self._room:
            return False
        self.documents.append(document)
        self._room -= len(document)
        return True


def normalize(vector: Vector, method: NormalizationMethod) -> Vector:
    """Return the vector as asked for: raw, of length 1, or over the root of its mean square.

    A vector of zeros stays one. Computed in 64 bits, where the squares of 32-bit numbers are finite.
    """
    if method == "None":
        return vector
    wide = vector.astype(np.float64)
    if isinstance(method, RmsNorm):
        divisor = np.sqrt(np.maximum(np.mean(wide * wide) + method.epsilon, 0.0))
    else:
        divisor = np.sqrt(np.sum(wide * wide))
    if divisor == 0:
        return vector
    with np.errstate(over="ignore"):  # a negative epsilon may leave next to nothing to divide by
        return cast("Vector", (wide / divisor).astype(np.float32))


def to_json(vector: Vector) -> str | None:
    """Return the vector as a JSON array that gives back every 32-bit number; None if one is not finite."""
    if not np.isfinite(vector).all():
        return None
    return "[" + ",".join(["%.9g"] * len(vector)) % tuple(vector.tolist()) + "]"
