"""Opens an ONNX file as untrusted input, with every large weight left where it is: on the disk.

`onnx_ir` maps external data, but a model whose weights sit inside the protobuf (what exporters write below 2 GB) would
be read whole. The protobuf already holds each weight as one run of bytes, so a walk over the outer fields finds its
offset, and the tensor can be declared *external data of the .onnx file itself*: no copy on the disk, none in memory.
Only `raw_data` is treated so; values in the typed fields (float_data, ...) are varint-coded and stay in memory.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxpress.compiler import scales, sparse
from onnxpress.compiler.errors import BadModelFileError

logger = logging.getLogger(__name__)

INLINE_LIMIT = 1024  # bytes; smaller tensors stay in the protobuf, where constant folding reads them

# Field numbers of onnx.proto3, as far as the walk needs them.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
_GRAPH_SPARSE_INITIALIZER, _SPARSE_VALUES, _SPARSE_INDICES = 15, 1, 2
_LENGTH_DELIMITED = 2


def load_onnx(path: Path) -> ir.Model:
    """The model in `path`, weights memory-mapped; external data is checked before anything reads it.

    Args:
        path: an `.onnx` file; a symbolic link is followed.

    Returns:
        A model whose initializers above `INLINE_LIMIT` bytes are `ir.ExternalTensor`, each lying wholly inside a file
        of the model's own directory.

    Raises:
        BadModelFileError: the file is missing, is no ONNX model, is truncated, or its external data is missing,
            truncated, or outside its directory.
    """
    # Resolved, because onnx_ir refuses data behind a link, and inline weights live in the link's target.
    real = path.resolve()
    proto = _parse(path, real)
    if not proto.ir_version or not proto.opset_import or not proto.HasField("graph"):
        lacks = "ir_version" if not proto.ir_version else "opset_import" if not proto.opset_import else "graph"
        raise BadModelFileError(f"{path}: expected an ONNX model, found a file without {lacks}", hint=_check_hint(path))
    if not proto.graph.output:
        raise BadModelFileError(
            f"{path}: expected an ONNX model, found a graph without outputs", hint=_check_hint(path)
        )
    try:
        sparse.lower(proto.graph)
        model = ir.from_proto(proto)
        _settle(model, path, real)
        scales.restore(model)
        sparse.restore(model)
    except BadModelFileError:
        raise
    # What a hostile or broken graph makes onnx_ir raise is not a closed list: SerdeError, KeyError, ValueError, ...
    except Exception as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:  # onnx_ir wraps once per nesting; the innermost knows
            cause = inner
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise BadModelFileError(f"{path}: the graph is not well-formed: {reason}", hint=_check_hint(path)) from error
    logger.debug("%s: opset %s, %d nodes", path, model.opset_imports, model.graph.num_nodes())
    return model


def data_files(model: ir.Model) -> list[Path]:
    """The files that hold the model's external tensors, sorted; the `.onnx` file itself when weights are inline."""
    return sorted({Path(tensor.path) for _, tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)})


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces so that it never counts as memory of this process."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# --- the walk over the protobuf --------------------------------------------------------------------------------------


class _Field(NamedTuple):
    """One field of a protobuf message: its number, wire type, and where tag, payload and end lie in the file."""

    number: int
    wire: int
    tag: int
    start: int
    end: int


class _WireError(ValueError):
    """The bytes are not a protobuf message, or end too early."""


def _parse(path: Path, real: Path) -> onnx.ModelProto:
    """The protobuf with the bytes of large weights replaced by references into the file."""
    if not path.exists():
        raise BadModelFileError(f"{path}: no such file", hint="check the path")
    if not real.is_file():
        raise BadModelFileError(f"{path}: expected a file, found a directory or device", hint="give the .onnx file")
    size = real.stat().st_size
    if size == 0:
        raise BadModelFileError(f"{path}: expected an ONNX model, found an empty file", hint=_check_hint(path))
    try:
        with real.open("rb") as file:
            if file.read(64).startswith(b"version https://git-lfs"):
                raise BadModelFileError(
                    f"{path}: expected an ONNX model, found a git-lfs pointer", hint="fetch the file: git lfs pull"
                )
            skeleton = _skeleton(file, size, real.name)
        proto = onnx.ModelProto()
        proto.ParseFromString(skeleton)
        return proto
    except OSError as error:
        raise BadModelFileError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error
    except (_WireError, DecodeError) as error:
        raise BadModelFileError(
            f"{path}: expected an ONNX model, found {size:,} bytes that are not one: {error}", hint=_check_hint(path)
        ) from error


