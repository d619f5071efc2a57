"""Joins the two projections of a gated feed-forward layer into one matrix, followed by a Split.

y = f(x W) * (x V): one product of width 2 I instead of two quantizes the activation once and wakes the threads once.
Measured on the CPU with 4-bit weights in blocks of 64, decoding gains 6 % and a prompt nothing; the Split costs less
than it brings. Which operand is activated makes no difference: both read x, and the product stays as it is.

Paper:   Shazeer, arXiv:2002.05202 (gated linear units).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import projections
from onnxpress.compiler.fusing import Fuser, constant, producer
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.projections import Projection

_SPLIT_OPSET = 13
_STEPS = 12  # operators an activation function may consist of


@dataclass(frozen=True, kw_only=True)
class PackGateUp(Pass):
    """One projection for gate and up."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:2002.05202"

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            if node.op_type != "Mul":
                continue
            site = node.name or node.outputs[0].name or "gated product"
            found = _gated(node)
            if found is None:
                if _looks_gated(node):
                    report.skip(site, "gate or up is read elsewhere too, or held in a way that cannot be joined")
                continue
            if model.opset_imports.get("", 18) < _SPLIT_OPSET:
                report.skip(site, f"Split takes sizes as an input from opset {_SPLIT_OPSET} on")
                continue
            gate, up = found
            reason = projections.obstacle(found)
            if reason is not None:
                report.skip(site, reason)
                continue
            _pack(fuser, site, gate, up)
        fuser.finish()
        return report


def _gated(node: ir.Node) -> tuple[Projection, Projection] | None:
    """(gate, up) when the operands are a projection of x and a function of another projection of x."""
    for place in (0, 1):
        value = node.inputs[place]
        up = projections.read_projection(value) if value is not None and len(value.uses()) == 1 else None
        if up is None:
            continue
        gate = _behind_activation(node.inputs[1 - place])
        if gate is not None and gate.activation is up.activation:
            return gate, up
    return None


def _looks_gated(node: ir.Node) -> bool:
    """Whether two products with the same activation meet in `node`, one of them through a function."""
    for place in (0, 1):
        up = projections.find_product(node.inputs[place])
        queue, seen = [node.inputs[1 - place]], 0
        while up is not None and queue and seen < _STEPS:
            value, seen = queue.pop(), seen + 1
            gate = projections.find_product(value)
            if gate is not None:
                if gate is not up and gate.inputs[0] is up.inputs[0] and _holds_matrix(gate) and _holds_matrix(up):
                    return True
                continue
            queue += () if producer(value) is None else producer(value).inputs  # type: ignore[union-attr]
    return False


def _holds_matrix(node: ir.Node) -> bool:
    """Whether the second operand is a weight, at most transposed."""
    value = node.inputs[1]
    turned = producer(value, "Transpose")
    source = value if turned is None else turned.inputs[0]
    return source is not None and source.const_value is not None


def _behind_activation(value: ir.Value | None) -> Projection | None:
    """The only projection that `value` is computed from, through operators that have no other variable input."""
    found: dict[int, Projection] = {}
    queue, seen = [value], set()
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen or current.const_value is not None:
            continue
        seen.add(id(current))
        projection = projections.read_projection(current)
        if projection is not None:
            found[id(current)] = projection
            continue
        node = producer(current)
        if node is None or len(seen) > _STEPS:
            return None
        queue += node.inputs
    return next(iter(found.values())) if len(found) == 1 else None


def _pack(fuser: Fuser, site: str, gate: Projection, up: Projection) -> None:
    graph = fuser.model.graph
    parts = (gate, up)
    widths = [one.width for one in parts]
    path = gate.node.name or site
    packed = projections.pack(fuser, parts, f"{path.rpartition('/')[0] or path}/gate_up")
    sizes = constant(graph, np.array(widths, np.int64), "split/" + "x".join(map(str, widths)))
    split = ir.Node(
        "", "Split", [packed, sizes], [ir.AttrInt64("axis", -1)], num_outputs=2, name=f"{packed.name}.split"
    )
    outputs = [one.output for one in parts]
    fuser.replace(site, outputs, list(split.outputs), [split], widths=widths)
    for one in parts:
        projections.drop(graph, one)
