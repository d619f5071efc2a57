"""Codes of a matrix whose product with an activation is as close as possible to what it should be.

All of it minimizes, over codes q on a grid of scales and zero points,

    L(Q) = tr[(Q - W) H (Q - W)^T],   H = E[x x^T],   Q = (q - zero) scale

Matrices are kept turned, [K, N], so that a column of W is a row of memory: the sweeps go from column to column and
treat all N rows at once.

Axes: N out features, K in features, G = ceil(K / b) blocks of b columns
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler import columns
from onnxpress.compiler.columns import WIDTH, Keep
from onnxpress.compiler.columns import Moments as Moments
from onnxpress.compiler.columns import factor as factor
from onnxpress.compiler.columns import quadratic as quadratic
from onnxpress.compiler.zeros import Pattern

Floats = npt.NDArray[Any]

_NARROW = 8  # columns between which errors go one by one


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


def sweep(w_KN: Floats, moments: Moments, grid: Grid, *, width: int = WIDTH) -> Floats:
    """GPTQ with columns in order of importance: `columns.sweep` onto a grid.

    Blocks keep their scales (static groups), so the order needs no index in the graph.

    Args:
        w_KN: W, turned, float32.
        moments: of the activation.
        grid: scales and zero points.
        width: see `columns.sweep`.

    Returns:
        Signed steps (code - zero), float32 [K, N].
    """
    return sparse_sweep(w_KN, moments, grid, None, width=width)[0]


def sparse_sweep(
    w_KN: Floats, moments: Moments, grid: Grid, pattern: Pattern | None, *, width: int = WIDTH
) -> tuple[Floats, Keep | None]:
    """`sweep` in which some weights become zero (SparseGPT): the others make up for them, and for their rounding.

    Paper: arXiv:2301.00774, section 3.5

    Returns:
        Signed steps, and what stays, bool [K, N]; None without a pattern.
    """
    steps = np.empty(w_KN.shape, np.float32)

    def place(target_N: Floats, column: int, placed_N: Floats) -> None:
        q = grid.step(target_N, column)
        steps[column] = q
        np.multiply(q, grid.scale_GN[column // grid.block_size], out=placed_N)

    if pattern is None:
        return steps, columns.sweep(w_KN, moments, place, width=width)
    zeros = pattern.in_sweep(len(w_KN))
    return steps, columns.sweep(w_KN, moments, place, zeros=zeros, group=pattern.group, width=width)


def descend(
    steps_KN: Floats, w_KN: Floats, moments: Moments, grid: Grid, *, keep_KN: Keep | None = None, width: int = WIDTH
) -> int:
    """One sweep of coordinate descent over the columns, in place: each gets the best codes given all others.

    Never makes L larger, H being the damped one. Where `keep_KN` is False a weight stays 0.

    Paper: arXiv:2309.01885 (QuantEase)

    Returns:
        How many codes changed.
    """
    num_in, rows = w_KN.shape
    h = moments.damped_KK
    error = steps_KN * grid.spread(grid.scale_GN, num_in) - w_KN  # Q - W
    changed = 0
    for start in range(0, num_in, width):
        stop = min(start + width, num_in)
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
                if keep_KN is not None:
                    q *= keep_KN[j]
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
    num_in, rows = w_KN.shape
    b, groups = grid.block_size, grid.scale_GN.shape[0]
    h = moments.damped_KK
    a = np.empty((groups, groups, rows), np.float32)  # symmetric in the groups
    rhs = np.empty((groups, rows), np.float32)
    starts = np.arange(0, num_in, b)
    hw = h @ w_KN
    for g in range(groups):
        part = slice(g * b, min((g + 1) * b, num_in))
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