def _skeleton(file: BinaryIO, size: int, location: str) -> bytes:
    """ModelProto bytes in which initializers above the limit are external data at their own place in the file."""
    pieces: list[bytes] = []
    for field in _fields(file, 0, size):
        if field.number == _MODEL_GRAPH and field.wire == _LENGTH_DELIMITED:
            graph = b"".join(_graph_pieces(file, field, location))
            pieces += [_tag(_MODEL_GRAPH), _varint(len(graph)), graph]
        else:
            pieces.append(_read(file, field.tag, field.end))
    return b"".join(pieces)


def _graph_pieces(file: BinaryIO, graph: _Field, location: str) -> Iterator[bytes]:
    for field in _fields(file, graph.start, graph.end):
        is_large = field.end - field.start > INLINE_LIMIT
        if field.number == _GRAPH_INITIALIZER and field.wire == _LENGTH_DELIMITED and is_large:
            tensor = _external_tensor(file, field, location)
            yield from (_tag(_GRAPH_INITIALIZER), _varint(len(tensor)), tensor)
        elif field.number == _GRAPH_SPARSE_INITIALIZER and field.wire == _LENGTH_DELIMITED and is_large:
            sparse_tensor = b"".join(_sparse_pieces(file, field, location))
            yield from (_tag(_GRAPH_SPARSE_INITIALIZER), _varint(len(sparse_tensor)), sparse_tensor)
        else:
            yield _read(file, field.tag, field.end)


def _sparse_pieces(file: BinaryIO, tensor: _Field, location: str) -> Iterator[bytes]:
    for field in _fields(file, tensor.start, tensor.end):
        if field.number in (_SPARSE_VALUES, _SPARSE_INDICES) and field.wire == _LENGTH_DELIMITED:
            part = _external_tensor(file, field, location)
            yield from (_tag(field.number), _varint(len(part)), part)
        else:
            yield _read(file, field.tag, field.end)


def _external_tensor(file: BinaryIO, tensor: _Field, location: str) -> bytes:
    """The TensorProto with its raw_data, if large, as external data of the file at `location`."""
    fields = list(_fields(file, tensor.start, tensor.end))
    raw = [field for field in fields if field.number == _TENSOR_RAW_DATA and field.wire == _LENGTH_DELIMITED]
    if len(raw) != 1 or raw[0].end - raw[0].start <= INLINE_LIMIT:
        return _read(file, tensor.start, tensor.end)
    rest = b"".join(_read(file, field.tag, field.end) for field in fields if field is not raw[0])
    proto = onnx.TensorProto()
    proto.ParseFromString(rest)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raise _WireError(f"tensor {proto.name!r} has data both inside and outside the file")
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", raw[0].start), ("length", raw[0].end - raw[0].start)):
        proto.external_data.add(key=key, value=str(value))
    return bytes(proto.SerializeToString())


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[_Field]:
    """The fields of the message in buffer[start:end], in order, each checked to end inside it."""
    position = start
    while position < end:
        tag = position
        key, position = _read_varint(file, position, end)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise _WireError(f"no protobuf field at byte {tag:,}")
        if wire == 0:
            payload = position
            _, position = _read_varint(file, position, end)
        elif wire in (1, 5):
            payload, position = position, position + (8 if wire == 1 else 4)
        elif wire == _LENGTH_DELIMITED:
            length, payload = _read_varint(file, position, end)
            position = payload + length
        else:
            raise _WireError(f"no protobuf field at byte {tag:,}")
        if position > end:
            raise _WireError(f"truncated: field {number} at byte {tag:,} needs {position - end:,} bytes more")
        yield _Field(number, wire, tag, payload, position)


def _read_varint(file: BinaryIO, position: int, end: int) -> tuple[int, int]:
    """The number at `position`, and where it ends."""
    value = 0
    for index, byte in enumerate(_read(file, position, min(position + 10, end))):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise _WireError(f"truncated, or no protobuf number, at byte {position:,}")


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    # Reading, not mapping: a map of the file counts as memory of this process, in pieces as large as the kernel likes.
    file.seek(start)
    return file.read(end - start)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED)


# --- external data ---------------------------------------------------------------------------------------------------


