"""Where a graph has one row for each token: tables that are gathered, the head, and what its logits pass through.

Everything is found, and refused, before anything is changed. Codes, scales and zero points of a row are taken over as
they are, so what is left computes what it did.

Axes: V tokens, H width of the stream
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import formats, packing
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.linears import Linear, drop_unused, find_linears, unique_name

Ids = npt.NDArray[np.int64]

# Operators that treat every logit alike; a vector of V numbers among their inputs is cut too.
_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Where", "Clip", "Tanh", "Sigmoid", "Neg", "Exp", "Log"),
    *("Cast", "CastLike", "Identity", "Softmax", "LogSoftmax"),
)
_PASSES_IDS_ON = ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten")
_ASKS_SHAPE = ("Shape", "Size")
_TURNED = ("MatMul", "DynamicQuantizeMatMul", formats.QDQ)  # whose columns are the out features


@dataclass
class Places:
    """All that has one entry for each token.

    Attributes:
        num_rows: V.
        gathers: nodes that look tokens up.
        heads: linears whose out features are tokens; several are added up.
        compared: (Equal node, slot of its constant): token ids that the graph itself knows, of padding as a rule.
        weights: initializers to cut, by id, with the axis: 0 for rows, which may be flattened, -1 for columns.
        logits: values with V numbers along their last axis.
        views: Reshape nodes through which a gather reads the bytes of the head.
        turned: Transpose and DequantizeLinear nodes between a weight and its head.
        classes: width of logits that are not of tokens, 0 without.
    """

    num_rows: int = 0
    gathers: list[ir.Node] = field(default_factory=list)
    heads: list[Linear] = field(default_factory=list)
    compared: list[tuple[ir.Node, int]] = field(default_factory=list)
    weights: dict[int, tuple[ir.Value, int]] = field(default_factory=dict)
    logits: list[ir.Value] = field(default_factory=list)
    views: list[ir.Node] = field(default_factory=list)
    turned: list[ir.Node] = field(default_factory=list)
    classes: int = 0

    def named_ids(self) -> set[int]:
        """Token ids that the graph compares its input with."""
        return {int(one) for node, slot in self.compared for one in _constant(node.inputs[slot]).ravel()}


def find_places(model: ir.Model) -> Places:
    """What has to be cut when tokens go.

    Raises:
        UnsupportedModelError: something in the graph has a use for tokens that this cannot follow.
    """
    graph = model.graph
    places = Places()
    _follow_ids(graph, places)
    if not places.gathers:
        raise UnsupportedModelError(
            "the graph looks no token up in a table of its own", hint="prune the model that has the embedding"
        )
    for node in places.gathers:
        _add_gather(node, places)
    _find_heads(model, places)
    _check_readers(places)
    return places


def cut(model: ir.Model, places: Places, ids_V: Ids, new: dict[int, int]) -> None:
    """Leaves the tokens `ids_V` (old ids) alone, in that order; weights are taken when the model is saved."""
    count = len(ids_V)
    for value, axis in places.weights.values():
        _cut_weight(value, axis, ids_V, places.num_rows)
    for linear in places.heads:
        if "N" in linear.node.attributes:
            linear.node.attributes["N"] = ir.AttrInt64("N", count)
    for node in places.views:
        _resize_view(model.graph, node, count)
    for node in places.turned:
        _resize(node.outputs[0], count, places.num_rows)
    for value in places.logits:
        _resize(value, count, places.num_rows)
    for node, slot in places.compared:
        old = _constant(node.inputs[slot])
        # A number that is no token, -100 for one, stays one.
        ids = [new.get(int(one), min(int(one), -1)) for one in old.ravel()]
        renumbered = np.array(ids, old.dtype).reshape(old.shape)
        node.replace_input_with(slot, _initializer(model.graph, "token_id", renumbered))


def _follow_ids(graph: ir.Graph, places: Places) -> None:
    """Finds every reader of token ids."""
    open_values = [value for value in graph.inputs if "input_ids" in (value.name or "")]
    while open_values:
        value = open_values.pop()
        for node, slot in value.uses():
            if node.op_type in ("Gather", "GatherBlockQuantized") and slot == 1:
                places.gathers.append(node)
            elif node.op_type in _PASSES_IDS_ON and slot == 0 and node.graph is graph:
                open_values.append(node.outputs[0])
            elif node.op_type == "Equal" and _is_constant(node.inputs[1 - slot]):
                places.compared.append((node, 1 - slot))
            elif node.op_type not in _ASKS_SHAPE:
                raise _unknown(node, "reads token ids")


def _add_gather(node: ir.Node, places: Places) -> None:
    axis = node.attributes.get("gather_axis" if node.op_type == "GatherBlockQuantized" else "axis")
    table = node.inputs[0]
    view = table.producer() if table is not None and table.const_value is None else None
    if view is not None and view.op_type == "Reshape":
        table = view.inputs[0]
        places.views.append(view)
    if table is None or not table.is_initializer() or table.const_value is None or (axis and axis.as_int() != 0):
        raise _unknown(node, "looks tokens up in something else than rows of a constant table")
    num_rows = packing.gather_shape(node)[0] if view is not None else int(table.const_value.shape[0])  # type: ignore[arg-type]
    if places.num_rows not in (0, num_rows):
        raise UnsupportedModelError(f"tables of {places.num_rows} and of {num_rows} tokens are looked up by one input")
    places.num_rows = num_rows
    for value in (table, *node.inputs[2:]):
        _add_weight(value, 0, places)


def _find_heads(model: ir.Model, places: Places) -> None:
    linears = {id(one.output): one for one in find_linears(model, expand_pairs=True)}
    has_head = any(one.num_out == places.num_rows for one in linears.values())
    for value in model.graph.outputs:
        width = value.shape[-1] if value.shape is not None and len(value.shape) else None
        if value.name == "logits" and isinstance(width, int) and width != places.num_rows:
            if width > max(1000, places.num_rows // 2):
                raise UnsupportedModelError(f"the head has {width} outputs, the table {places.num_rows} rows")
            places.classes = width
        elif width == places.num_rows or (value.name == "logits" and has_head and not isinstance(width, int)):
            _follow_logits(value, linears, places)
        elif value.name == "logits":
            raise UnsupportedModelError(
                "logits have an unknown number of entries, and no head makes one for each token"
            )


def _follow_logits(last: ir.Value, linears: dict[int, Linear], places: Places) -> None:
    """Goes back from an output to the linears that make it."""
    open_values = [last]
    while open_values:
        value = open_values.pop()
        if any(value is one for one in places.logits):
            continue
        places.logits.append(value)
        node, linear = value.producer(), linears.get(id(value))
        if linear is not None and linear.num_out == places.num_rows:
            _add_head(linear, places)
        elif node is not None and node.op_type in _ELEMENTWISE and not node.domain and _is_along_last(node, value):
            for operand in node.inputs:
                if operand is None or _width(operand) in (0, 1):
                    continue
                if _is_constant(operand):
                    _add_weight(operand, -1, places)
                else:
                    open_values.append(operand)
        else:
            raise _unknown(node, "makes logits") if node else UnsupportedModelError("logits are an input of the graph")


def _is_along_last(node: ir.Node, value: ir.Value) -> bool:
    """Whether a Softmax runs over the tokens; what is no Softmax treats every number alike."""
    axis = node.attributes.get("axis") if "Softmax" in node.op_type else None
    rank = None if value.shape is None else len(value.shape)
    return axis is None or axis.as_int() in (-1, None if rank is None else rank - 1)


def _add_head(linear: Linear, places: Places) -> None:
    places.heads.append(linear)
    if linear.holder == "MatMulBnb4" and linear.num_in % formats.integer(linear.node, "block_size"):
        raise UnsupportedModelError(f"{linear.name}: blocks of the head reach over the end of a row")
    is_turned = linear.holder in _TURNED or (linear.holder == "Gemm" and linear.is_turned())
    for value in linear.weights:
        _add_weight(value, -1 if is_turned else 0, places)
    if linear.bias is not None and any(linear.bias is one for one in linear.node.inputs):
        _add_weight(linear.bias, -1, places)
    if linear.holder in ("Transpose+MatMul", formats.QDQ):
        node = None if linear.node.inputs[1] is None else linear.node.inputs[1].producer()
        assert node is not None
        places.turned.append(node)


def _add_weight(value: ir.Value | None, axis: int, places: Places) -> None:
    """Notes an initializer; one number for all tokens stays."""
    if value is None or (size := _constant_size(value)) == 1:
        return
    if not value.is_initializer() or size % places.num_rows:
        raise UnsupportedModelError(f"{value.name}: expected a weight with a part for each of {places.num_rows} tokens")
    if places.weights.setdefault(id(value), (value, axis))[1] != axis:
        raise UnsupportedModelError(f"{value.name}: tokens are rows for one reader and columns for another")


def _check_readers(places: Places) -> None:
    """Raises where something is read by others than those that were found."""
    producers = [value.producer() for value in places.logits]
    known = {id(node) for node in (*places.gathers, *places.views, *places.turned, *producers) if node is not None}
    views = [node.outputs[0] for node in (*places.views, *places.turned)]
    for value in (*(one for one, _ in places.weights.values()), *places.logits, *views):
        for node, _ in value.uses():
            if id(node) not in known and node.op_type not in _ASKS_SHAPE:
                raise _unknown(node, f"reads {value.name}, which has a part for each token")


def _cut_weight(value: ir.Value, axis: int, ids_V: Ids, num_rows: int) -> None:
    tensor = value.const_value
    assert tensor is not None
    sizes = [int(size) for size in tensor.shape.numpy()]
    if axis == -1:
        sizes[-1] = len(ids_V)
    else:  # rows, one after the other where the tensor is flat
        sizes[0] = sizes[0] // num_rows * len(ids_V)

    def read() -> ir.Tensor[Any]:
        whole = tensor.numpy()
        # NOTE: fancy indexing of a mapped file reads no more than the rows that stay.
        part = whole[..., ids_V] if axis == -1 else whole.reshape(num_rows, -1)[ids_V].reshape(sizes)
        return ir.Tensor(np.ascontiguousarray(part), dtype=tensor.dtype, name=value.name)

    value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(sizes), name=value.name)
    value.shape = ir.Shape(sizes)


def _resize_view(graph: ir.Graph, node: ir.Node, count: int) -> None:
    sizes = _constant(node.inputs[1]).copy()
    sizes[0] = count
    old = node.inputs[1]
    assert old is not None
    node.replace_input_with(1, _initializer(graph, old.name or "shape", sizes))
    if node.outputs[0].shape is not None:
        node.outputs[0].shape = ir.Shape([count, *node.outputs[0].shape[1:]])
    drop_unused(graph, old)


def _resize(value: ir.Value, count: int, num_rows: int) -> None:
    if value.shape is not None and len(value.shape) and value.shape[-1] == num_rows:
        value.shape = ir.Shape([*value.shape[:-1], count])


def _initializer(graph: ir.Graph, base: str, array: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.Tensor(array, name=unique_name(graph, base))
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and not value.is_graph_input() and ir.convenience.get_const_tensor(value) is not None


def _constant(value: ir.Value | None) -> npt.NDArray[Any]:
    assert value is not None
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy()


def _constant_size(value: ir.Value) -> int:
    tensor = ir.convenience.get_const_tensor(value)
    return 0 if tensor is None else tensor.size


def _width(value: ir.Value) -> int | None:
    """Numbers along the last axis, 0 of a scalar, None when nobody says."""
    tensor = ir.convenience.get_const_tensor(value)
    shape = value.shape if tensor is None else tensor.shape
    if shape is None:
        return None
    size = shape[-1] if len(shape) else 0
    return size if isinstance(size, int) else None


def _unknown(node: ir.Node | None, what: str) -> UnsupportedModelError:
    assert node is not None
    return UnsupportedModelError(
        f"{node.op_type} ({node.name}) {what}, and what it would do with fewer tokens is not known",
        hint="fuse the model first; or keep the vocabulary as it is",
    )
