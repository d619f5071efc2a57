"""Zeroes the weights that are small where the text hardly uses them: magnitude times the norm of the feature.

What stays is not changed. For storage and for other runtimes: ONNX Runtime has no sparse kernels.

Paper:   Sun et al., arXiv:2306.11695
Differs: head and routers are left alone unless asked for; later matrices see the activation of the pruned model.
Axes:    N out features, K in features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.linears import Float2D
from onnxpress.compiler.stats import Floats, Stats
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.pruning._sparse import Solver, Streamed


def wanda(w_NK: Float2D, importance_K: Floats, pattern: Pattern) -> Float2D:
    """The weights with the largest |w_ij| sqrt(E[x_j^2]) of each row, or of each M neighbours of a row; 0 elsewhere.

    Args:
        w_NK: weights. Not changed.
        importance_K: mean square of each feature.
        pattern: of the zeros.

    Laws:   what stays is unchanged; a feature that never occurs goes first; equal importance gives magnitude pruning;
            permuting rows permutes the result.
    Cost:   O(N K)
    """
    kept: Float2D = w_NK * pattern.keep(np.abs(w_NK) * np.sqrt(importance_K).astype(np.float32))
    return kept


@dataclass(frozen=True, kw_only=True)
class Wanda(Streamed):
    """Zeroes weights by magnitude and activation, by calibration text; makes a compressed file smaller, nothing faster.

    Comes before quantizers, of which zeros survive the
    symmetric ones; `store_sparse` at the end makes the file smaller.
    """

    paper: ClassVar[str] = "arXiv:2306.11695"

    @classmethod
    def example(cls, model: ir.Model) -> Wanda:
        return cls(tokens=64, length=32)

    def solver(self, stats: Stats, pattern: Pattern) -> Solver:
        importance_K = stats.importance_K
        return lambda w_NK: wanda(w_NK, importance_K, pattern)
