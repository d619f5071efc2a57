"""Lets a runtime ask for the logits of the last positions only, so that a prompt does not pay for those nobody reads.

The head reads `Slice(hidden, -logits_to_keep)`. The count is a weight with a default that keeps everything: a program
that knows nothing of it gets what it got before, and one that feeds it (our runtime does) saves the head's product for
all other positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.nbits import add_initializer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report

COUNT = "logits_to_keep"
_ALL = 2**31 - 1
# What may stand between the head and the logits: operators that treat every position alike.
_POINTWISE = ("Add", "Mul", "Div", "Tanh", "Cast")


@dataclass(frozen=True, kw_only=True)
class TrimLogits(Pass):
    """Adds the overridable weight `logits_to_keep` (int64 [1]) in front of a decoder's head."""

    promise: ClassVar[Promise] = Promise.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        graph = model.graph
        if not any((value.name or "").startswith("past_key_values") for value in graph.inputs):
            return report  # no decoder: it gives all its outputs at once, and all of them are read
        heads = [one for one in find_linears(model) if one.kind == "head"]
        if len(heads) != 1:
            report.skip("head", f"expected one head that makes the logits, found {len(heads)}")
            return report
        head = heads[0]
        reason = _reason_against(graph, head)
        if reason is not None:
            report.skip(head.name, reason)
            return report
        keep = add_initializer(graph, COUNT, np.array([_ALL], np.int64))
        graph.inputs.append(keep)
        ends = add_initializer(graph, f"{COUNT}.ends", np.array([2**62], np.int64))
        axes = add_initializer(graph, f"{COUNT}.axes", np.array([1], np.int64))
        starts = ir.node("Neg", [keep], name=f"{COUNT}/starts")
        hidden = head.node.inputs[0]
        assert hidden is not None
        assert hidden.shape is not None
        cut = ir.node("Slice", [hidden, starts.outputs[0], ends, axes], name=f"{COUNT}/slice")
        starts.outputs[0].name, starts.outputs[0].shape = f"{COUNT}/starts", ir.Shape([1])
        starts.outputs[0].dtype = ir.DataType.INT64
        cut.outputs[0].name, cut.outputs[0].type = f"{COUNT}/hidden", hidden.type
        cut.outputs[0].shape = _kept(hidden.shape)
        graph.insert_before(head.node, [starts, cut])
        head.node.replace_input_with(0, cut.outputs[0])
        value = head.node.outputs[0]
        while True:
            if value.shape is not None:
                value.shape = _kept(value.shape)
            if value.is_graph_output():
                break
            value = value.consumers()[0].outputs[0]
        report.change(head.name, input=COUNT)
        return report


def _reason_against(graph: ir.Graph, head: Linear) -> str | None:
    """Why the rows of the head may not be cut, None when they may."""
    if COUNT in graph.initializers or any(value.name == COUNT for value in graph.inputs):
        return f"the graph has {COUNT} already"
    hidden = head.node.inputs[0]
    if hidden is None or hidden.shape is None or len(hidden.shape) != 3:
        return "the input of the head is not known to be [batch, positions, width]"
    value = head.node.outputs[0]
    while not value.is_graph_output():
        readers = value.consumers()
        if len(readers) != 1 or readers[0].op_type not in _POINTWISE:
            return "the head's product is not the logits: other operators read it"
        others = [one for one in readers[0].inputs if one is not None and one is not value]
        if any(one.const_value is None or len(one.const_value.shape) > 1 for one in others):
            return "the logits are mixed with something that has positions"
        value = readers[0].outputs[0]
    return "the head's product has other readers" if value.uses() else None


def _kept(shape: ir.Shape) -> ir.Shape:
    return ir.Shape([shape[0], "kept_positions", *list(shape)[2:]])
