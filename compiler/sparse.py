"""Weights with many zeros in a short form, for the file only.

Two forms. ONNX has sparse initializers: values and their places, 8 bytes for each place, in the graph file; any ONNX
tool can read them, and ONNX Runtime makes them dense as it opens a session. With float32 they are smaller than the
matrix from 67 % of zeros on, with float16 from 80 %. The other form, rows, takes one byte for each place:
the step from the weight before it in its row, all rows having as many weights as the fullest (some of them 0). Cast,
CumSum and ScatterElements decode it, whose inputs are constant, so that ONNX Runtime does it once, while it opens a
session; it is smaller from 20 % of zeros on, with float16 from 33 %.

Neither makes anything faster: what is computed with is dense. Opening takes longer and for the while more memory.

Passes never see this: it is done as a graph is written, and undone as one is read. A graph says in its metadata which
form it is to be written in (`store_sparse`).

Axes: R rows, L weights of a row, P weights of a row that are stored
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxpress.compiler.errors import BadModelFileError
from onnxpress.compiler.linears import drop_unused, unique_name

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

KEY = "onnxpress.sparse"  # of the metadata of a graph: the form that its weights may be written in
ROWS, INITIALIZERS, DENSE = "rows", "initializers", "dense"
DOMAIN, OPERATOR = "onnxpress", "FromSparseInitializer"  # stands for a sparse initializer while a graph is read
_GAIN = 15 / 16  # of the bytes of the matrix: what saves less stays as it is
_LIMIT = 3 << 29  # bytes of sparse initializers of one graph file, which protobuf limits to 2 GiB
_OPSET = 11  # from which on ScatterElements and CumSum exist
_STEP = 255  # the largest step of one byte
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_GRAPH, _SPARSE, _VALUES, _INDICES, _DIMS, _RAW = 7, 15, 1, 2, 3, 9  # field numbers of onnx.proto3


class Choice(NamedTuple):
    """The form of a matrix in the file.

    Attributes:
        form: "rows", "initializers" or "dense".
        nbytes: what it takes.
        axis: along which the rows lie.
        stored: weights that are stored, of a row or, as an initializer, of the matrix.
    """

    form: str
    nbytes: int
    axis: int = 0
    stored: int = 0


def choose(array: Array, form: str) -> Choice:
    """The smallest form that `form` allows, "rows" also sparse initializers; dense where little is gained."""
    nonzero = array != 0
    count = int(np.count_nonzero(nonzero))
    found = [Choice(INITIALIZERS, count * (8 + array.itemsize), 0, count)]
    if form == ROWS:
        for axis in (0, 1):
            per_row = _kept(nonzero, axis)
            size = per_row * array.shape[1 - axis]
            found.append(Choice(ROWS, size * (1 + array.itemsize), axis, per_row))
    best = min(found, key=lambda one: one.nbytes)
    return best if best.nbytes < _GAIN * array.nbytes else Choice(DENSE, array.nbytes)


def _with_bridges(nonzero_RL: Array) -> Array:
    """What has to be stored so that no step is longer than a byte holds."""
    bridged = nonzero_RL.copy()
    bridged[:, _STEP - 1 :: _STEP] = True
    return bridged


def _has_gaps(nonzero_RL: Array) -> bool:
    """Whether a row has zeros in a run that a step of one byte might not cross."""
    length = nonzero_RL.shape[1]
    edges = range(0, length, _STEP // 2)
    return length > _STEP and not all(nonzero_RL[:, one : one + _STEP // 2].any(axis=1).all() for one in edges)


def _kept(nonzero: Array, axis: int) -> int:
    """Weights that the fullest row stores."""
    rows = np.moveaxis(nonzero, axis, 1)
    if _has_gaps(rows):
        rows = _with_bridges(rows)
    return max(int(rows.sum(axis=1).max(initial=0)), 1)


def encode(array: Array, axis: int) -> tuple[npt.NDArray[np.uint8], Array]:
    """Steps and values of the weights that are stored; both have P in the place of L.

    Args:
        array: a matrix.
        axis: along which its rows lie.

    Laws:   `decode` gives the matrix back, but for the sign of zeros.
    """
    matrix_RL = np.moveaxis(array, axis, 1)
    keep_RL = matrix_RL != 0
    if _has_gaps(keep_RL):
        keep_RL = _with_bridges(keep_RL)
    counts_R = keep_RL.sum(axis=1)
    most = max(int(counts_R.max(initial=0)), 1)
    # Rows that have fewer store their first zeros too.
    number_RL = np.cumsum(~keep_RL, axis=1, dtype=np.int32)
    keep_RL |= number_RL <= (most - counts_R)[:, None]
    places_RP = np.nonzero(keep_RL)[1].reshape(-1, most)
    steps_RP = np.diff(places_RP, axis=1, prepend=0).astype(np.uint8)
    values_RP = np.take_along_axis(matrix_RL, places_RP, axis=1)
    return np.ascontiguousarray(np.moveaxis(steps_RP, 1, axis)), np.ascontiguousarray(np.moveaxis(values_RP, 1, axis))


def decode(steps: Array, values: Array, axis: int, shape: Sequence[int]) -> Array:
    """The matrix of these steps and values.

    Raises:
        BadModelFileError: a step leads out of the matrix.
    """
    places = np.cumsum(steps, axis=axis, dtype=np.int64)
    if places.size and places.max() >= shape[axis]:
        raise BadModelFileError(f"a sparse weight of shape {list(shape)} stores a place beyond its end")
    matrix = np.zeros(tuple(shape), values.dtype)
    np.put_along_axis(matrix, places, values, axis=axis)
    return matrix


def dense(values: Array, indices: Array, shape: Sequence[int]) -> Array:
    """The tensor of a sparse initializer.

    Args:
        values: [n].
        indices: [n], counted over the whole tensor, or [n, rank].
        shape: of the tensor.

    Raises:
        BadModelFileError: an index is out of range.
    """
    limit = np.array(shape) if indices.ndim == 2 else math.prod(shape)
    if indices.size and (indices.min() < 0 or (indices >= limit).any()):
        raise BadModelFileError(f"a sparse initializer of shape {list(shape)} has an index out of range")
    flat = np.ravel_multi_index(tuple(indices.T), tuple(shape)) if indices.ndim == 2 else indices
    tensor = np.zeros(math.prod(shape), values.dtype)
    tensor[flat] = values
    return tensor.reshape(tuple(shape))


def candidates(model: ir.Model, threshold: int) -> list[ir.Value]:
    """Float matrices above `threshold` bytes that may be written in a short form."""
    return [
        value
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None
        and len(tensor.shape) == 2
        and tensor.dtype in _TYPES
        and tensor.nbytes > threshold
        and not (value.is_graph_input() or value.is_graph_output())
    ]


@dataclass
class Compacted:
    """What `compacted` changed.

    Attributes:
        initializers: weights that are to follow as sparse initializers, with how many values they have.
    """

    initializers: list[tuple[ir.Value, int]] = field(default_factory=list)
    anchor: ir.Node | None = None
    nodes: list[ir.Node] = field(default_factory=list)
    parts: list[ir.Value] = field(default_factory=list)
    weights: list[tuple[ir.Value, ir.Value | None, str]] = field(default_factory=list)


@contextmanager
def compacted(model: ir.Model, threshold: int) -> Iterator[Compacted]:
    """The graph with weights in the form that its metadata asks for, for as long as the block runs.

    Args:
        model: changed on entry, as it was on exit.
        threshold: bytes up to which weights stay as they are.
    """
    graph, done = model.graph, Compacted()
    try:
        form = model.metadata_props.get(KEY)
        if form in (ROWS, INITIALIZERS):
            _compact(model, form, threshold, done)
        yield done
    finally:
        for value, made, name in done.weights:
            if made is not None:
                made.name, value.name = None, name
                made.replace_all_uses_with(value)
        graph.remove(done.nodes[::-1], safe=True)
        for part in done.parts:
            del graph.initializers[part.name]  # type: ignore[arg-type]
        for value, _, _ in done.weights:
            graph.register_initializer(value)


def _compact(model: ir.Model, form: str, threshold: int, done: Compacted) -> None:
    graph, used, opset = model.graph, 0, model.opset_imports.get("", 0)
    canvases: dict[tuple[int, ...], ir.Value] = {}
    done.anchor = graph[0]
    for value in candidates(model, threshold):
        tensor, name = value.const_value, value.name
        assert tensor is not None
        assert name is not None
        choice = choose(tensor.numpy(), form if opset >= _OPSET else INITIALIZERS)
        if choice.form == INITIALIZERS and used + choice.nbytes > _LIMIT:
            logger.warning("%s stays dense: the graph file has no room for more sparse initializers", name)
        elif choice.form == INITIALIZERS:
            used += choice.nbytes
            done.initializers.append((value, choice.stored))
            done.weights.append((value, None, name))
            graph.initializers.pop(name)
        elif choice.form == ROWS:
            made = _decoded(graph, value, tensor, choice, canvases, done)
            done.weights.append((value, made, name))
            graph.initializers.pop(name)
            value.name, made.name = None, name
            value.replace_all_uses_with(made)


def _decoded(
    graph: ir.Graph,
    value: ir.Value,
    tensor: ir.TensorProtocol,
    choice: Choice,
    canvases: dict[tuple[int, ...], ir.Value],
    done: Compacted,
) -> ir.Value:
    """The output of nodes that make the matrix of steps and values."""
    shape, axis = tuple(int(size) for size in tensor.shape.numpy()), choice.axis
    sizes = tuple(choice.stored if one == axis else size for one, size in enumerate(shape))
    key = (*shape, int(tensor.dtype))

    def initializer(what: str, dtype: ir.DataType, dims: Sequence[int], make: Callable[[], Array]) -> ir.Value:
        name = unique_name(graph, f"{value.name}.{what}")
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(make(), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(dims), name=name
        )
        part = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype), const_value=lazy)
        graph.register_initializer(part)
        done.parts.append(part)
        return part

    def constant(what: str, array: Array) -> ir.Value:
        return initializer(what, ir.DataType.from_numpy(array.dtype), array.shape, lambda: array)

    def add(node: ir.Node, what: str, dtype: ir.DataType, dims: Sequence[int]) -> ir.Value:
        node.name = f"{value.name}/{what}"
        node.outputs[0].name = node.name
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(dims), dtype
        assert done.anchor is not None
        graph.insert_before(done.anchor, node)
        done.nodes.append(node)
        return node.outputs[0]

    if key not in canvases:
        fill = ir.tensor(np.zeros(1, tensor.dtype.numpy()))
        blank = ir.node("ConstantOfShape", [constant("shape", np.array(shape, np.int64))], {"value": fill})
        canvases[key] = add(blank, "zeros", tensor.dtype, shape)
    steps = initializer("steps", ir.DataType.UINT8, sizes, lambda: encode(tensor.numpy(), axis)[0])
    values = initializer("values", tensor.dtype, sizes, lambda: encode(tensor.numpy(), axis)[1])
    wide = add(ir.node("Cast", [steps], {"to": int(ir.DataType.INT32)}), "wide", ir.DataType.INT32, sizes)
    along = constant("axis", np.array(axis, np.int64))
    places = add(ir.node("CumSum", [wide, along]), "places", ir.DataType.INT32, sizes)
    put = ir.node("ScatterElements", [canvases[key], places, values], {"axis": axis})
    return add(put, "dense", tensor.dtype, shape)


def restore(model: ir.Model) -> None:
    """Undoes `compacted` in a graph that was read from a file: matrices are plain initializers again.

    Raises:
        BadModelFileError: a sparse initializer is not well-formed.
    """
    graph = model.graph
    blanks: list[ir.Node] = []
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == OPERATOR:
            _replace(graph, node, [node], _of_initializer(node))
            model.metadata_props.setdefault(KEY, INITIALIZERS)
        elif node.op_type == "ScatterElements" and (found := _of_rows(node)) is not None:
            nodes, shape, make = found
            blanks.append(nodes.pop())
            _replace(graph, node, nodes, (shape, make))
    for blank in dict.fromkeys(blanks):
        if not blank.outputs[0].uses():
            parts = list(blank.inputs)
            graph.remove(blank, safe=True)
            _drop(graph, parts)


def _replace(
    graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], found: tuple[list[int], Callable[[], Array]]
) -> None:
    """An initializer in the place of the output of `node`; `nodes`, it included, made it."""
    made, (shape, make) = node.outputs[0], found
    values = node.inputs[2] if node.op_type == "ScatterElements" else node.inputs[0]
    dtype, name = _constant(values).dtype, made.name
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(make(), dtype=dtype, name=name), dtype=dtype, shape=ir.Shape(shape), name=name
    )
    value = ir.Value(shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
    parts = [one for other in nodes for one in other.inputs if one is not None and one.is_initializer()]
    made.name, value.name = None, name
    made.replace_all_uses_with(value)
    graph.remove(nodes, safe=True)
    _drop(graph, parts)
    graph.register_initializer(value)


def _drop(graph: ir.Graph, parts: Sequence[ir.Value | None]) -> None:
    for part in dict.fromkeys(parts):
        drop_unused(graph, part)


def _constant(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _of_rows(node: ir.Node) -> tuple[list[ir.Node], list[int], Callable[[], Array]] | None:
    """Nodes that `compacted` made, its zeros last, the shape of the matrix, and what makes it; None for others."""
    if len(node.inputs) != 3 or any(value is None for value in node.inputs):
        return None
    blank, places, values = (value.producer() if value is not None else None for value in node.inputs)
    wide = places.inputs[0].producer() if places is not None and places.inputs[0] is not None else None
    if blank is None or places is None or wide is None or values is not None:
        return None
    if (blank.op_type, places.op_type, wide.op_type) != ("ConstantOfShape", "CumSum", "Cast") or places.attributes:
        return None
    constants = (node.inputs[2], wide.inputs[0], places.inputs[1], blank.inputs[0])
    tensors = [None if one is None else one.const_value for one in constants]
    if any(one is None for one in tensors) or "reduction" in node.attributes or len(places.outputs[0].uses()) > 1:
        return None
    held, steps, along, sizes = (one for one in tensors if one is not None)
    axis, shape = int(along.numpy()), [int(one) for one in sizes.numpy()]
    where = node.attributes.get("axis")
    if len(shape) != 2 or where is None or where.as_int() != axis or axis not in (0, 1):
        return None
    if steps.dtype != ir.DataType.UINT8 or list(steps.shape) != list(held.shape):
        return None
    if [*held.shape][1 - axis] != shape[1 - axis]:
        return None
    nodes = [node, places, wide, blank]
    return nodes, shape, lambda: decode(steps.numpy(), held.numpy(), axis, shape)


def _of_initializer(node: ir.Node) -> tuple[list[int], Callable[[], Array]]:
    values, indices = _constant(node.inputs[0]), _constant(node.inputs[1])
    shape, name = [int(one) for one in node.attributes["dims"].as_ints()], node.outputs[0].name
    count = list(values.shape)
    is_sound = len(count) == 1 and list(indices.shape) in (count, [*count, len(shape)]) and min(shape, default=0) >= 0
    if not is_sound or indices.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT16):
        raise BadModelFileError(
            f"sparse initializer {name!r}: expected values [n] and integer indices [n] or [n, {len(shape)}], found "
            f"{list(values.shape)} and {list(indices.shape)} of {indices.dtype.name.lower()}",
            hint="export the model again",
        )
    return shape, functools.partial(_read_dense, values, indices, shape)


def _read_dense(values: ir.TensorProtocol, indices: ir.TensorProtocol, shape: Sequence[int]) -> Array:
    return dense(values.numpy(), indices.numpy(), shape)


def lower(graph: onnx.GraphProto) -> None:
    """Turns sparse initializers, which onnx_ir does not read, into plain ones and nodes of which `restore` knows."""
    sparse = list(graph.sparse_initializer)
    del graph.sparse_initializer[:]
    nodes = []
    for one in sparse:
        name = one.values.name
        for part, what in ((one.values, "values"), (one.indices, "indices")):
            part.name = f"{name}#{what}"
            graph.initializer.append(part)
        node = onnx.NodeProto(op_type=OPERATOR, domain=DOMAIN, name=f"{name}#sparse", output=[name])
        node.input.extend([f"{name}#values", f"{name}#indices"])
        node.attribute.add(name="dims", type=onnx.AttributeProto.INTS, ints=list(one.dims))
        nodes.append(node)
    if nodes:
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes, *rest])


def append_initializers(path: Path, weights: Sequence[tuple[ir.Value, int]]) -> None:
    """Adds sparse initializers to a graph file, one weight in memory at a time.

    Args:
        path: of a graph that reads them and lacks them; its other large weights lie in another file.
        weights: with the number of values that are not 0.
    """
    if not weights:
        return
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    sizes = [sum(len(piece) if isinstance(piece, bytes) else piece for piece in _layout(*one)) for one in weights]
    lengths = [len(_tag(_SPARSE)) + len(_varint(size)) + size for size in sizes]
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(proto.SerializeToString() + _tag(_GRAPH) + _varint(len(graph) + sum(lengths)) + graph)
        for (value, count), size in zip(weights, sizes, strict=True):
            file.write(_tag(_SPARSE) + _varint(size))
            array = _constant(value).numpy()
            indices = np.flatnonzero(array)
            payload = iter((array.reshape(-1)[indices], indices.astype("<i8")))
            for piece in _layout(value, count):
                file.write(piece if isinstance(piece, bytes) else np.ascontiguousarray(next(payload)).data)
    draft.replace(path)


def _layout(value: ir.Value, count: int) -> list[bytes | int]:
    """A SparseTensorProto in pieces: bytes, and in the place of values and of indices how many bytes they are."""
    tensor = _constant(value)
    pieces: list[bytes | int] = []
    for number, name, dtype, width in (
        (_VALUES, value.name, int(tensor.dtype), tensor.dtype.itemsize),
        (_INDICES, "", int(ir.DataType.INT64), 8),
    ):
        size = int(count * width)
        head = onnx.TensorProto(name=name or "", data_type=dtype, dims=[count]).SerializeToString()
        head += _tag(_RAW) + _varint(size)
        pieces += [_tag(number) + _varint(len(head) + size) + head, size]
    dims = b"".join(_varint(int(size)) for size in tensor.shape.numpy())
    return [*pieces, _tag(_DIMS) + _varint(len(dims)) + dims]


def _tag(number: int) -> bytes:
    return _varint(number << 3 | 2)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)
