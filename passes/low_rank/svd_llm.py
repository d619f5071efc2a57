"""Splits weights into two thin factors, fitted to text so that the outputs stay what they were.

The factors of a matrix are the best ones for the activation that it reads, and for the outputs that the uncompressed
model has there: what matrices before it have lost is made up for as far as this one can.

Paper:   arXiv:2403.07378 (SVD-LLM), arXiv:2503.12340 (SVD-LLM v2)
Differs: the target is the least-squares matrix for the teacher's outputs, of which the best low-rank form is taken, so
         that both factors are fitted, not one; ranks come from one knapsack over measured losses, and a matrix may stay
         whole. Matrices joined before by `pack` share their first factor.
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.stats import Stats, damped, teacher_correction
from onnxpress.compiler.whitening import Floats
from onnxpress.passes.low_rank._whitened import Whitened

_DAMPING = 1e-3  # relative to the mean second moment


@dataclass(frozen=True, kw_only=True)
class SvdLlm(Whitened):
    """Splits linears into two factors of low rank, by calibration text; give one of ratio, size and kl.

    Comes before quantizers, which see the factors as linears of their own. `pack` before it lets queries, keys and
    values, and gate and up, share a factor. A head that shares its bytes with the embedding is left alone.
    """

    paper: ClassVar[str] = "arXiv:2403.07378"

    teacher: bool = True  # fit to the outputs of the uncompressed model, not to those of the layer itself
    refit: bool = True  # let matrices that stay whole make up for the loss of those before them
    # In feed-forward layers, let R rows or columns of a matrix be a factor: R (N + K - R) numbers instead of R (N + K).
    # For models that stay in floats: rounded, such factors lose more. Features change places for it, so an adapter made
    # for the checkpoint no longer fits.
    pivot: bool = False
    ridge: float = 0.05  # holds targets near the weights, relative to the mean second moment

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.ridge > 0, "ridge", "positive", "0.05 suits most models")

    @classmethod
    def example(cls, model: ir.Model) -> SvdLlm:
        return cls(ratio=0.3, tokens=64, length=32, probe=16)

    @property
    def refits(self) -> bool:
        return self.refit and self.teacher

    @property
    def pivoted(self) -> bool:
        return self.pivot

    def moments(self, stats: Stats) -> Floats:
        # With less text than features, most directions were never seen: without damping they would seem to be free.
        is_scarce = stats.scarcity > 1
        return damped(stats.hessian_KK, _DAMPING * stats.scarcity) if is_scarce else stats.hessian_KK

    def target(self, w_NK: Floats, stats: Stats) -> Floats:
        if not self.teacher or stats.drift_KK is None:
            return w_NK
        drift_KK = stats.drift_KK / max(stats.count, 1)
        correction_KK = teacher_correction(stats.hessian_KK, drift_KK, self.ridge * stats.scarcity)
        target: Floats = w_NK + w_NK @ correction_KK.T
        return np.asarray(target, np.float64)
