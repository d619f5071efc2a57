"""Which tokens of an earlier model a model has: what its card says of them, and how two models are compared over them.

Axes: V tokens of the model
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

KEY = "vocabulary"  # of the card


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that were left.

    Attributes:
        source_size: how many the model had at first.
        ids_V: the id that each token had then.
    """

    source_size: int
    ids_V: Ids

    def to_card(self) -> dict[str, Any]:
        """For JSON: the ids as differences in 32 bits, little endian, packed by zlib, in base64."""
        steps = np.diff(self.ids_V, prepend=0).astype("<i4").tobytes()
        return {
            "size_before": self.source_size,
            "size": len(self.ids_V),
            "ids_before": base64.b64encode(zlib.compress(steps, 9)).decode("ascii"),
            "sha256": _digest(self.ids_V),
        }

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Vocabulary | None:
        """What `to_card` has written into a card; None when it has not, or not so."""
        found = card.get(KEY)
        try:
            assert isinstance(found, dict)
            size, source_size = int(found["size"]), int(found["size_before"])
            assert 0 < size <= source_size < 2**31
            unpacking = zlib.decompressobj()
            steps = unpacking.decompress(base64.b64decode(found["ids_before"], validate=True), 4 * size)
            ids_V = np.cumsum(np.frombuffer(steps, "<i4").astype(np.int64))
        except (AssertionError, KeyError, OverflowError, TypeError, ValueError, zlib.error):
            return None
        is_whole = len(ids_V) == size and ids_V.min() >= 0 and ids_V.max() < source_size
        return cls(source_size, ids_V) if is_whole and found.get("sha256") == _digest(ids_V) else None

    def after(self, kept_V: Ids) -> Vocabulary:
        """The vocabulary of which only the tokens `kept_V` were left, in that order."""
        return Vocabulary(self.source_size, self.ids_V[kept_V])


def _digest(ids_V: Ids) -> str:
    return hashlib.sha256(ids_V.astype("<i8").tobytes()).hexdigest()


def columns(model: Vocabulary | None, size: int, reference: Vocabulary | None, reference_size: int) -> Ids | None:
    """The reference's id of every token of a model [V]; None when both have the same ones.

    Args:
        model, reference: None for a model that has all tokens.
        size, reference_size: tokens of each.

    Raises:
        ValueError: the reference lacks tokens of the model, or they are of different families; the message says which.
    """
    own = np.arange(size) if model is None else model.ids_V
    others = np.arange(reference_size) if reference is None else reference.ids_V
    family = size if model is None else model.source_size
    other_family = reference_size if reference is None else reference.source_size
    if family != other_family or len(own) != size or len(others) != reference_size:
        raise ValueError(f"expected a reference with {family} logits, got {other_family}")
    if np.array_equal(own, others):
        return None
    place = np.full(family, -1, np.int64)
    place[others] = np.arange(len(others))
    found: Ids = place[own]
    if (missing := int((found < 0).sum())) > 0:
        raise ValueError(f"the reference lacks {missing} tokens that the model has")
    return found
