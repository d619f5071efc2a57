"""Sets the smallest weights to zero. Saves bytes only when the file is compressed, and never time.

ONNX Runtime has no sparse product for a sparse weight: zeros are stored and multiplied like other numbers (kept as
sparse tensors they are made dense at load). The pass says so, and is the baseline of better criteria.

Paper:   Han et al., arXiv:1506.02626 (magnitude as the criterion; one threshold a row, no retraining).
Axes:    N out features, K in features
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.linears import Linear, find_embeddings, find_linears, unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report


def keep_largest(w_NK: npt.NDArray[Any], sparsity: float) -> npt.NDArray[Any]:
    """w with the floor(sparsity K) smallest magnitudes of every row set to zero.

    Args:
        w_NK: weight. Not changed.
        sparsity: share of each row to remove, in [0, 1).
    Laws:   what is kept is unchanged; no kept magnitude is below a removed one of its row; a second run changes
            nothing.
    Cost:   O(N K).
    """
    count = int(sparsity * w_NK.shape[1])
    if count == 0:
        return w_NK.copy()
    order = np.argpartition(np.abs(w_NK), count - 1, axis=1)
    pruned = w_NK.copy()
    np.put_along_axis(pruned, order[:, :count], 0, axis=1)
    return pruned


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pass):
    """Zeroes the smallest weights of every row; the model becomes compressible, not faster."""

    promise: ClassVar[Promise] = Promise.LOSSY
    paper: ClassVar[str] = "arXiv:1506.02626"

    sparsity: float = 0.5  # share of each row that becomes zero

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.sparsity < 1, "sparsity", "between 0 and 1", "0.5 zeroes half of the weights")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linears = find_linears(model, expand_pairs=True)
        tied = {id(one.head.node) for one in find_embeddings(model, linears) if one.head is not None}
        lost = total = 0.0
        zeros = count = 0
        for linear in context.track(linears, "magnitude"):
            if linear.is_quantized:
                report.skip(linear.name, "is quantized already: prune before")
            elif id(linear.node) in tied:
                report.skip(linear.name, "shares its bytes with the embedding")
            else:
                w_NK = linear.w_NK()
                pruned = keep_largest(w_NK, self.sparsity)
                if np.array_equal(w_NK, pruned):
                    report.skip(linear.name, "has that many zeros already")
                    continue
                error = float(np.sum((w_NK - pruned) ** 2, dtype=np.float64))
                norm = float(np.sum(w_NK**2, dtype=np.float64))
                zeros, count = zeros + int(np.count_nonzero(pruned == 0)), count + pruned.size
                lost, total = lost + error, total + norm
                relative = math.sqrt(error / norm) if norm else 0.0
                report.change(linear.name, kind=linear.kind, weight_error=relative)
                _set(model.graph, linear, self.sparsity)
        if count:
            report.metrics["weight_error"] = math.sqrt(lost / total) if total else 0.0
            report.metrics["sparsity"] = zeros / count
            # One bit says whether a weight is there; a general compressor comes near to it.
            report.metrics["bytes_saved_if_compressed"] = 4 * zeros - count / 8
            report.metrics["bytes_saved_as_stored"] = 0
        return report


def _set(graph: ir.Graph, linear: Linear, sparsity: float) -> None:
    """Prunes lazily: the weight is read, pruned and written one at a time when the model is saved."""
    source = replace(linear)

    def make() -> npt.NDArray[np.float32]:
        return np.asarray(keep_largest(source.w_NK(), sparsity), dtype=np.float32)

    linear.set_weight(make, unique_name(graph, f"{linear.name}/pruned"))
