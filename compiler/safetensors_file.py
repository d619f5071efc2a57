"""Reads and writes `.safetensors` files: a JSON header that says where each array lies, then the bytes.

Files come from strangers, so sizes, types and places are checked before anything is read; nothing in them can run.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import BadModelFileError

Array = npt.NDArray[Any]

MAX_HEADER = 100_000_000  # bytes, the limit of the format's own library
_TYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_TYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_}
for _bits in (8, 16, 32, 64):
    _TYPES |= {f"I{_bits}": np.dtype(f"int{_bits}"), f"U{_bits}": np.dtype(f"uint{_bits}")}
_MAX_DIMENSIONS = 32


def read(path: Path) -> dict[str, Array]:
    """The arrays of a file by name, memory-mapped and read-only.

    Raises:
        BadModelFileError: the file is missing or truncated, or its header does not fit its bytes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise _bad(path, f"a header within its {size} bytes", f"one of {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise BadModelFileError(f"{path}: cannot be read: {error.strerror}", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise _bad(path, "a header of JSON", str(error)[:80]) from error
    if not isinstance(header, dict):
        raise _bad(path, "a header that is a JSON object", type(header).__name__)
    room = size - 8 - length
    data: Array = np.memmap(path, np.uint8, "r", 8 + length) if room else np.empty(0, np.uint8)
    found: dict[str, Array] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        found[name], span = _array(path, name, entry, data)
        spans.append((*span, name))
    spans.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise _bad(path, "arrays apart from each other", f"{first!r} and {second!r} in the same bytes")
    return found


def write(path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Writes float32 arrays, in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, offset + 4 * array.size]}
        offset += 4 * array.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, np.float32).tobytes())


def _array(path: Path, name: str, entry: Any, data: Array) -> tuple[Array, tuple[int, int]]:
    """The array that an entry of the header describes, and where it lies in `data`."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in _TYPES:
        raise _bad(path, f"a known type of {name!r}", repr(kind))
    sizes, span = _counts(shape), _counts(place)
    if sizes is None or span is None or len(span) != 2:
        raise _bad(path, f"shape and place of {name!r} as whole numbers", f"{shape!r} and {place!r}"[:120])
    if len(sizes) > _MAX_DIMENSIONS:
        raise _bad(path, f"at most {_MAX_DIMENSIONS} dimensions of {name!r}", str(len(sizes)))
    dtype, (begin, end) = np.dtype(_TYPES[kind]), span
    nbytes = math.prod(sizes) * dtype.itemsize
    # numpy makes no array of sizes too large for it, even where one of them is 0.
    if not begin <= end <= data.size or end - begin != nbytes or math.prod(max(one, 1) for one in sizes) >= 2**60:
        expected = f"{nbytes} bytes of {name!r} among {data.size}"
        raise _bad(path, expected, f"bytes {begin} to {end}")
    return data[begin:end].view(dtype).reshape(sizes), (begin, end)


def _counts(value: Any) -> list[int] | None:
    """A list of sizes, None when it is anything else."""
    is_list = isinstance(value, list) and all(type(one) is int and 0 <= one < 2**48 for one in value)
    return value if is_list else None


def _bad(path: Path, expected: str, found: str) -> BadModelFileError:
    return BadModelFileError(
        f"{path}: expected {expected}, found {found}", hint="fetch or save the file again; it is damaged"
    )
