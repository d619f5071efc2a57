"""Scales of coded matrices in a short form, for the file only: whole multiples of one unit per row.

MatMulNBits and GatherBlockQuantized want scales in the type of the activation, which for float32 is a fifth of a 4-bit
model. Scales that are whole multiples of a unit of their row take one byte each in the file, and are multiplied out by
two nodes (Cast, Mul) whose inputs are constant: ONNX Runtime computes them once, while it opens the session, and the
kernels then see what they always saw. Scales that float16 holds exactly take two bytes and a Cast. Both are exact.

Passes never see this: it is done as a graph is written, and undone as one is read.

A session has to fold constants for it, as it does unless all optimizations are disabled: at accuracy level 4 the CPU's
kernel packs scales with the weights, and silently takes scales that are not constant for 0 (ONNX Runtime 1.31.1).
Quantizers with `scale_bits=32` leave scales of 4-bit codes plain, unless float16 holds them.

Paper:   arXiv:2305.14314 (QLoRA, double quantization), with a unit per row and nothing lost after the codes were chosen
Axes:    N rows, G blocks of a row
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.linears import unique_name

Floats = npt.NDArray[Any]

STEPS = 127  # the largest multiple
_MANTISSA = 12  # bits of a unit: times a multiple it still is a float32
_SMALLEST = 1.6e-36  # largest scale of a row from which on its unit is a normal number
_READERS = {"MatMulNBits": 2, "GatherBlockQuantized": 2}  # and the slot of the scales


def unit_of(largest_N: Floats) -> Floats:
    """The smallest unit of which `STEPS` reach `largest_N`, and that times any of them is exact in float32."""
    safe = np.maximum(np.abs(largest_N), largest_N.dtype.type(_SMALLEST)) / largest_N.dtype.type(STEPS)
    mantissa, exponent = np.frexp(safe)
    unit: Floats = np.ldexp(np.ceil(mantissa * 2**_MANTISSA), exponent - _MANTISSA).astype(largest_N.dtype)
    return unit


def multiples(scale_GN: Floats, unit_N: Floats) -> Floats:
    """The nearest multiples of `unit_N` other than 0, in the type of the scales."""
    count = np.rint(scale_GN / unit_N)
    np.clip(count, -STEPS, STEPS, out=count)
    np.copyto(count, np.copysign(1, scale_GN), where=count == 0)
    result: Floats = count * unit_N
    return result


def split(scale_NG: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]] | None:
    """(multiples int8 [N, G], unit float32 [N, 1]) of which `scale_NG` is exactly the product; None if there are none.

    Args:
        scale_NG: float32.
    """
    if scale_NG.dtype != np.float32 or scale_NG.ndim != 2 or not np.isfinite(scale_NG).all():
        return None
    # As whole numbers below 2^24, to which a row of float32 multiples can always be scaled.
    _, exponent = np.frexp(np.abs(scale_NG).max(axis=1, initial=0, keepdims=True))
    whole = np.ldexp(scale_NG, 24 - exponent)
    if not np.array_equal(whole, np.rint(whole)):
        return None
    counts = whole.astype(np.int64)
    divisor = np.maximum(np.gcd.reduce(counts, axis=1, keepdims=True), 1)
    counts //= divisor
    if np.abs(counts).max(initial=0) > STEPS:
        return None
    unit = np.ldexp(divisor.astype(np.float32), exponent - 24)
    steps = counts.astype(np.int8)
    return (steps, unit) if np.array_equal(steps * unit, scale_NG) else None


def short_form(scale: Floats) -> tuple[npt.NDArray[Any], ...] | None:
    """The arrays that take least in a file: multiples and unit, or float16; None where nothing is smaller and exact."""
    found: tuple[npt.NDArray[Any], ...] | None = split(scale)
    if found is not None and 2 * _nbytes(found) < scale.nbytes:
        return found
    if scale.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
        if np.array_equal(half.astype(np.float32), scale):
            return (half,)
    return found if found is not None and _nbytes(found) < scale.nbytes else None


def stored_nbytes(scale: Floats) -> int:
    """Bytes that scales take in a file."""
    found = short_form(scale)
    return scale.nbytes if found is None else _nbytes(found)


def _nbytes(arrays: tuple[npt.NDArray[Any], ...]) -> int:
    return sum(one.nbytes for one in arrays)


@contextmanager
def shortened(model: ir.Model, threshold: int) -> Iterator[int]:
    """The graph with its scales in the short form, for as long as the block runs.

    Args:
        model: changed on entry, as it was on exit.
        threshold: bytes up to which scales stay as they are.

    Yields:
        The bytes that were saved.
    """
    graph = model.graph
    undo: list[tuple[ir.Value, list[ir.Node], list[ir.Value], str]] = []
    try:
        yield _shorten(graph, threshold, undo)
    finally:
        for value, nodes, parts, name in undo:
            _restore(graph, value, nodes, parts, name)


def _shorten(graph: ir.Graph, threshold: int, undo: list[tuple[ir.Value, list[ir.Node], list[ir.Value], str]]) -> int:
    """Puts the short forms in; what was changed is noted in `undo` at once."""
    saved = 0
    for value in list(dict.fromkeys(_scales(graph))):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= threshold or not _is_only_scale(value):
            continue
        found = short_form(tensor.numpy())
        if found is None:
            continue
        name = value.name
        assert name is not None
        parts = [
            _initializer(graph, f"{name}.{what}", one) for what, one in zip(("short", "unit"), found, strict=False)
        ]
        nodes = [ir.node("Cast", [parts[0]], {"to": int(tensor.dtype)}, name=f"{name}/cast")]
        if len(parts) > 1:
            nodes[0].outputs[0].name = f"{name}/multiples"
            nodes.append(ir.node("Mul", [nodes[0].outputs[0], parts[1]], name=f"{name}/scale"))
        for node in nodes:
            node.outputs[0].shape, node.outputs[0].dtype = value.shape, tensor.dtype
        graph.initializers.pop(name)
        value.name = None
        nodes[-1].outputs[0].name = name
        value.replace_all_uses_with(nodes[-1].outputs[0])
        graph.insert_before(graph[0], nodes)
        saved += tensor.nbytes - _nbytes(found)
        undo.append((value, nodes, parts, name))
    return saved


def restore(model: ir.Model) -> None:
    """Undoes `shortened` in a graph that was read from a file: scales are plain initializers again."""
    graph = model.graph
    for value in list(dict.fromkeys(_scales(graph))):
        last = value.producer()
        if last is None or value.const_value is not None or not _is_only_scale(value):
            continue
        first = last.inputs[0].producer() if last.op_type == "Mul" and last.inputs[0] is not None else last
        if first is None or first.op_type != "Cast" or first.domain or last.domain:
            continue
        nodes = [first] if first is last else [first, last]
        parts = [first.inputs[0], *([] if first is last else [last.inputs[1]])]
        arrays = [one.const_value.numpy() for one in parts if one is not None and one.const_value is not None]
        to = first.attributes.get("to")
        if len(arrays) < len(parts) or to is None or (first is not last and len(first.outputs[0].uses()) > 1):
            continue
        array = arrays[0].astype(ir.DataType(to.as_int()).numpy())
        if len(arrays) > 1:
            array = array * arrays[1]
        name = value.name
        assert name is not None
        tensor = ir.Tensor(array, name=name)
        plain = ir.Value(shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        _restore(graph, plain, nodes, [one for one in parts if one is not None], name)


def _scales(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        slot = _READERS.get(node.op_type)
        if slot is not None and len(node.inputs) > slot and (value := node.inputs[slot]) is not None:
            yield value


def _is_only_scale(value: ir.Value) -> bool:
    return not (value.is_graph_output() or value.is_graph_input()) and all(
        _READERS.get(node.op_type) == slot for node, slot in value.uses()
    )


def _initializer(graph: ir.Graph, base: str, array: npt.NDArray[Any]) -> ir.Value:
    name = unique_name(graph, base)
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _restore(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node], parts: list[ir.Value], name: str) -> None:
    made = nodes[-1].outputs[0]
    made.name = None
    value.name = name
    made.replace_all_uses_with(value)
    graph.remove(nodes[::-1], safe=True)
    for part in parts:
        if part.name is not None and part.name in graph.initializers and not part.uses():
            del graph.initializers[part.name]
    graph.register_initializer(value)
