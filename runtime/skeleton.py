"""The skeleton of an ONNX file: its nodes, names and sizes, read through the bytes without touching a weight.

A model with its weights inside is one protobuf of hundreds of megabytes; parsing it only to learn which operator reads
the cache would double the load time and the peak memory. The wire format says the length of every field, so everything
that is not wanted is stepped over in the memory map.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxpress.compiler.errors import BadModelFileError

# Bits of one element of each TensorProto.DataType; strings count as nothing.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}

# Operators whose attributes hold graphs of their own.
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})


@dataclass(frozen=True)
class Node:
    """One operator: names only.

    `inner` lists the names that its sub-graphs read or write, `to` is the element type that a Cast makes.
    """

    op_type: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inner: tuple[str, ...] = ()
    to: int = 0


@dataclass(frozen=True)
class Initializer:
    """One weight: where it lies and how large it is, in bytes as stored."""

    name: str
    shape: tuple[int, ...]
    data_type: int
    num_bytes: int
    location: str | None = None  # of external data, relative to the model's directory
    offset: int = 0


@dataclass
class Skeleton:
    """What `read` found in the main graph of a model; `types` are the element types that the file states, as numbers
    of TensorProto.DataType, and `sizes` the bytes of values of which it states all dimensions."""

    path: Path
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Initializer] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    types: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read `name`, those that read it inside a sub-graph included."""
        return [node for node in self.nodes if name in node.inputs or name in node.inner]


