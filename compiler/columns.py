"""A sweep over the columns of a matrix in which each makes up for the errors of those before: GPTQ and SparseGPT.

It minimizes, column by column, L(Q) = tr[(Q - W) H (Q - W)^T] with H = E[x x^T], whatever a column may become: codes
on a grid, zeros, or both. Matrices are kept turned, [K, N], so that a column of W is a row of memory: the sweep goes
from column to column and treats all N rows at once.

Axes: N out features, K in features, b columns of which zeros are chosen together
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import NumericalError
from onnxpress.compiler.stats import damped

Floats = npt.NDArray[Any]
# Writes into the third argument what a column of that number becomes where it should be like the first [N].
Place = Callable[[Floats, int, Floats], None]
Keep = npt.NDArray[np.bool_]

_DAMPINGS = (1.0, 10.0, 100.0, 1000.0)  # times the damping asked for, until H has a Cholesky factor
# Columns that one product brings up to date with all before them; and among these, columns between which errors go
# one by one. Wide products are quick, and rank-one updates wait for memory.
WIDTH, _NARROW = 32, 8


class Zeros(NamedTuple):
    """Which weights become zero.

    Attributes:
        span: columns among which each row chooses at once.
        choose: scores [span, N], and the number of the first of these columns, to what stays, bool [span, N].
    """

    span: int
    choose: Callable[[Floats, int], Keep]


class Moments:
    """Second moments of an activation and what is derived from them, each once: every matrix that reads it needs them.

    Attributes:
        hessian_KK: H = E[x x^T], float64.
        damping: added to the diagonal, relative to its mean.
    """

    def __init__(self, hessian_KK: Floats, damping: float) -> None:
        """H must be symmetric."""
        self.hessian_KK, self.damping = hessian_KK, damping
        self._made: dict[tuple[str, int], Any] = {}

    def _once(self, name: str, group: int, make: Callable[[], Any]) -> Any:
        if (name, group) not in self._made:
            self._made[name, group] = make()
        return self._made[name, group]

    @property
    def plain_KK(self) -> Floats:  # noqa: N802
        """H, float32."""
        result: Floats = self._once("plain", 1, lambda: self.hessian_KK.astype(np.float32))
        return result

    @property
    def damped_KK(self) -> Floats:  # noqa: N802
        """H with its damping, float32."""
        result: Floats = self._once("damped", 1, lambda: damped(self.hessian_KK, self.damping).astype(np.float32))
        return result

    def order(self, group: int = 1) -> npt.NDArray[np.int64]:
        """Columns, the largest second moment first, int64 [K]; groups of so many neighbours stay together."""

        def make() -> npt.NDArray[np.int64]:
            together = self.hessian_KK.diagonal().reshape(-1, group).sum(axis=1)
            first = np.argsort(-together, kind="stable") * group
            return (first[:, None] + np.arange(group)).reshape(-1)

        order: npt.NDArray[np.int64] = self._once("order", group, make)
        return order

    def feedback(self, group: int = 1) -> tuple[Floats, Floats]:
        """What errors of columns do to later ones, for columns in this order.

        Returns:
            [i, j]: the share of the error of the i-th column that the j-th makes up for, float32 [K, K].
            How much an error of the i-th column costs once all later ones have made up for it, per error^2, float32
            [K]: 1 / U_ii^2 with U^T U = H^-1, the measure of SparseGPT.
        """

        def make() -> tuple[Floats, Floats]:
            order = self.order(group)
            r_KK = factor(self.hessian_KK[order[:, None], order], self.damping)
            diagonal = r_KK.diagonal()
            return (r_KK / diagonal).astype(np.float32), np.square(diagonal).astype(np.float32)

        result: tuple[Floats, Floats] = self._once("feedback", group, make)
        return result


def factor(hessian_KK: Floats, damping: float) -> Floats:
    """Upper triangular R with R R^T = H + damping, float64.

    Raises:
        NumericalError: H is not finite, or not positive semidefinite.
    """
    for times in _DAMPINGS:
        try:
            lower = np.linalg.cholesky(damped(hessian_KK, times * damping)[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        if np.isfinite(lower).all():
            return lower[::-1, ::-1]
    raise NumericalError("second moments of the activation are not positive semidefinite", hint="use more text")


def sweep(
    w_KN: Floats, moments: Moments, place: Place, *, zeros: Zeros | None = None, group: int = 1, width: int = WIDTH
) -> Keep | None:
    """Gives every column to `place`, in order of importance, after the errors of those before are made up for.

    The column that comes first is placed as it is; every later one as w_j + sum_i (w_i - q_i) R_ij / R_jj, the form of
    QuIP's LDLQ, which is equal to GPTQ's and needs no inverse. With zeros, the weights that stay are chosen as soon as
    the first of their columns is reached, by the square of what a weight has become times what its loss costs in the
    end; `place` sees 0 for the others.

    Paper: arXiv:2210.17323 (GPTQ), arXiv:2307.13304 (LDLQ, theorem 6: equal), arXiv:2301.00774 (SparseGPT, algorithm 1)

    Args:
        w_KN: W, turned, float. Not changed.
        moments: of the activation.
        place: see `Place`; called once for each column.
        zeros: which weights become zero, none by default.
        group: see `Moments.order`.
        width: columns between two products; does not change the result beyond rounding.

    Returns:
        What stays, bool [K, N]; None without zeros.
    """
    order, (feedback, cost_K) = moments.order(group), moments.feedback(group)
    columns, rows = w_KN.shape
    narrow, kept = _NARROW, None if zeros is None else np.empty((columns, rows), np.bool_)
    if zeros is not None and zeros.span <= narrow:
        narrow -= narrow % zeros.span
        width -= width % narrow
    elif zeros is not None:
        width = zeros.span  # all of these columns are to know of the errors before them when the choice is made
    error = np.empty((columns, rows), w_KN.dtype)  # w - q, in the order of the sweep
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        target = w_KN[order[start:stop]]
        if start:
            target += feedback[:start, start:stop].T @ error[:start]
        for first in range(start, stop, narrow):
            end = min(first + narrow, stop)
            if first > start:
                target[first - start : end - start] += feedback[start:first, first:end].T @ error[start:first]
            for j in range(first, end):
                if zeros is not None and j % zeros.span == 0:
                    chosen = slice(j, min(j + zeros.span, stop))
                    # What these weights become if the errors so far are the last ones: each is the target of its
                    # column once those before it are placed, and what they miss of W is made up for too.
                    missed = w_KN[order[chosen]] - target[j - start : chosen.stop - start]
                    missed = np.linalg.solve(feedback[chosen, chosen].T.astype(np.float64), missed)
                    scores = np.square(w_KN[order[chosen]] - missed) * cost_K[chosen, None]
                    kept[order[chosen]] = zeros.choose(scores, j)  # type: ignore[index]
                column, e = int(order[j]), error[j]
                if kept is not None:
                    target[j - start] *= kept[column]
                place(target[j - start], column, e)
                np.subtract(w_KN[column], e, out=e)
                if j + 1 < end:
                    target[j + 1 - start : end - start] += feedback[j, j + 1 : end, None] * e
    return kept


def descend(q_KN: Floats, keep_KN: Keep, w_KN: Floats, moments: Moments, *, width: int = WIDTH) -> None:
    """One sweep of coordinate descent over what stays, in place: each column becomes the best given all others.

    Never makes L larger, H being the damped one; its fixed point is the least-squares matrix with these zeros.

    Paper: arXiv:2309.01885 (QuantEase), without a grid
    """
    columns, rows = w_KN.shape
    h = moments.damped_KK
    error = q_KN - w_KN
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        gradient = h[start:stop] @ error
        moves = np.zeros((stop - start, rows), q_KN.dtype)
        for j in range(start, stop):
            if h[j, j] <= 0:
                continue
            moved = moves[j - start]
            np.divide(gradient[j - start], -h[j, j], out=moved)
            moved *= keep_KN[j]
            if j + 1 < stop:
                gradient[j + 1 - start :] += h[j + 1 : stop, j, None] * moved
        q_KN[start:stop] += moves
        error[start:stop] += moves


def quadratic(x_KN: Floats, h_KK: Floats) -> float:
    """tr[X^T H X], summed in float64; both float32. Rounding makes no negative number of one near 0."""
    return max(float(np.einsum("kn,kn->", h_KK @ x_KN, x_KN, dtype=np.float64)), 0.0)
