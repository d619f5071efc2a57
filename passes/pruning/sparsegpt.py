"""Zeroes the weights that cost least, and lets those that stay make up for them, column by column.

Text is streamed through the model; every linear is fitted to the outputs that the uncompressed model has (its teacher),
given the activation that the pruned one sees. For storage and for other runtimes: ONNX Runtime has no sparse kernels.
Together with quantization it is `gptq(sparsity=...)`.

Paper:   Frantar and Alistarh, arXiv:2301.00774 (SparseGPT), arXiv:2504.02692 (teacher's targets), arXiv:2309.01885
         (coordinate descent)
Differs: columns come in order of importance; each row chooses its own zeros, so that all have the same number; sweeps
         of coordinate descent follow. `rounds=0, teacher=False` is nearest to the paper.
Axes:    N out features, K in features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.columns import Floats, Moments, descend, sweep
from onnxpress.compiler.linears import Float2D
from onnxpress.compiler.stats import Stats, teacher_correction
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.pruning._sparse import Solver, Streamed

_ROWS = 4096  # rows of a matrix that are worked on at a time: bounds memory for a head


def sparsegpt(w_NK: Floats, moments: Moments, pattern: Pattern, *, rounds: int = 0) -> Floats:
    """The matrix with these zeros of which the outputs are nearly nearest to those of `w_NK`.

    Args:
        w_NK: weights, float. Not changed.
        moments: of the activation.
        pattern: of the zeros.
        rounds: of coordinate descent over what stays.

    Raises:
        NumericalError: the second moments are not positive semidefinite.

    Laws:   every row has its zeros, exactly; rows do not depend on each other; features that do not go together leave
            what stays unchanged; no round makes the loss larger; without zeros the weights come back.
    Cost:   O((1 + rounds) N K^2)
    """
    pruned = np.empty_like(w_NK, order="C")
    for first in range(0, len(w_NK), _ROWS):
        w_KN = np.ascontiguousarray(w_NK[first : first + _ROWS].T)
        q_KN = np.empty_like(w_KN)

        def place(target_N: Floats, column: int, placed_N: Floats, q_KN: Floats = q_KN) -> None:
            q_KN[column] = placed_N[:] = target_N

        keep_KN = sweep(w_KN, moments, place, zeros=pattern.in_sweep(w_KN.shape[0]), group=pattern.group)
        assert keep_KN is not None
        for _ in range(rounds):
            descend(q_KN, keep_KN, w_KN, moments)
        pruned[first : first + _ROWS] = q_KN.T
    return pruned


@dataclass(frozen=True, kw_only=True)
class Sparsegpt(Streamed):
    """Zeroes weights and updates the others, by calibration text; makes a compressed file smaller, nothing faster.

    Comes before quantizers; zeros survive the symmetric ones, and `gptq(sparsity=0.5)` chooses zeros and codes
    together. `store_sparse` at the end makes the file smaller.
    """

    paper: ClassVar[str] = "arXiv:2301.00774"

    teacher: bool = True  # fit to the outputs of the uncompressed model, not to those of the layer itself
    damping: float = 0.01  # added to the diagonal of the second moments, relative to its mean
    ridge: float = 0.05  # holds targets near the weights, relative to the mean second moment
    rounds: int = 2  # of coordinate descent over what stays, after the sweep

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.damping > 0, "damping", "positive", "0.01 suits most models")
        self.check(self.ridge > 0, "ridge", "positive", "0.05 suits most models")
        self.check(self.rounds >= 0, "rounds", "0 or more", "2 suits most models")

    @classmethod
    def example(cls, model: ir.Model) -> Sparsegpt:
        return cls(tokens=64, length=32)

    def solver(self, stats: Stats, pattern: Pattern) -> Solver:
        # Few tokens (an expert that is seldom chosen) say little about how features go together.
        moments = Moments(stats.hessian_KK, self.damping * stats.scarcity)
        correction_KK: Floats | None = None
        if self.teacher and stats.drift_KK is not None:
            drift_KK = stats.drift_KK / max(stats.count, 1)
            correction_KK = teacher_correction(moments.hessian_KK, drift_KK, self.ridge * stats.scarcity)

        def solve(w_NK: Float2D) -> Float2D:
            target_NK = w_NK if correction_KK is None else w_NK + w_NK @ correction_KK.T
            return sparsegpt(target_NK, moments, pattern, rounds=self.rounds)

        return solve
