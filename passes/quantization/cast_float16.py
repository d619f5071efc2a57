"""Turns a float32 graph into a float16 one: weights, activations, caches, inputs and outputs.

What is computed from integers alone (rotary tables from positions, lengths and bias from the mask) stays in float32 and
is cast where it meets an activation: a cosine of position 8,000 in float16 would be noise. Norms keep summing in
float32 inside their kernels. Run it after fusion: an unfused norm would square in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.linears import drop_unused, unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report

LARGEST = float(np.finfo(np.float16).max)
# Operators that hand a weight on; with a weight as operand they belong to the weight.
_VIEWS = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze")


def to_float16(array: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """The nearest float16 numbers; finite ones beyond the range become the largest of their sign, not infinite.

    Laws: infinite and NaN stay as they are; |error| <= 2^-11 |x| for 6.2e-5 <= |x| <= 65504.
    """
    clipped = np.where(np.isfinite(array), np.clip(array, -LARGEST, LARGEST), array)
    return clipped.astype(np.float16)


@dataclass(frozen=True, kw_only=True)
class CastFloat16(Pass):
    """Float16 weights and activations, the form that CUDA kernels want."""

    promise: ClassVar[Promise] = Promise.LOSSY

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        graph = model.graph
        active = _active(graph)
        loss = norm = 0.0
        converted: dict[int, ir.Value] = {}
        for node in list(graph):
            if id(node) not in active:
                continue
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != ir.DataType.FLOAT:
                    continue
                source = value.producer()
                if value.is_initializer():
                    if id(value) not in converted:
                        converted[id(value)] = _convert(graph, value, report)
                        error, size = _rounding(value)
                        loss, norm = loss + error, norm + size
                    node.replace_input_with(index, converted[id(value)])
                elif source is not None and id(source) not in active:
                    if id(value) not in converted:
                        converted[id(value)] = _cast_after(graph, source, value)
                        report.change(f"cast {value.name}")
                    node.replace_input_with(index, converted[id(value)])
        for value in list(graph.initializers.values()):
            drop_unused(graph, value)
        for name in _retype(graph, active):
            report.change(name)
        if report.changed:
            report.metrics["weight_error"] = float(np.sqrt(loss / norm)) if norm else 0.0
        return report


def _active(graph: ir.Graph) -> set[int]:
    """Nodes that activations or weights flow through: everything behind a float input or an embedding table."""
    flowing = {id(value) for value in graph.inputs if value.dtype == ir.DataType.FLOAT}
    active: set[int] = set()
    for node in graph:
        first = node.inputs[0] if node.inputs else None
        is_table = node.op_type in ("Gather", "GatherBlockQuantized") and first is not None and _is_weight(node)
        is_view = node.op_type in _VIEWS and first is not None and first.is_initializer()
        is_view = is_view and first.dtype == ir.DataType.FLOAT and first.const_value is not None  # type: ignore[union-attr]
        if is_table or is_view or any(id(value) in flowing for value in node.inputs if value is not None):
            if node.op_type == "Shape":
                continue
            active.add(id(node))
            integer = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.UINT8)
            flowing |= {id(value) for value in node.outputs if value.dtype not in integer}
    return active


def _is_weight(node: ir.Node) -> bool:
    """Whether a gather reads a float table (or quantized codes with float scales)."""
    scales = node.inputs[2] if node.op_type == "GatherBlockQuantized" else node.inputs[0]
    return scales is not None and scales.dtype == ir.DataType.FLOAT and scales.is_initializer()


def _convert(graph: ir.Graph, value: ir.Value, report: Report) -> ir.Value:
    """A float16 twin of an initializer, converted when it is saved."""
    tensor = value.const_value
    assert tensor is not None
    name = unique_name(graph, f"{value.name}/float16")
    array = tensor.numpy()
    beyond = int(np.count_nonzero(np.isfinite(array) & (np.abs(array) > LARGEST)))
    if beyond and tensor.size > 1:
        report.skip(value.name or name, f"{beyond} numbers beyond +-65504 were cut off")

    def read() -> ir.Tensor[Any]:
        return ir.Tensor(to_float16(tensor.numpy()), dtype=ir.DataType.FLOAT16, name=name)

    lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT16, shape=tensor.shape, name=name)  # type: ignore[arg-type]
    twin = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16), const_value=lazy)
    graph.register_initializer(twin)
    report.change(value.name or name)
    return twin


def _rounding(value: ir.Value) -> tuple[float, float]:
    """Squared rounding error and squared norm of an initializer."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    finite = np.where(np.abs(array) <= LARGEST, array, np.float32(0))
    error = (finite - finite.astype(np.float16)).reshape(-1)
    flat = finite.reshape(-1)
    return float(error @ error), float(flat @ flat)


def _cast_after(graph: ir.Graph, source: ir.Node, value: ir.Value) -> ir.Value:
    """A float16 copy of a value that is computed in float32."""
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT16)], name=f"{value.name}/float16")
    cast.outputs[0].name = f"{value.name}/float16"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT16)
    graph.insert_after(source, cast)
    return cast.outputs[0]


def _retype(graph: ir.Graph, active: set[int]) -> list[str]:
    """Float16 for the inputs and for everything that active nodes give; casts to float32 among them follow."""
    changed = []
    half = ir.TensorType(ir.DataType.FLOAT16)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = half
            changed.append(f"input {value.name}")
    for node in graph:
        if id(node) not in active:
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = half
    return changed