def read(path: Path) -> Skeleton:
    """Reads the skeleton of the model at `path`.

    Raises:
        BadModelFileError: the file is missing, empty, truncated or no ONNX model.
    """
    hint = "give an .onnx file that was written whole"
    if not path.is_file():
        raise BadModelFileError(f"{path}: expected an ONNX file, found none", hint="check the path")
    if path.stat().st_size == 0:
        raise BadModelFileError(f"{path}: expected an ONNX model, the file is empty", hint=hint)
    skeleton = Skeleton(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            graphs = [span for number, span in _fields(data, 0, len(data)) if number == 7 and isinstance(span, tuple)]
            if not graphs:
                raise ValueError("no graph inside")
            for start, end in graphs:
                _read_graph(data, start, end, skeleton)
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise BadModelFileError(f"{path}: expected an ONNX model, got {error}", hint=hint) from error
    if not skeleton.nodes or not skeleton.outputs:
        raise BadModelFileError(f"{path}: expected an ONNX model with nodes and outputs, found none", hint=hint)
    return skeleton


def check_external_data(skeleton: Skeleton) -> None:
    """Looks whether every external file exists, lies below the model's directory, and is long enough.

    Raises:
        BadModelFileError: one does not; ONNX Runtime would say so later and less clearly.
    """
    folder = skeleton.path.parent
    needed: dict[str, int] = {}
    for tensor in skeleton.initializers.values():
        if tensor.location is not None:
            needed[tensor.location] = max(needed.get(tensor.location, 0), tensor.offset + tensor.num_bytes)
    for location, size in needed.items():
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise BadModelFileError(
                f"{skeleton.path}: external data must lie below the model's own directory, got {location!r}",
                hint="copy the data beside the model and save it again",
            )
        file = folder / location
        if not file.is_file():
            raise BadModelFileError(
                f"{skeleton.path}: external data {location!r} is missing", hint="copy it beside the model"
            )
        if file.stat().st_size < size:
            raise BadModelFileError(
                f"{file}: expected at least {size} bytes of weights, got {file.stat().st_size}",
                hint="the file was cut off: copy or export it again",
            )


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Yields (field number, value) of the message in `[start, end)`: an integer, or the span of a length field."""
    position = start
    while position < end:
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of unknown wire type {kind}")
        if number == 0 or position + length > end:
            raise ValueError("a field that runs past the end")
        if kind == 2:
            yield number, (position, position + length)
        position += length


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _texts(data: mmap.mmap, start: int, end: int, *wanted: int) -> list[tuple[int, str]]:
    return [
        (number, data[span[0] : span[1]].decode())
        for number, span in _fields(data, start, end)
        if number in wanted and isinstance(span, tuple)
    ]


def _read_graph(data: mmap.mmap, start: int, end: int, skeleton: Skeleton) -> None:
    for number, span in _fields(data, start, end):
        if not isinstance(span, tuple):
            continue
        if number == 1:
            skeleton.nodes.append(_read_node(data, *span))
        elif number == 5:
            tensor = _read_tensor(data, *span)
            skeleton.initializers[tensor.name] = tensor
            skeleton.types[tensor.name] = tensor.data_type
        elif number == 15:
            tensor = _read_sparse(data, *span)
            skeleton.initializers[tensor.name] = tensor
            skeleton.types[tensor.name] = tensor.data_type
        elif number in (11, 12, 13):
            name, data_type, shape = _read_value(data, *span)
            skeleton.types[name] = data_type
            if shape:
                skeleton.sizes[name] = _num_bytes(shape, data_type)
            if number != 13:
                (skeleton.inputs if number == 11 else skeleton.outputs).append(name)


def _read_value(data: mmap.mmap, start: int, end: int) -> tuple[str, int, list[int]]:
    """(name, element type, shape) of a ValueInfoProto; the type is 0 where it is no tensor, [] is an unknown shape."""
    name, data_type, shape = "", 0, list[int]()
    for number, span in _fields(data, start, end):
        if number == 1 and isinstance(span, tuple):
            name = data[span[0] : span[1]].decode()
        elif number == 2 and isinstance(span, tuple):
            for kind, tensor in _fields(data, *span):
                if kind == 1 and isinstance(tensor, tuple):
                    for part, value in _fields(data, *tensor):
                        if part == 1 and isinstance(value, int):
                            data_type = value
                        elif part == 2 and isinstance(value, tuple):
                            shape = _static(data, *value)
    return name, data_type, shape


def _static(data: mmap.mmap, start: int, end: int) -> list[int]:
    """The sizes of a TensorShapeProto; [] when one of them has no number."""
    sizes = []
    for number, dim in _fields(data, start, end):
        if number == 1 and isinstance(dim, tuple):
            found = [value for part, value in _fields(data, *dim) if part == 1 and isinstance(value, int)]
            if not found:
                return []
            sizes += found
    return sizes


def _read_node(data: mmap.mmap, start: int, end: int) -> Node:
    inputs: list[str] = []
    outputs: list[str] = []
    rest = {3: "", 4: "", 7: ""}
    attributes: list[tuple[int, int]] = []
    for number, span in _fields(data, start, end):
        if not isinstance(span, tuple):
            continue
        if number == 5:
            attributes.append(span)
        elif number in (1, 2, 3, 4, 7):
            text = data[span[0] : span[1]].decode()
            if number == 1:
                inputs.append(text)
            elif number == 2:
                outputs.append(text)
            else:
                rest[number] = text
    inner = _inner_names(data, attributes) if rest[4] in _CONTROL_FLOW else ()
    to = _integer(data, attributes, "to") if rest[4] == "Cast" else 0
    return Node(rest[4], rest[7], rest[3], tuple(inputs), tuple(outputs), inner, to)


def _integer(data: mmap.mmap, attributes: list[tuple[int, int]], name: str) -> int:
    for attribute in attributes:
        if _texts(data, *attribute, 1) == [(1, name)]:
            return next((value for part, value in _fields(data, *attribute) if part == 3 and isinstance(value, int)), 0)
    return 0


def _inner_names(data: mmap.mmap, attributes: list[tuple[int, int]]) -> tuple[str, ...]:
    names: list[str] = []
    for attribute in attributes:
        for number, graph in _fields(data, *attribute):
            if number not in (6, 11) or not isinstance(graph, tuple):
                continue
            part = Skeleton(Path())
            _read_graph(data, *graph, part)
            names += part.outputs
            for node in part.nodes:
                names += [*node.inputs, *node.outputs, *node.inner]
    return tuple(dict.fromkeys(names))


def _read_sparse(data: mmap.mmap, start: int, end: int) -> Initializer:
    """A sparse initializer as ONNX Runtime sees it once a session is open: dense."""
    values, shape = Initializer("", (), 0, 0), list[int]()
    for number, value in _fields(data, start, end):
        if number == 1 and isinstance(value, tuple):
            values = _read_tensor(data, *value)
        elif number == 3:
            shape += _dims(data, value)
    return Initializer(values.name, tuple(shape), values.data_type, _num_bytes(shape, values.data_type))


def _dims(data: mmap.mmap, value: int | tuple[int, int]) -> list[int]:
    """One size, or as many as are packed there."""
    if isinstance(value, int):
        return [value]
    shape, position = [], value[0]
    while position < value[1]:
        dim, position = _varint(data, position)
        shape.append(dim)
    return shape


def _num_bytes(shape: Sequence[int], data_type: int) -> int:
    return (math.prod(shape) * _BITS.get(data_type, 0) + 7) // 8


def _read_tensor(data: mmap.mmap, start: int, end: int) -> Initializer:
    shape: list[int] = []
    data_type, name, location, offset = 0, "", None, 0
    for number, value in _fields(data, start, end):
        if number == 1:
            shape += _dims(data, value)
        elif number == 2 and isinstance(value, int):
            data_type = value
        elif number == 8 and isinstance(value, tuple):
            name = data[value[0] : value[1]].decode()
        elif number == 13 and isinstance(value, tuple):
            entry = dict(_texts(data, *value, 1, 2))
            if entry.get(1) == "location":
                location = entry.get(2)
            elif entry.get(1) == "offset":
                offset = int(entry.get(2, "0"))
    return Initializer(name, tuple(shape), data_type, _num_bytes(shape, data_type), location, offset)