def _settle(model: ir.Model, path: Path, real: Path) -> None:
    """Checks all tensors; external ones get absolute places from which onnx_ir reads them."""
    sizes: dict[Path, int] = {}
    for value, tensor in list(_tensors(model)):
        shape = list(tensor.shape.numpy())
        where = f"{path}: tensor {tensor.name!r}"
        expected = math.prod(shape) * tensor.dtype.bitwidth
        if any(dim < 0 for dim in shape):
            raise BadModelFileError(f"{where}: expected a shape of sizes, found {shape}", hint=_check_hint(path))
        if isinstance(tensor, ir.ExternalTensor):
            file = _locate(tensor, where, path, real)
            if file not in sizes:
                sizes[file] = file.stat().st_size
            _check_range(tensor, where, (expected + 7) // 8, file, sizes[file])
            tensor.base_dir = real.parent
            if value is not None and file != real.parent / str(tensor.location):
                value.const_value = ir.ExternalTensor(
                    file.name,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=ir.Shape(shape),
                    name=tensor.name or "",
                    doc_string=tensor.doc_string,
                    metadata_props=dict(tensor.metadata_props),
                    base_dir=file.parent,
                )
        elif isinstance(raw := tensor.raw, onnx.TensorProto) and raw.HasField("raw_data"):
            found = len(raw.raw_data)
            if found != (expected + 7) // 8:
                raise BadModelFileError(
                    f"{where}: expected {(expected + 7) // 8:,} bytes for {tensor.dtype.name} {shape}, found {found:,}",
                    hint=_check_hint(path),
                )


def _locate(tensor: ir.ExternalTensor, where: str, path: Path, real: Path) -> Path:
    """The file of an external tensor, links resolved; raises unless it lies below the model's own directory."""
    location = os.fspath(tensor.location)
    # A Windows path is checked on every system, so that a model is refused everywhere or nowhere.
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or os.path.isabs(location) or location[1:2] == ":" or ".." in parts:
        raise BadModelFileError(
            f"{where}: expected external data below the model's directory, found location {location!r}",
            hint="refuse this file, or export the model again with relative data paths",
        )
    linked = next(
        (place for place in (real.parent / location, path.absolute().parent / location) if place.exists()), None
    )
    if linked is None:
        raise BadModelFileError(
            f"{where}: its external data {location!r} is missing beside the model",
            hint=f"put {location} into {path.parent}",
        )
    file = linked.resolve()
    roots = [real.parent, path.absolute().parent.resolve(), *_hub_blobs(path)]
    if not any(file.is_relative_to(root) for root in roots):
        raise BadModelFileError(
            f"{where}: external data {location!r} is a link to {file}, outside the model's directory",
            hint="refuse this file, or copy the data beside the model",
        )
    if not file.is_file():
        raise BadModelFileError(f"{where}: expected a data file, {location!r} is a directory or device")
    if file.stat().st_nlink > 1:
        # onnx_ir refuses these on first use: a hard link can show a file of another directory.
        raise BadModelFileError(
            f"{where}: external data {location!r} has several hard links", hint="copy the data file and use the copy"
        )
    return file


def _hub_blobs(path: Path) -> list[Path]:
    """Where a Hugging Face cache keeps what its snapshots link to: models--org--name/blobs."""
    for parent in path.absolute().parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return [(parent.parent / "blobs").resolve()]
    return []


def _check_range(tensor: ir.ExternalTensor, where: str, expected: int, file: Path, size: int) -> None:
    offset, length = tensor.offset or 0, tensor.length if tensor.length is not None else expected
    kind = f"{tensor.dtype.name} {list(tensor.shape.numpy())}"
    if length != expected:
        raise BadModelFileError(
            f"{where}: expected {expected:,} bytes for {kind}, its entry says {length:,}",
            hint="the model file is damaged; fetch or export it again",
        )
    if offset < 0 or offset + length > size:
        raise BadModelFileError(
            f"{where}: expected bytes {offset:,} to {offset + length:,} of {file.name}, which has {size:,}",
            hint=f"{file.name} is truncated or belongs to another model; fetch or export it again",
        )


def _tensors(model: ir.Model) -> Iterator[tuple[ir.Value | None, ir.TensorProtocol]]:
    """All tensors of graphs and attributes, with the value of those that are initializers."""
    yield from _initializers(model.graph)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for attribute in node.attributes.values():
                if attribute.is_ref() or attribute.value is None:
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    # Not `as_tensor()`: its check against a protocol takes longer than all else here.
                    yield None, attribute.value
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from ((None, tensor) for tensor in attribute.as_tensors())
                elif attribute.type == ir.AttributeType.GRAPH:
                    yield from _initializers(attribute.as_graph())
                elif attribute.type == ir.AttributeType.GRAPHS:
                    for subgraph in attribute.as_graphs():
                        yield from _initializers(subgraph)


def _initializers(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value, value.const_value


def _check_hint(path: Path) -> str:
    return f"fetch or export {path.name} again; is it complete?"
