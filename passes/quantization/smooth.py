"""Moves outliers from activations into weights, so that both fit in 8 bits: activation divided, weights multiplied.

The factor of a feature is max|x|^a / max|w|^(1 - a). The power is chosen for each activation by the error that 8 bits
of both leave at the outputs, as the second moments and the largest magnitudes tell it. Where none is better than no
factor at all, nothing changes. Comes before a quantizer.

Paper:   arXiv:2211.10438 (SmoothQuant, equation 4)
Differs: the power is searched; value and output projections stay, since a factor between them would change the cache.
Axes:    N out features, K in features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.nbits import BLOCK_SIZES
from onnxpress.compiler.stats import Stats
from onnxpress.passes.quantization._folding import Floats, Folded
from onnxpress.passes.quantization._least_squares import quadratic

_POWERS = (0.2, 0.35, 0.5, 0.65, 0.75, 0.85)
_STEPS = 127


@dataclass(frozen=True, kw_only=True)
class Smooth(Folded):
    """Evens out activations for int8 kernels; the model stays the same.

    `granularity` says what shares a step of the int8 activation: the whole tensor (`dynamic_int8`), or
    `block_size` features of a token (MatMulNBits at accuracy level 4).
    """

    paper: ClassVar[str] = "arXiv:2211.10438"

    alpha: float | None = None  # the power; searched by default
    granularity: Literal["tensor", "block"] = "tensor"  # what one scale of the quantizer that follows is for
    block_size: int = 32  # of granularity "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.alpha is None or 0 < self.alpha <= 1, "alpha", "more than 0, at most 1", "0.5 is the paper's")
        self.check(self.block_size in BLOCK_SIZES, "block_size", f"one of {BLOCK_SIZES}")
        is_used = self.granularity == "block" or self.block_size == 32
        self.check(is_used, "block_size", "left out with granularity='tensor'")

    @classmethod
    def example(cls, model: ir.Model) -> Smooth:
        return cls(tokens=32, length=16)

    def choose(self, rows: Sequence[Floats], stats: Stats) -> tuple[Floats, float, float] | None:
        w_NK = np.concatenate(list(rows))
        largest_K = np.abs(w_NK).max(axis=0).astype(np.float64)
        if not stats.absmax_K.any() or not largest_K.any():
            return None
        # A feature that is always 0, or that nobody reads, needs no factor.
        is_used = (stats.absmax_K > 0) & (largest_K > 0)
        moments_KK = stats.hessian_KK.astype(np.float32)
        before = self._error(w_NK, np.ones(stats.num_in), stats, moments_KK)
        best = None
        for power in _POWERS if self.alpha is None else (self.alpha,):
            factor_K = np.ones(stats.num_in)
            factor_K[is_used] = stats.absmax_K[is_used] ** power / largest_K[is_used] ** (1 - power)
            factor_K[is_used] /= np.exp(np.log(factor_K[is_used]).mean())
            error = self._error(w_NK, factor_K, stats, moments_KK)
            if error < (before if best is None else best[1]):
                best = factor_K, error
        return None if best is None else (*best, before)

    def _error(self, w_NK: Floats, factor_K: Floats, stats: Stats, moments_KK: Floats) -> float:
        """Mean squared error of the outputs: of int8 weights, one step per row or block, and of int8 activations."""
        scaled_NK = w_NK * factor_K
        error_NK = (_spread(scaled_NK, self._width(stats.num_in)) / factor_K).astype(np.float32)
        weights = quadratic(np.ascontiguousarray(error_NK.T), moments_KK)
        # An error is uniform within a step, and the step that of the largest feature which shares it.
        step_K = _shared_max(stats.absmax_K / factor_K, self._width(stats.num_in)) / _STEPS
        return weights + float((step_K**2 / 12) @ np.square(scaled_NK).sum(axis=0))

    def _width(self, num_in: int) -> int:
        return num_in if self.granularity == "tensor" else self.block_size


def _spread(w_NK: Floats, width: int) -> Floats:
    """What rounding to 8 bits leaves of the rows, `width` columns sharing a step."""
    step_NK = _shared_max(np.abs(w_NK), width) / _STEPS
    step_NK[step_NK == 0] = 1
    error: Floats = np.rint(w_NK / step_NK) * step_NK - w_NK
    return error


def _shared_max(x: Floats, width: int) -> Floats:
    """The largest of each run of `width` along the last axis, at the place of every member."""
    starts = np.arange(0, x.shape[-1], width)
    largest = np.maximum.reduceat(x, starts, axis=-1)
    spread: Floats = np.repeat(largest, width, axis=-1)[..., : x.shape[-1]]
    return spread
