"""Which weights of a matrix become zero: a share of every row, or N that stay of every M neighbours.

Axes: N out features, K in features
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.columns import Zeros
from onnxpress.compiler.errors import OptionError

Scores = npt.NDArray[Any]
Keep = npt.NDArray[np.bool_]

NO_SPEED = (
    "ONNX Runtime has no sparse kernels: zeros make nothing faster and save no memory; the file gets smaller where it"
    " is compressed, or where store_sparse finds a smaller form"
)
_SPAN = 128  # columns that choose together in a sweep, as in SparseGPT


class Pattern(NamedTuple):
    """N weights of every M neighbours of a row stay; M = 0: any, as long as the share is right.

    Attributes:
        sparsity: share of each row that becomes zero.
        kept, of: N and M.
    """

    sparsity: float
    kept: int = 0
    of: int = 0

    def count(self, columns: int) -> int:
        """Zeros of a row of so many columns."""
        return columns // self.of * (self.of - self.kept) if self.of else math.floor(self.sparsity * columns + 1e-9)

    def keep(self, scores_NK: Scores) -> Keep:
        """What stays: all but the lowest scores, bool [N, K]; of equal scores any.

        Laws:   every row has `count(K)` that go; what stays scores no less than what goes among those it is compared
                with.
        """
        rows, columns = scores_NK.shape
        if not self.of:
            return ~lowest(scores_NK, self.count(columns))
        return ~lowest(scores_NK.reshape(-1, self.of), self.of - self.kept).reshape(rows, columns)

    def has(self, w_NK: npt.NDArray[Any]) -> bool:
        """Whether the matrix has these zeros already."""
        zero = w_NK == 0
        if self.of:
            return bool((zero.reshape(-1, self.of).sum(axis=1) >= self.of - self.kept).all())
        return bool((zero.sum(axis=1) >= self.count(w_NK.shape[1])).all())

    def refuses(self, columns: int) -> str | None:
        """Why no row of so many columns can have these zeros, with the nearest that can; None when it can."""
        if self.of and columns % self.of:
            return f"its {columns} columns are no multiple of {self.of}; {self.nearest(columns)}"
        if not self.count(columns):
            nearest = "a row has one weight only" if columns == 1 else f"the nearest is sparsity={_up(1 / columns)}"
            return f"{self.sparsity:.6g} of {columns} columns is less than one weight; {nearest}"
        return None

    def nearest(self, columns: int) -> str:
        """The nearest pattern that fits rows of so many columns."""
        choices = [(n, m) for m in range(2, 2 * self.of + 1) if columns % m == 0 for n in range(1, m)]
        if not choices:
            return f"the nearest is sparsity={self.sparsity:.6g}"
        n, m = min(choices, key=lambda one: (abs(one[1] - self.of), abs(1 - one[0] / one[1] - self.sparsity)))
        return f"the nearest is pattern='{n}:{m}'"

    def in_sweep(self, columns: int) -> Zeros:
        """The same for `columns.sweep`: a share is chosen among 128 columns at once, with the right total."""
        if self.of:
            return Zeros(self.of, lambda scores, _: ~lowest(scores.T, self.of - self.kept).T)

        def choose(scores: Scores, first: int) -> Keep:
            last = first + len(scores)
            return ~lowest(scores.T, self.count(last) - self.count(first)).T

        return Zeros(_SPAN, choose)

    @property
    def group(self) -> int:
        """Neighbours that stay together where columns come in order of importance."""
        return self.of or 1


def lowest(scores_NK: Scores, count: int) -> Keep:
    """Marks the `count` lowest scores of each row."""
    mark = np.zeros(scores_NK.shape, np.bool_)
    if count >= scores_NK.shape[1]:
        mark[:] = True
    elif count:
        np.put_along_axis(mark, np.argpartition(scores_NK, count - 1, axis=1)[:, :count], True, axis=1)
    return mark


def read(name: str, sparsity: float | None, pattern: str | None, default: float | None = None) -> Pattern | None:
    """The pattern that two options ask for, of which one at most may be given; None for none.

    Raises:
        OptionError: there is no such pattern; the hint has the nearest.
    """
    if sparsity is not None and pattern is not None:
        raise OptionError(
            f"{name}: expected sparsity or pattern, got both", hint=f"pattern={pattern!r} says the share too"
        )
    if pattern is None:
        share = default if sparsity is None else sparsity
        if share is not None and not 0 < share < 1:
            nearest = "0.99: with 1 nothing is left" if share >= 1 else "0.01; or leave the pass out"
            raise OptionError(
                f"{name}: sparsity must be between 0 and 1, got {share!r}",
                hint=f"it is a share of each row, 0.5 zeroes half; the nearest is {nearest}",
            )
        return None if share is None else Pattern(share)
    found = re.fullmatch(r"\s*(\d{1,6})\s*:\s*(\d{1,6})\s*", pattern)
    if found is None:
        raise OptionError(
            f"{name}: pattern must be two numbers such as '2:4', got {pattern!r}",
            hint="'2:4': two of every four neighbours stay",
        )
    kept, of = int(found[1]), int(found[2])
    if not 0 < kept < of:
        near = (max(min(kept, of - 1), 1), max(of, 2))
        why = "keeps all" if kept == of else "keeps nothing" if not kept else "keeps more than there are"
        raise OptionError(
            f"{name}: pattern={pattern!r} {why}: N of every M weights stay, with 0 < N < M",
            hint=f"the nearest is pattern='{near[0]}:{near[1]}'",
        )
    return Pattern(1 - kept / of, kept, of)


def _up(share: float) -> float:
    """A share that is not below this one, with four digits."""
    digits = 4 - math.ceil(math.log10(share))
    return math.ceil(share * 10.0**digits) / 10.0**digits
