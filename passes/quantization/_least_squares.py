"""Codes of a matrix whose product with an activation is as close as possible to what it should be.

All of it minimizes, over codes q on a grid of scales and zero points,

    L(Q) = tr[(Q - W) H (Q - W)^T],   H = E[x x^T],   Q = (q - zero) scale

Matrices are kept turned, [K, N], so that a column of W is a row of memory: the sweeps go from column to column and
treat all N rows at once.

Axes: N out features, K in features, G = ceil(K / b) blocks of b columns
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import NumericalError
from onnxpress.compiler.stats import damped

Floats = npt.NDArray[Any]

_DAMPINGS = (1.0, 10.0, 100.0, 1000.0)  # times the damping asked for, until H has a Cholesky factor
# Columns that one product brings up to date with all before them; and among these, columns between which errors go
# one by one. Wide products are quick, and rank-one updates wait for memory.
_WIDTH, _NARROW = 32, 8


@dataclass
class Grid:
    """Where the codes of a matrix may lie.

    Attributes:
        scale_GN: weight per step, float32.
        zero_GN: code that stands for 0, float32 holding whole numbers.
        bits, block_size: width of a code; b.
    """

    scale_GN: Floats
    zero_GN: Floats
    bits: int
    block_size: int

    def rows(self, part: slice) -> Grid:
        """The grid of some of the N rows."""
        return Grid(self.scale_GN[:, part], self.zero_GN[:, part], self.bits, self.block_size)

    def step(self, target_N: Floats, column: int) -> Floats:
        """Signed steps, code - zero, nearest to `target_N` in this column."""
        group = column // self.block_size
        zero = self.zero_GN[group]
        q: Floats = np.rint(target_N / self.scale_GN[group])
        np.maximum(q, -zero, out=q)
        np.minimum(q, (2**self.bits - 1) - zero, out=q)
        return q

    def spread(self, x_GN: Floats, num_in: int) -> Floats:
        """[G, N] to [K, N]: each block's number for each of its columns."""
        spread: Floats = np.repeat(x_GN, self.block_size, axis=0)[:num_in]
        return spread


class Moments:
    """Second moments of an activation and what is derived from them, each once: every matrix that reads it needs them.

    Attributes:
        hessian_KK: H = E[x x^T], float64.
        damping: added to the diagonal, relative to its mean.
    """

    def __init__(self, hessian_KK: Floats, damping: float) -> None:
        """H must be symmetric."""
        self.hessian_KK, self.damping = hessian_KK, damping

    @functools.cached_property
    def plain_KK(self) -> Floats:  # noqa: N802
        """H, float32."""
        result: Floats = self.hessian_KK.astype(np.float32)
        return result

    @functools.cached_property
    def damped_KK(self) -> Floats:  # noqa: N802
        """H with its damping, float32."""
        result: Floats = damped(self.hessian_KK, self.damping).astype(np.float32)
        return result

    @functools.cached_property
    def order_K(self) -> npt.NDArray[np.int64]:  # noqa: N802
        """Columns, the largest second moment first."""
        order: npt.NDArray[np.int64] = np.argsort(-self.hessian_KK.diagonal(), kind="stable")
        return order

    @functools.cached_property
    def feedback_KK(self) -> Floats:  # noqa: N802
        """[i, j]: the share of the error of the i-th column of `order_K` that the j-th makes up for, float32."""
        order = self.order_K
        r_KK = factor(self.hessian_KK[order[:, None], order], self.damping)
        feedback: Floats = (r_KK / r_KK.diagonal()).astype(np.float32)
        return feedback


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


