"""Takes the biases of keys and values out of attention: two additions fewer per layer, the same outputs.

Keys:    q (k + b)^T = q k^T + q b^T adds one number to all scores of a query, and a Softmax does not see it.
Values:  P (v + b) = P v + b, since the rows of P = softmax(...) sum to one: b W joins the bias behind W, the output
         projection.
Both hold under any mask, and for MultiHeadAttention without a cache alone: in a cache lie keys and values as they were,
keys may be rotated after the bias, and other operators have rows that sum to less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, constant, discard, other, producer, vector
from onnxpress.compiler.linears import MICROSOFT
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.passes.fusion._attention import attention_samples, keeps_a_cache


@dataclass(frozen=True, kw_only=True)
class FoldAttentionBias(Pass):
    """Biases of keys dropped and of values moved behind the output projection, where attention has no cache."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            if node.op_type != "MultiHeadAttention" or node.domain != MICROSOFT or len(node.inputs) < 3:
                continue
            keys, values = (_Biased.read(value) for value in node.inputs[1:3])
            if keys is None and values is None:
                continue
            site = node.name or node.outputs[0].name or "attention"
            if keeps_a_cache(node):
                report.skip(site, "attention has a cache or a bias of its own")
                continue
            target = _Output.behind(node) if values is not None else None
            if values is not None and target is None:
                report.skip(site, "no projection with a bias alone reads what attention gives: the values keep theirs")
                if keys is None:
                    continue
            reason = _fold(fuser, site, node, keys, values, target)
            if reason is not None:
                report.skip(site, reason)
        fuser.finish()
        return report


@dataclass
class _Biased:
    """x + bias, with `output` [B, S, N] read by attention and at most by nodes that ask for its size."""

    x: ir.Value
    bias: ir.Value
    output: ir.Value

    @staticmethod
    def read(value: ir.Value | None) -> _Biased | None:
        add = producer(value, "Add")
        if value is None or add is None or value.is_graph_output():
            return None
        bias = next((one for one in add.inputs if vector(one) is not None), None)
        x = other(add, bias)
        if bias is None or x is None or x.shape is None or value.shape is None:
            return None
        # A bias may widen what it is added to.
        is_same = len(x.shape) == len(value.shape) == 3 and x.shape[-1] == value.shape[-1] == vector(bias).size  # type: ignore[union-attr]
        readers = [node for node in value.consumers() if node.op_type != "Shape"]
        return _Biased(x, bias, value) if is_same and len(readers) == 1 else None


@dataclass
class _Output:
    """The output projection: a MatMul with a matrix [N, M], and the Add of a bias [M]."""

    product: ir.Node
    add: ir.Node
    bias: ir.Value

    @staticmethod
    def behind(attention: ir.Node) -> _Output | None:
        product = _only_reader(attention.outputs[0])
        if product is None or product.op_type != "MatMul" or product.inputs[0] is not attention.outputs[0]:
            return None
        weight = product.inputs[1]
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            return None
        add = _only_reader(product.outputs[0])
        bias = None if add is None or add.op_type != "Add" else other(add, product.outputs[0])
        held = vector(bias)
        if add is None or bias is None or held is None or held.size != weight.const_value.shape[1]:
            return None
        return _Output(product, add, bias)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def _fold(
    fuser: Fuser, site: str, node: ir.Node, keys: _Biased | None, values: _Biased | None, target: _Output | None
) -> str | None:
    """Rewrites one attention; the reason why not, if it stays."""
    inputs = list(node.inputs)
    if keys is not None:
        inputs[1] = keys.x
    if target is not None and values is not None:
        inputs[2] = values.x
    new = [ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), name=node.name)]
    old = node.outputs[0]
    if target is not None and values is not None:
        matrix, bias = target.product.inputs[1], target.bias
        assert matrix is not None and matrix.const_value is not None and bias.const_value is not None  # noqa: PT018
        moved = vector(values.bias).astype(np.float64) @ matrix.const_value.numpy()  # type: ignore[union-attr]
        held = bias.const_value.numpy()
        joined = constant(fuser.model.graph, (held + moved).astype(held.dtype), f"{bias.name}/with_values")
        new.append(ir.Node("", "MatMul", [new[0].outputs[0], matrix], name=target.product.name))
        new.append(ir.Node("", "Add", [new[1].outputs[0], joined], name=target.add.name))
        for one, before in zip(new, (node, target.product), strict=False):
            output = before.outputs[0]
            one.outputs[0].name, one.outputs[0].type, one.outputs[0].shape = (
                f"{output.name}/f",
                output.type,
                output.shape,
            )
        old = target.add.outputs[0]
    reason = fuser.verdict(
        [one for one in inputs if one is not None], [old], [new[-1].outputs[0]], attention_samples(inputs, fuser.seed)
    )
    if reason is not None:
        discard(new)
        return reason
    gone = {"keys": keys, "values": None if target is None else values}
    folded = {name: biased for name, biased in gone.items() if biased is not None}
    for biased in folded.values():
        for reader in list(biased.output.consumers()):
            if reader.op_type == "Shape":
                reader.replace_input_with(0, biased.x)
    fuser.replace(site, [old], [new[-1].outputs[0]], new, folded=list(folded))
    return None
