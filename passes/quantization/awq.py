"""Gives features that matter a finer grid: columns of weights times a factor, the activation divided by it.

The factor is a power of the mean magnitude of the feature. The power is chosen for each activation by the error that
rounding the scaled weights leaves at the outputs, seen through the second moments of the activation; 0 changes nothing
and is what is left where nothing is better. Comes before a quantizer, which it does not replace.

Paper:   arXiv:2306.00978 (AWQ, equations 4 and 5)
Differs: the error is that of all matrices that read the activation, over calibration text by its second moments, so no
         activation is kept; value and output projections stay, since a factor between them would change the cache.
Axes:    N out features, K in features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.nbits import BITS, BLOCK_SIZES
from onnxpress.compiler.stats import Stats
from onnxpress.passes.quantization._folding import Floats, Folded
from onnxpress.passes.quantization._least_squares import quadratic
from onnxpress.passes.quantization._rounding import round_matrix
from onnxpress.passes.quantization._weight_only import Format

_POWERS = np.arange(1, 21) / 20
_SMALLEST = 1e-4  # factor, relative to the middle


@dataclass(frozen=True, kw_only=True)
class Awq(Folded):
    """Scales features by how large they get, so that rounding to few bits hurts less; the model stays the same.

    `bits`, `block_size` and `symmetric` are those of the quantizer that follows.
    """

    paper: ClassVar[str] = "arXiv:2306.00978"

    bits: int = 4  # of the quantizer that follows
    block_size: int = 32  # of the quantizer that follows
    symmetric: bool = False  # of the quantizer that follows

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.bits in BITS, "bits", f"one of {BITS}")
        self.check(self.block_size in BLOCK_SIZES, "block_size", f"one of {BLOCK_SIZES}")

    @classmethod
    def example(cls, model: ir.Model) -> Awq:
        return cls(tokens=32, length=16, block_size=16)

    def choose(self, rows: Sequence[Floats], stats: Stats) -> tuple[Floats, float, float] | None:
        moments_KK = stats.hessian_KK.astype(np.float32)
        before = sum(self._error(w_NK, np.ones(stats.num_in), moments_KK) for w_NK in rows)
        best = None
        mean_K = stats.abs_K / max(stats.count, 1)
        is_used = mean_K > 0
        if not is_used.any() or not before:
            return None
        for power in _POWERS:
            # A feature that is always 0 needs no factor, and must not stretch the middle of the others.
            factor_K = np.ones(stats.num_in)
            factor_K[is_used] = mean_K[is_used] ** power
            factor_K[is_used] /= np.sqrt(factor_K[is_used].max() * factor_K[is_used].min())
            np.maximum(factor_K, _SMALLEST, out=factor_K)
            error = sum(self._error(w_NK, factor_K, moments_KK) for w_NK in rows)
            if error < (before if best is None else best[1]):
                best = factor_K, error
        return None if best is None else (*best, before)

    def _error(self, w_NK: Floats, factor_K: Floats, moments_KK: Floats) -> float:
        """tr(E H E^T), E what rounding W diag(s) leaves, divided by s."""
        scaled_NK = (w_NK * factor_K).astype(np.float32)
        chosen = Format(self.bits, self.block_size, self.symmetric, "max")
        rounded, _, _ = round_matrix(scaled_NK, **chosen._asdict(), scale_dtype=np.dtype(np.float32))
        error_NK = (rounded.w_NK() / factor_K - w_NK).astype(np.float32)
        return quadratic(np.ascontiguousarray(error_NK.T), moments_KK)
