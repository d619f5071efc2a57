"""Sets the smallest weights of every row to zero.

Honest about what it is good for: ONNX Runtime has no sparse kernel for these products, so nothing gets faster and no
memory is saved; only a compressed file gets smaller. Zeros survive a later symmetric quantization.

Paper:   Han et al., arXiv:1506.02626 (without retraining).
Axes:    N out features, K in features
"""

from __future__ import annotations

import collections
import fnmatch
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import Float2D, Linear, find_embeddings, find_linears, unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report


def prune_rows(w_NK: npt.NDArray[Any], sparsity: float) -> npt.NDArray[Any]:
    """A copy of `w_NK` in which the floor(sparsity K) smallest magnitudes of each row are zero.

    Per row, not per matrix: rows of small norm would otherwise vanish altogether.

    Laws: every row has at least that many zeros; what is kept is unchanged and no smaller than what is not; pruning
          twice is pruning once; permuting columns permutes the result (ties apart).
    """
    count = math.floor(sparsity * w_NK.shape[1] + 1e-9)
    pruned = w_NK.copy(order="C")
    if count:
        smallest = np.argpartition(np.abs(pruned), count - 1, axis=1)[:, :count]
        np.put_along_axis(pruned, smallest, 0, axis=1)
    return pruned


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pass):
    """Zeroes the smallest weights of every row of every linear; makes a compressed file smaller, nothing faster.

    The report's `bytes_saved_if_compressed` is what a bitmap and the remaining values would take less than the dense
    matrices; the model file itself stays as large as it is.
    """

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:1506.02626"

    sparsity: float = 0.5  # share of each row that becomes zero, in (0, 1)
    exclude: tuple[str, ...] = ()  # patterns of names that stay dense: "block0.*", "*.down", "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.sparsity < 1, "sparsity", "between 0 and 1", "0.5 zeroes half of the weights")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linears = find_linears(model, expand_pairs=True)
        tied = {id(one.head) for one in find_embeddings(model, linears) if one.head is not None}
        shared = collections.Counter(id(linear.weight) for linear in linears)
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(linear.name, pattern) for linear in linears):
                names = [linear.name for linear in linears[:3]]
                raise OptionError(f"magnitude: exclude={pattern!r} matches no linear", hint=f"names are like {names}")
        loss = norm = saved = 0.0
        zeros = weights = 0
        for linear in context.track(linears, "magnitude"):
            reason = self._refuse(linear, tied, shared)
            if reason is not None:
                report.skip(linear.name, reason)
                continue
            w_NK = linear.w_NK()
            pruned = prune_rows(w_NK, self.sparsity)
            difference = (w_NK - pruned).reshape(-1)
            site_loss = float(difference @ difference)
            if not math.isfinite(site_loss):
                report.skip(linear.name, "weights are not finite")
                continue
            if site_loss == 0:
                report.skip(linear.name, "already this sparse" if w_NK.shape[1] > 1 else "a row has one weight only")
                continue
            norm += float((w_NK.astype(np.float64) ** 2).sum())
            loss += site_loss
            site_zeros = int((pruned == 0).sum())
            zeros, weights = zeros + site_zeros, weights + pruned.size
            width = linear.nbytes / pruned.size
            saved += max(site_zeros * width - pruned.size / 8, 0)
            name = unique_name(model.graph, f"{linear.name}.pruned")
            linear.set_weight(_later(linear, self.sparsity), name)
            report.change(linear.name, kind=linear.kind, shape=list(w_NK.shape), sparsity=site_zeros / pruned.size)
        if report.changed:
            report.metrics |= {
                "sparsity": zeros / weights,
                "weight_error": math.sqrt(loss / norm) if norm else 0.0,
                "bytes_saved_if_compressed": saved,
            }
        return report

    def _refuse(self, linear: Linear, tied: set[int], shared: collections.Counter[int]) -> str | None:
        if any(fnmatch.fnmatchcase(linear.name, pattern) for pattern in self.exclude):
            return "excluded"
        if linear.is_quantized:
            return "quantized; prune before quantizing"
        if id(linear) in tied:
            return "shares its bytes with the embedding"
        if shared[id(linear.weight)] > 1:
            return "several linears share its weight"
        return None


def _later(linear: Linear, sparsity: float) -> functools.partial[Float2D]:
    """A function that prunes the weight `linear` has now: only the stored tensor is kept, not the result."""
    tensor = linear.weight.const_value
    assert tensor is not None
    transposed = linear.holder == "MatMul" or (linear.holder == "Gemm" and not _is_transposed_gemm(linear))
    return functools.partial(_prune_stored, tensor, transposed, sparsity)


def _prune_stored(tensor: ir.TensorProtocol, transposed: bool, sparsity: float) -> Float2D:
    array = tensor.numpy()
    return prune_rows(np.asarray(array.T if transposed else array, dtype=np.float32), sparsity)


def _is_transposed_gemm(linear: Linear) -> bool:
    attribute = linear.node.attributes.get("transB")
    return attribute is not None and attribute.as_int() == 1