def sweep(w_KN: Floats, moments: Moments, grid: Grid, *, width: int = _WIDTH) -> Floats:
    """GPTQ with columns in order of importance: each is rounded after the errors of those before are made up for.

    The column that comes first is rounded as it is; every later one as w_j + sum_i (w_i - q_i) R_ij / R_jj, the form of
    QuIP's LDLQ, which is equal to GPTQ's and needs no inverse. Blocks keep their scales (static groups), so the order
    needs no index in the graph.

    Paper: arXiv:2210.17323 (GPTQ), arXiv:2307.13304 (LDLQ, theorem 6: equal)

    Args:
        w_KN: W, turned, float32.
        moments: of the activation.
        grid: scales and zero points.
        width: columns between two products; does not change the result beyond rounding.

    Returns:
        Signed steps (code - zero), float32 [K, N].
    """
    order, feedback = moments.order_K, moments.feedback_KK
    columns, rows = w_KN.shape
    steps = np.empty((columns, rows), np.float32)
    error = np.empty((columns, rows), np.float32)  # w - q, in the order of the sweep
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        target = w_KN[order[start:stop]]
        if start:
            target += feedback[:start, start:stop].T @ error[:start]
        for first in range(start, stop, _NARROW):
            end = min(first + _NARROW, stop)
            if first > start:
                target[first - start : end - start] += feedback[start:first, first:end].T @ error[start:first]
            for j in range(first, end):
                column = int(order[j])
                q = grid.step(target[j - start], column)
                steps[column] = q
                e = error[j]
                np.multiply(q, grid.scale_GN[column // grid.block_size], out=e)
                np.subtract(w_KN[column], e, out=e)
                if j + 1 < end:
                    target[j + 1 - start : end - start] += feedback[j, j + 1 : end, None] * e
    return steps


def descend(steps_KN: Floats, w_KN: Floats, moments: Moments, grid: Grid, *, width: int = _WIDTH) -> int:
    """One sweep of coordinate descent over the columns, in place: each gets the best codes given all others.

    Never makes L larger, H being the damped one. Paper: arXiv:2309.01885 (QuantEase).

    Returns:
        How many codes changed.
    """
    columns, rows = w_KN.shape
    h = moments.damped_KK
    error = steps_KN * grid.spread(grid.scale_GN, columns) - w_KN  # Q - W
    changed = 0
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        gradient = h[start:stop] @ error
        moves = np.zeros((stop - start, rows), np.float32)  # of the weights, from here on
        for first in range(start, stop, _NARROW):
            end = min(first + _NARROW, stop)
            if first > start:
                gradient[first - start : end - start] += h[first:end, start:first] @ moves[: first - start]
            for j in range(first, end):
                if h[j, j] <= 0:
                    continue
                scale = grid.scale_GN[j // grid.block_size]
                # Without column j the gradient is g - h_jj e; the best value of column j makes the whole zero.
                old = steps_KN[j]
                q = grid.step(old * scale - gradient[j - start] / h[j, j], j)
                moved = moves[j - start]
                np.subtract(q, old, out=moved)
                moved *= scale
                count = int(np.count_nonzero(moved))
                if not count:
                    continue
                changed += count
                steps_KN[j] = q
                if j + 1 < end:
                    gradient[j + 1 - start : end - start] += h[j + 1 : end, j, None] * moved
        error[start:stop] += moves
    return changed


def refit(steps_KN: Floats, w_KN: Floats, moments: Moments, grid: Grid, *, ridge: float = 1e-6) -> Floats:
    """Scales [G, N] of least L for these steps, float32; per row of W the solution of a system of G equations.

    H is the damped one, as in `descend`: together the two never make L larger.
    """
    columns, rows = w_KN.shape
    b, groups = grid.block_size, grid.scale_GN.shape[0]
    h = moments.damped_KK
    a = np.empty((groups, groups, rows), np.float32)  # symmetric in the groups
    rhs = np.empty((groups, rows), np.float32)
    starts = np.arange(0, columns, b)
    hw = h @ w_KN
    for g in range(groups):
        part = slice(g * b, min((g + 1) * b, columns))
        later = slice(part.start, None)
        product = h[later, part] @ steps_KN[part]  # [K, N] without the columns of blocks before
        product *= steps_KN[later]
        a[g, g:] = a[g:, g] = np.add.reduceat(product, starts[g:] - part.start, axis=0)
        rhs[g] = np.einsum("bn,bn->n", steps_KN[part], hw[part])
    a_NGG = np.ascontiguousarray(a.transpose(2, 0, 1)).astype(np.float64)
    # A ridge to the old scales; blocks whose steps are all 0 keep theirs.
    weight = ridge * np.maximum(a_NGG.diagonal(axis1=1, axis2=2), 1e-30)
    weight = np.where(weight <= 1e-29, 1.0, weight)
    index = np.arange(groups)
    a_NGG[:, index, index] += weight
    right = rhs.T.astype(np.float64) + weight * grid.scale_GN.T
    return np.linalg.solve(a_NGG, right[..., None])[..., 0].T.astype(np.float32)


def quadratic(x_KN: Floats, h_KK: Floats) -> float:
    """tr[X^T H X], summed in float64; both float32. Rounding makes no negative number of one near 0."""
    return max(float(np.einsum("kn,kn->", h_KK @ x_KN, x_KN, dtype=np.float64)), 0.0)
