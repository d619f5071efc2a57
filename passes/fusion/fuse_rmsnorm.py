"""Fuses the square-mean-rsqrt chain of RMSNorm, or RMSNormalization of ai.onnx, into SimplifiedLayerNormalization.

Paper:   Zhang and Sennrich, arXiv:1910.07467, eq. (4): y = x / sqrt(mean(x^2) + eps) * gamma.
Anchor:  every spelling has one mean of squares over the last axis; what follows it is walked, not matched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, constant, discard, last_axis, other, producer, scalar, vector
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report


@dataclass(frozen=True, kw_only=True)
class FuseRmsnorm(Pass):
    """RMSNorm in one operator; each distinct form is checked by running both."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:1910.07467"

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            if node.op_type == "RMSNormalization":
                found: _Norm | None = _of_operator(node)
            else:
                found = _match(node) if node.op_type == "ReduceMean" else None
            if found is None:
                continue
            site = found.output.name or "rmsnorm"
            if found.reason:
                report.skip(site, found.reason)
                continue
            new = _build(model.graph, found)
            reason = fuser.verdict([found.x], [found.output], [new.outputs[0]])
            if reason is not None:
                discard([new])
                report.skip(site, reason)
                continue
            fuser.replace(site, [found.output], [new.outputs[0]], [new])
        fuser.finish()
        return report


@dataclass
class _Norm:
    x: ir.Value
    output: ir.Value
    epsilon: float = 0.0
    gamma: ir.Value | None = None
    reason: str = ""


def _match(mean: ir.Node) -> _Norm | None:
    """Reads an RMSNorm around its mean of squares, None when it is none."""
    square = producer(mean.inputs[0], "Pow", "Mul")
    if square is None or square.inputs[0] is None:
        return None
    x = square.inputs[0]
    squares = scalar(square.inputs[1]) == 2.0 if square.op_type == "Pow" else square.inputs[1] is x
    if not squares or not last_axis(mean, None if x.shape is None else len(x.shape)):
        return None
    found = _Norm(x, mean.outputs[0])
    value, epsilon = mean.outputs[0], None
    for _ in range(8):
        readers = value.consumers()
        if len(readers) != 1:
            return None
        node = readers[0]
        if node.op_type == "Add" and epsilon is None and (number := scalar(other(node, value))) is not None:
            epsilon = number
        elif node.op_type in ("Mul", "Div") and other(node, value) is x:
            found.output, found.epsilon = node.outputs[0], epsilon or 0.0
            return _with_gamma(found)
        elif node.op_type not in ("Sqrt", "Reciprocal", "Pow", "Cast", "Div"):
            return None
        value = node.outputs[0]
    return None


def _of_operator(node: ir.Node) -> _Norm | None:
    """Reads the operator of ai.onnx 23, whose siblings ours can be joined with additions by later passes."""
    x, axis, epsilon = node.inputs[0], node.attributes.get("axis"), node.attributes.get("epsilon")
    if x is None or node.domain not in ("", "ai.onnx"):
        return None
    found = _Norm(x, node.outputs[0], 1e-5 if epsilon is None else epsilon.as_float(), node.inputs[1])
    last = (-1,) if x.shape is None else (-1, len(x.shape) - 1)
    if axis is not None and axis.as_int() not in last:
        found.reason = "more than the last axis is normalized"
    return found


def _with_gamma(found: _Norm) -> _Norm:
    """Takes the multiplication with a weight vector in, where one follows."""
    readers = found.output.consumers()
    if len(readers) == 1 and readers[0].op_type == "Mul" and not found.output.is_graph_output():
        weight = other(readers[0], found.output)
        if vector(weight) is not None:
            found.gamma, found.output = weight, readers[0].outputs[0]
    width = found.x.shape[-1] if found.x.shape is not None else None
    if found.gamma is None and not isinstance(width, int):
        found.reason = "no weight, and the width is unknown"
    return found


def _build(graph: ir.Graph, found: _Norm) -> ir.Node:
    gamma = found.gamma
    if gamma is None:
        assert found.x.shape is not None
        width, dtype = int(found.x.shape[-1]), found.x.dtype or ir.DataType.FLOAT  # type: ignore[arg-type]
        gamma = constant(graph, np.ones(width, dtype.numpy()), f"ones_{dtype.name.lower()}_{width}")
    attributes: list[Any] = [
        ir.AttrInt64("axis", -1),
        ir.AttrFloat32("epsilon", found.epsilon),
        ir.AttrInt64("stash_type", 1),
    ]
    return ir.Node(
        "", "SimplifiedLayerNormalization", [found.x, gamma], attributes, name=f"{found.output.name}/rmsnorm"
    )
