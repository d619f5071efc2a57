"""Fuses a residual addition with the norm behind it: Skip(Simplified)LayerNormalization.

The fused operator gives both the normalized sum (output 0) and the sum itself (output 3), which the next residual
addition reads. ONNX Runtime does not make this fusion at load for any form of RMSNorm that was tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, discard, producer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import NotCuttable

_FUSED = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
_FAR = 1000  # values between a residual and what is added to it; a block of an unfused export has some 200


@dataclass(frozen=True, kw_only=True)
class FuseSkipNorm(Pass):
    """Residual addition and norm (RMSNorm or LayerNorm) in one operator, or in the two that are faster."""

    promise: ClassVar[Promise] = Promise.CLOSE

    # What becomes of a residual with a LayerNorm: "skip" is one operator, "sum" two, which take a third of its time on
    # the CPU. They are written so that ONNX Runtime does not make the slow operator of them when it loads.
    layer_norm: Literal["skip", "sum"] = "skip"

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
            if norm.op_type == "LayerNormalization" and self.layer_norm == "sum":
                nodes, operands = _apart(left, right, f"{norm.outputs[0].name}/residual")
                reason = fuser.verdict(operands, [add.outputs[0]], nodes[-1].outputs)
                if reason is not None:
                    discard(nodes)
                    report.skip(site, reason)
                    continue
                fuser.replace(site, [add.outputs[0]], nodes[-1].outputs, nodes)
                continue
            try:
                left, right = _in_order(left, right)
            except NotCuttable as reason_to_stay:
                report.skip(site, str(reason_to_stay))
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


def _apart(left: ir.Value, right: ir.Value, name: str) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that add the residual in a form which stays beside a norm, and the operands they begin with.

    ONNX Runtime fuses a norm with an addition of two tensors, not with that of a bias. So the residual is added first
    and the bias of the projection after it. Without a bias the addition is a Sum, which runs in one thread.
    """
    for branch, stream in ((right, left), (left, right)):
        add = producer(branch, "Add")
        if add is None or len(branch.uses()) != 1 or branch.is_graph_output():
            continue
        for product, bias in (add.inputs, add.inputs[::-1]):
            if product is None or bias is None or bias.const_value is None:
                continue
            if len(bias.shape or ()) != 1 or product.shape != branch.shape:
                continue
            first = ir.Node("", "Add", [product, stream], name=name)
            first.outputs[0].name = f"{name}/before_bias"
            first.outputs[0].shape, first.outputs[0].type = branch.shape, branch.type
            return [first, ir.Node("", "Add", [first.outputs[0], bias], name=f"{name}/bias")], [product, stream]
    return [ir.Node("", "Sum", [left, right], name=name)], [left, right]


def _in_order(left: ir.Value, right: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The operand that has the shape of the sum, and the other: the kernel gives its result the shape of the first.

    Names that shape inference made up (unk__3) are as good as others when equal: it gives none of them twice. Different
    ones may stand for one size, or for a size and a 1: then the operand that the other is computed from is the stream.

    Raises:
        NotCuttable: the sizes differ, or nobody knows.
    """
    assert left.shape is not None
    assert right.shape is not None
    first: set[int] = set()
    for sizes in zip(left.shape, right.shape, strict=True):
        one, two = (size if isinstance(size, int) else size.value for size in sizes)
        if one == two and one is not None:
            continue
        known = [size is not None and not str(size).startswith("unk__") for size in (one, two)]
        if all(known):
            raise NotCuttable("the operands differ in size")
        if any(known):
            first.add(known.index(1 not in (one, two)))  # beside a 1 the unknown size is that of the sum
        else:
            first.add(0 if _is_computed_from(right, left) else 1 if _is_computed_from(left, right) else 2)
    if len(first) > 1 or 2 in first:
        raise NotCuttable("it is unknown which operand has the size of the sum")
    return (right, left) if first == {1} else (left, right)


def _is_computed_from(value: ir.Value, source: ir.Value) -> bool:
    """Whether `source`, or the norm that was fused with it, is found above `value`, not too far up."""
    fused = producer(source, *_FUSED.values())
    queue, seen = [value], {value}
    for one in queue:  # grows
        node = one.producer() if len(seen) < _FAR else None
        if node is None:
            continue
        if source in node.inputs or node is fused:
            return True
        above = [each for each in node.inputs if each is not None and each not in seen]
        seen.update(above)
        queue += above
    return False


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
