"""Takes com.microsoft.Attention apart: a product each for queries, keys and values, and MultiHeadAttention.

ONNX Runtime's own optimizer makes these operators of encoders, and so does `pack_attention`. Their matrix is an input
of attention rather than of a product, so no quantization sees it; apart, the parts are linears like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, discard
from onnxpress.compiler.linears import MICROSOFT, derived
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.projections import unused_name
from onnxpress.passes.fusion._attention import PADDING, SCORE_BIAS, SHARED, attention_samples, rank

_MASK, _PAST = 3, 4  # inputs of Attention


@dataclass(frozen=True, kw_only=True)
class UnpackAttention(Pass):
    """Three projections and a MultiHeadAttention for each Attention of an encoder."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            if node.op_type != "Attention" or node.domain != MICROSOFT:
                continue
            site = node.name or node.outputs[0].name or "attention"
            reason = _obstacle(node)
            if reason is None:
                reason = _unpack(fuser, site, node)
            if reason is not None:
                report.skip(site, reason)
        fuser.finish()
        return report


def _obstacle(node: ir.Node) -> str | None:
    """Why the operator stays whole; None when it can be taken apart."""
    inputs = [*node.inputs, *[None] * 7][:7]
    present = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if inputs[_PAST] is not None or inputs[6] is not None or present:
        return "attention has a cache"
    rotary = node.attributes.get("do_rotary")
    if rotary is not None and rotary.as_int():
        return "the operator rotates queries and keys"
    weight, bias, mask = inputs[1], inputs[2], inputs[_MASK]
    if bias is None:
        return "the operator has no bias: ONNX Runtime's kernel ends the process then, so nothing can be tried"
    if weight is None or weight.const_value is None or bias.const_value is None:
        return "the weight is no constant"
    if any(value is not None and (len(value.uses()) != 1 or value.is_graph_output()) for value in (weight, bias)):
        return "other nodes read the packed weight too"
    if mask is not None and mask.shape is not None and mask.shape[-1] == 1:
        return "the mask has one column, which MultiHeadAttention does not take"
    if mask is not None and rank(mask) != 2:
        is_count = mask.producer() is not None and mask.producer().op_type == "ReduceSum"  # type: ignore[union-attr]
        return None if rank(mask) == 1 and is_count else "the mask is none of padding"
    return None


def _widths(node: ir.Node, total: int) -> list[int]:
    """Columns of queries, keys and values."""
    sizes = node.attributes.get("qkv_hidden_sizes")
    return [total // 3] * 3 if sizes is None else list(sizes.as_ints())


def _unpack(fuser: Fuser, site: str, node: ir.Node) -> str | None:
    """Rewrites one attention; the reason why not, if it stays."""
    graph, old = fuser.model.graph, node.outputs[0]
    x, weight, bias, mask, _, scores = [*node.inputs, *[None] * 6][:6]
    assert weight is not None
    assert weight.const_value is not None
    assert bias is not None
    assert bias.const_value is not None
    rows, total = (int(size) for size in weight.const_value.shape.numpy())
    made: list[ir.Node] = []
    parts: list[ir.Value | None] = []
    first = 0
    for kind, width in zip("qkv", _widths(node, total), strict=True):
        columns = slice(first, first + width)
        first += width
        name = unused_name(graph, f"{site}/{kind}")
        matrix = _part(graph, weight.const_value, f"{name}.weight", [rows, width], columns)
        steps = [ir.Node("", "MatMul", [x, matrix], name=name)]
        if bias.const_value.numpy()[columns].any():
            added = _part(graph, bias.const_value, f"{name}.bias", [width], columns)
            steps.append(ir.Node("", "Add", [steps[0].outputs[0], added], name=f"{name}/bias"))
        for step in steps:
            step.outputs[0].name, step.outputs[0].type = f"{step.name}.out", old.type
            leading = [None, None] if old.shape is None else list(old.shape)[:2]
            step.outputs[0].shape = ir.Shape([*leading, width])
        made += steps
        parts.append(steps[-1].outputs[0])
    operands = [*parts, None, mask, scores]
    while operands[-1] is None:
        operands.pop()
    attributes = [node.attributes[name] for name in SHARED if name in node.attributes]
    made.append(ir.Node(MICROSOFT, "MultiHeadAttention", operands, attributes, name=node.name))
    sampled: list[ir.Value | None] = [x, None, None, None, None, None]
    sampled[PADDING], sampled[SCORE_BIAS] = mask, scores
    leaves = [value for value in sampled if value is not None]
    reason = fuser.verdict(leaves, [old], made[-1].outputs, attention_samples(sampled, fuser.seed))
    if reason is not None:
        discard(made)
        return reason
    fuser.replace(site, [old], made[-1].outputs, made)
    return None


def _part(graph: ir.Graph, tensor: ir.TensorProtocol, name: str, sizes: Sequence[int], columns: slice) -> ir.Value:
    return derived(graph, tensor, name, sizes, lambda whole: whole[..., columns])
