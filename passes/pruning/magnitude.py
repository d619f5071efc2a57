"""Sets the smallest weights of every row to zero.

Honest about what it is good for: ONNX Runtime has no sparse kernel for these products, so nothing gets faster and no
memory is saved; only a compressed file gets smaller. Zeros survive a later symmetric quantization.

Paper:   Han et al., arXiv:1506.02626 (without retraining).
Axes:    N out features, K in features
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import zeros
from onnxpress.compiler.linears import Float2D, Linear, unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.roles import KINDS
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.pruning._sparse import Tally, prunable


def prune_rows(w_NK: npt.NDArray[Any], pattern: Pattern) -> npt.NDArray[Any]:
    """A copy of `w_NK` in which the smallest magnitudes of each row, or of each M neighbours of a row, are zero.

    Per row, not per matrix: rows of small norm would otherwise vanish altogether.

    Laws: every row has at least that many zeros; what is kept is unchanged and no smaller than what is not; pruning
          twice is pruning once; permuting columns permutes the result of a share (ties apart).
    """
    pruned = w_NK.copy(order="C")
    pruned[~pattern.keep(np.abs(pruned))] = 0
    return pruned


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pass):
    """Zeroes the smallest weights of every row of every linear; makes a compressed file smaller, nothing faster.

    The report's `bytes_saved_if_compressed` is what a bitmap and the remaining values would take less than the dense
    matrices; the model file itself stays as large as it is.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:1506.02626"

    sparsity: float | None = None  # share of each row that becomes zero; 0.5 where no pattern is given
    pattern: str | None = None  # "2:4": two of every four neighbours of a row stay; instead of sparsity
    kinds: tuple[str, ...] = ()  # roles to prune: "q", "gate", "down", ...; () for all
    exclude: tuple[str, ...] = ()  # patterns of names that stay dense: "block0.*", "*.down", "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        zeros.read(self.name(), self.sparsity, self.pattern)
        self.check(set(self.kinds) <= set(KINDS), "kinds", f"among {', '.join(KINDS)}")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report, tally = Report(), Tally()
        pattern = zeros.read(self.name(), self.sparsity, self.pattern, default=0.5)
        assert pattern is not None
        linears = prunable(model, pattern, report, self.name(), kinds=self.kinds, exclude=self.exclude)
        for linear in context.track(linears, "magnitude"):
            w_NK = linear.w_NK()
            if not np.isfinite(w_NK).all():
                report.skip(linear.name, "weights are not finite")
                continue
            share = tally.add(w_NK, prune_rows(w_NK, pattern), linear.nbytes)
            name = unique_name(model.graph, f"{linear.name}.pruned")
            linear.set_weight(_later(linear, pattern), name)
            report.change(linear.name, kind=linear.kind, shape=list(w_NK.shape), sparsity=share)
        tally.sum_up(model, report)
        return report


def _later(linear: Linear, pattern: Pattern) -> functools.partial[Float2D]:
    """A function that prunes the weight `linear` has now: only the stored tensor is kept, not the result."""
    tensor = linear.weight.const_value
    assert tensor is not None
    return functools.partial(_prune_stored, tensor, linear.is_turned(), pattern)


def _prune_stored(tensor: ir.TensorProtocol, is_turned: bool, pattern: Pattern) -> Float2D:
    array = tensor.numpy()
    return prune_rows(np.asarray(array.T if is_turned else array, dtype=np.float32), pattern)
