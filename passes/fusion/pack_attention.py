"""Joins the projections of queries, keys and values and the attention of an encoder into one operator, on the CPU.

MultiHeadAttention turns [B, S, H D] into heads itself, three times per layer, and biases are additions of their own.
com.microsoft.Attention multiplies with the columns of each head apart, adds the bias in that product and writes heads
where it needs them. Its kernel on the CPU knows float32 alone. Comes last, as all packing does: the matrix is no longer
one that other passes see; `unpack_attention` takes it apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import projections
from onnxpress.compiler.fusing import Fuser, constant, discard
from onnxpress.compiler.linears import MICROSOFT
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.projections import Projection
from onnxpress.passes.fusion._attention import PADDING, SCORE_BIAS, SHARED, attention_samples, keeps_a_cache


@dataclass(frozen=True, kw_only=True)
class PackAttention(Pass):
    """One operator for attention without a cache and the three float32 projections in front of it."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            if node.op_type != "MultiHeadAttention" or node.domain != MICROSOFT:
                continue
            site = node.name or node.outputs[0].name or "attention"
            if context.target.provider != "cpu":
                report.skip(site, "the operator pays on the CPU alone")
                continue
            if keeps_a_cache(node):
                report.skip(site, "attention has a cache or a bias of its own")
                continue
            parts = [projections.read_projection(value) for value in node.inputs[:3]]
            found = [one for one in parts if one is not None]
            reason = _obstacle(node, found)
            if reason is None:
                reason = _pack(fuser, site, node, found)
            if reason is not None:
                report.skip(site, reason)
        fuser.finish()
        return report


def _obstacle(node: ir.Node, found: Sequence[Projection]) -> str | None:
    """Why three projections and their attention cannot be one operator; None when they can."""
    if len(found) != 3:
        return "queries, keys or values do not come straight from a projection"
    if len({id(one.activation) for one in found}) != 1:
        return "the projections do not share their input"
    if any(one.node.op_type != "MatMul" for one in found):
        return "the projections are quantized"
    activation, types = found[0].activation, {one.dtype for part in found for one in part.weights}
    if types != {ir.DataType.FLOAT} or activation is None or activation.shape is None or len(activation.shape) != 3:
        return "not float32 [batch, sequence, width]"
    stored = [value for one in found for value in one.weights]  # biases are small, and often one vector of zeros
    if any(len(value.uses()) != 1 or value.is_graph_output() for value in stored):
        return "other nodes read a weight too: joined, it would be stored twice"
    for one in found:
        readers = [reader for reader in one.output.consumers() if reader is not node]
        is_as_wide = activation.shape[-1] == one.width
        if any(reader.op_type != "Shape" or not is_as_wide for reader in readers):
            return "other nodes read queries, keys or values too"
    return None


def _pack(fuser: Fuser, site: str, node: ir.Node, found: Sequence[Projection]) -> str | None:
    """Rewrites one attention; the reason why not, if it stays."""
    graph, activation, old = fuser.model.graph, found[0].activation, node.outputs[0]
    inputs = [*node.inputs, *[None] * 6][:6]
    padding, bias = inputs[PADDING], inputs[SCORE_BIAS]
    base = site.removesuffix("/attention")
    weight = projections.joined(graph, [one.weights[0] for one in found], f"{base}/qkv.weight", axis=1)
    biases = [np.zeros(one.width, np.float32) if one.bias is None else _array(one.bias) for one in found]
    added = constant(graph, np.concatenate(biases), f"{base}/qkv.bias")
    attributes = [node.attributes[name] for name in SHARED if name in node.attributes]
    widths = [one.width for one in found]
    if widths[2] != widths[0]:
        attributes.append(ir.AttrInt64s("qkv_hidden_sizes", widths))
    operands = [activation, weight, added, padding, None, bias]
    while operands[-1] is None:
        operands.pop()
    new = ir.Node(MICROSOFT, "Attention", operands, attributes, name=node.name)
    sampled = [activation, None, None, None, padding, bias]
    leaves = [value for value in sampled if value is not None]
    reason = fuser.verdict(leaves, [old], new.outputs, attention_samples(sampled, fuser.seed))
    if reason is not None:
        discard([new])
        return reason
    for one in found:
        for reader in list(one.output.consumers()):
            if reader.op_type == "Shape":
                reader.replace_input_with(0, activation)
    fuser.replace(site, [old], new.outputs, [new])
    return None


def _array(value: ir.Value) -> np.ndarray:
    tensor = value.const_value
    assert tensor is not None
    return tensor.numpy()
