"""Rounding to 8 bits: of weights with a scale per column, of activations with one scale and zero point.

Axes: N out features, K in features
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


class Range(NamedTuple):
    """Step and zero point of uint8 codes."""

    scale: float
    zero: int


def round_columns(w_NK: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 codes [K, N] and scales [N] of a matrix, symmetric: the largest weight of each row of w_NK becomes 127.

    Laws:   the error of a weight is at most half a scale; twice the weights, the same codes; a row of zeros stays.
    """
    scale_N = (np.abs(w_NK).max(axis=1) / np.float32(127)).astype(np.float32)
    # The reciprocal of a subnormal number is infinite.
    scale_N = np.where(scale_N < np.finfo(np.float32).tiny, np.float32(1), scale_N)
    codes_NK = np.rint(w_NK / scale_N[:, None])
    with np.errstate(invalid="ignore"):  # of weights that are not finite, which callers see in the errors
        return np.ascontiguousarray(np.clip(codes_NK, -127, 127).astype(np.int8).T), scale_N


def spread(low: float, high: float) -> Range:
    """The uint8 step and zero point of [low, high], widened to hold 0: what ONNX's DynamicQuantizeLinear chooses."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    if not scale > 0:
        return Range(1.0, 0)
    return Range(float(scale), int(np.clip(np.rint(-low / scale), 0, 255)))


def fake_quantize(x: Floats, chosen: Range) -> Floats:
    """What uint8 codes of `x` stand for, float32."""
    scale, zero = np.float32(chosen.scale), np.float32(chosen.zero)
    result: Floats = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    return result
