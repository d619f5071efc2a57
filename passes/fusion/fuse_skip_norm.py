"""Fuses a residual addition with the norm behind it: Skip(Simplified)LayerNormalization.

The fused operator gives both the normalized sum (output 0) and the sum itself (output 3), which the next residual
addition reads. ONNX Runtime does not make this fusion at load for any form of RMSNorm that was tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, discard, producer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report

_FUSED = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


@dataclass(frozen=True, kw_only=True)
class FuseSkipNorm(Pass):
    """Residual addition and norm (RMSNorm or LayerNorm) in one operator."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for norm in list(model.graph):
            if norm.op_type not in _FUSED or norm.domain:
                continue
            add = producer(norm.inputs[0], "Add")
            if add is None:
                continue  # the first norm of a network has no addition before it
            site = norm.outputs[0].name or norm.name or "norm"
            left, right = add.inputs[0], add.inputs[1]
            if left is None or right is None or left.const_value is not None or right.const_value is not None:
                report.skip(site, "a constant is added, not a residual")
                continue
            # A norm over heads (rank 4) or over a stream of unknown rank has no fused form.
            if left.shape is None or right.shape is None or len(left.shape) != 3 or len(right.shape) != 3:
                report.skip(site, "the operands are not both of rank 3")
                continue
            left, right = (right, left) if 1 in list(left.shape) else (left, right)  # the first gives the shape
            if not _may_be_equal(left, right):
                report.skip(site, "the operands differ in size")
                continue
            if any(value.uses() for value in norm.outputs[1:]):
                report.skip(site, "mean or deviation are read")
                continue
            new = _build(norm, left, right)
            outputs = [norm.outputs[0], add.outputs[0]]
            reason = fuser.verdict([left, right], outputs, [new.outputs[0], new.outputs[3]])
            if reason is not None:
                discard([new])
                report.skip(site, reason)
                continue
            is_sum_read = len(add.outputs[0].uses()) > 1 or add.outputs[0].is_graph_output()
            if is_sum_read:
                fuser.replace(site, outputs, [new.outputs[0], new.outputs[3]], [new])
            else:
                discard([new])
                new = _build(norm, left, right, with_sum=False)
                fuser.replace(site, outputs[:1], [new.outputs[0]], [new])
        fuser.finish()
        return report


def _may_be_equal(one: ir.Value, two: ir.Value) -> bool:
    """Whether no size is known to differ; names that inference made up (unk__3) say nothing."""
    assert one.shape is not None
    assert two.shape is not None
    for left, right in zip(one.shape, two.shape, strict=True):
        names = [size if isinstance(size, int) else size.value for size in (left, right)]
        if all(name is not None and not str(name).startswith("unk__") for name in names) and names[0] != names[1]:
            return False
    return True


def _build(norm: ir.Node, left: ir.Value, right: ir.Value, with_sum: bool = True) -> ir.Node:
    epsilon = norm.attributes.get("epsilon")  # the fused operator's own default is 1e-12: always written
    operands = [left, right, *norm.inputs[1:]]
    new = ir.Node(
        "com.microsoft",
        _FUSED[norm.op_type],
        operands,
        [ir.AttrFloat32("epsilon", 1e-5 if epsilon is None else epsilon.as_float())],
        num_outputs=4 if with_sum else 1,
        name=f"{norm.outputs[0].name}/skip",
    )
    for output in new.outputs[1:3]:
        output.name = ""  # mean and inverse deviation are not computed for inference
    return new
