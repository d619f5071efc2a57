"""Scales and zero points of blocks, chosen by the error that matters: weighted by how large each feature gets.

Axes: N out features, K in features, G = ceil(K / b) blocks of b columns
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.passes.quantization._least_squares import Grid

Floats = npt.NDArray[Any]

# Ranges that are tried, relative to the one that spans all weights of a block; with a sign where the longer end of a
# symmetric range may lie on either side.
_SYMMETRIC = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, -1.14, -1.07, -1.0, -0.93, -0.85)
_ASYMMETRIC = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_SHIFTS = (0.0, -0.5, 0.5)  # of the zero point, in steps, from where the range is centred on the weights
_WIDE = (1.0, 0.98, 0.96)  # 8 bits: the range hardly matters


def fit_grid(w_KN: Floats, importance_K: Floats, *, bits: int, block_size: int, symmetric: bool) -> Grid:
    """The grid on which rounding to the nearest has the least sum of importance times squared error.

    With steps q the best scale is (h q).w / (h q).q; it is what each range that is tried ends with.

    Args:
        w_KN: weights, turned, float32.
        importance_K: weight of each column's squared error: the mean square of its feature.
        bits, block_size, symmetric: of the grid.
    """
    columns, rows = w_KN.shape
    groups = -(-columns // block_size)
    missing = groups * block_size - columns
    w_GbN = np.pad(w_KN, ((0, missing), (0, 0))).reshape(groups, block_size, rows)
    # A feature that never occurs still gets a weight: scales must be defined.
    importance = np.asarray(importance_K, np.float32)
    importance = np.pad(importance + np.float32(1e-6 * importance.mean() + 1e-30), (0, missing))
    h_Gb1 = importance.reshape(groups, block_size, 1)
    low, high = np.minimum(w_GbN.min(axis=1), 0), np.maximum(w_GbN.max(axis=1), 0)
    levels = 2**bits - 1
    best = np.full((groups, rows), np.inf, np.float32)
    scale, zero = np.ones((groups, rows), np.float32), np.full((groups, rows), 2 ** (bits - 1), np.float32)
    if symmetric:
        base = np.where(-low > high, low, high) / np.float32(-(2 ** (bits - 1)))
        tries = [(factor, 0.0) for factor in (_SYMMETRIC if bits < 8 else _WIDE)]
    else:
        base = (high - low) / np.float32(levels)
        tries = [(factor, shift) for factor in (_ASYMMETRIC if bits < 8 else _WIDE) for shift in _SHIFTS]
    base = np.where(base == 0, np.float32(1), base)
    for factor, shift in tries:
        s_GN = base * np.float32(factor)
        z_GN = zero if symmetric else np.clip(np.rint(levels / 2 - (low + high) / (2 * s_GN) + shift), 0, levels)
        q = np.rint(w_GbN / s_GN[:, None])
        np.maximum(q, -z_GN[:, None], out=q)
        np.minimum(q, levels - z_GN[:, None], out=q)
        hq = h_Gb1 * q
        square = np.einsum("gbn,gbn->gn", hq, q)
        s_GN = np.divide(np.einsum("gbn,gbn->gn", hq, w_GbN), square, out=s_GN.copy(), where=square > 0)
        q *= s_GN[:, None]
        q -= w_GbN
        loss = np.einsum("gbn,gbn->gn", h_Gb1 * q, q)
        better = loss < best
        np.copyto(best, loss, where=better)
        np.copyto(scale, s_GN, where=better)
        if not symmetric:
            zero = np.where(better, z_GN, zero)
    return Grid(np.where(scale == 0, np.float32(1), scale), zero, bits, block_size)
