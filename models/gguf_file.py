"""Opens a GGUF file as untrusted input: what its header promises is checked against the bytes that are there."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError

_VERSIONS = (2, 3)
_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, metadata entries
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # metadata type: bytes
_STRING, _ARRAY = 8, 9
_MAX_RANK = 4


def check(path: Path) -> dict[str, str]:
    """Walks over the metadata and the table of tensors, in a third of a second, before anything expensive starts.

    Returns:
        Tensor name to type, such as "Q4_0".

    Raises:
        BadModelFileError: the file is no GGUF, of another byte order or version, damaged, or shorter than its tensors.
        UnsupportedModelError: a tensor is of a type that the gguf package does not know.
    """
    try:
        with path.open("rb") as file:
            return _Walk(file, path).check()
    except OSError as error:
        raise BadModelFileError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error


class _Walk:
    """One pass over a GGUF header; every read is checked against the size of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = path.stat().st_size

    def check(self) -> dict[str, str]:
        """Types of the tensors; raises unless the header is whole and every tensor lies inside the file."""
        import gguf

        head = self.file.read(_HEADER.size)
        if head.startswith(b"version https://git-lfs"):
            raise BadModelFileError(
                f"{self.path}: expected GGUF, found a git-lfs pointer", hint="fetch it: git lfs pull"
            )
        if head[:4] != b"GGUF":
            raise BadModelFileError(
                f"{self.path}: expected a GGUF file, it begins with {head[:4]!r}", hint="fetch the file again"
            )
        if len(head) < _HEADER.size:
            raise self.truncated(_HEADER.size)
        _, version, num_tensors, num_entries = _HEADER.unpack(head)
        if version not in _VERSIONS:
            raise BadModelFileError(
                f"{self.path}: expected GGUF version 2 or 3, little-endian, found {version:#x}",
                hint="convert it with a current llama.cpp",
            )
        if not num_tensors:
            raise BadModelFileError(f"{self.path}: expected tensors, found none", hint="is it a vocabulary-only file?")
        alignment = 32
        for _ in range(num_entries):
            key, kind = self.text(), self.number("I")
            if key == b"general.alignment" and kind == 4:
                alignment = self.number("I")
            else:
                self.skip(kind)
        if alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"alignment {alignment} is no power of two")
        tensors = [self.tensor(gguf) for _ in range(num_tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        for name, end, _ in tensors:
            if start + end > self.size:
                raise self.truncated(start + end, f"for tensor {name.decode(errors='replace')!r}")
        return {name.decode(errors="replace"): kind for name, _, kind in tensors}

    def tensor(self, gguf: Any) -> tuple[bytes, int, str]:
        """Name of the next tensor of the table, where it ends in the data, and its type."""
        name, rank = self.text(), self.number("I")
        if rank > _MAX_RANK:
            raise self.damaged(f"a tensor of {rank} dimensions")
        elements = math.prod(self.number("Q") for _ in range(rank))
        kind, offset = self.number("I"), self.number("Q")
        try:
            known = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[known]
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name.decode(errors='replace')!r} is of type {kind}, which gguf does not know",
                hint="update the gguf package, or quantize the model in another format",
            ) from error
        return name, offset + elements // block * size, known.name

    def skip(self, kind: int, depth: int = 0) -> None:
        """Steps over a metadata value."""
        if kind in _SCALARS:
            self.step(_SCALARS[kind])
        elif kind == _STRING:
            self.step(self.number("Q"))
        elif kind == _ARRAY and depth < _MAX_RANK:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                self.step(count * _SCALARS[inner])
            else:
                for _ in range(count):
                    self.skip(inner, depth + 1)
        else:
            raise self.damaged(f"a value of type {kind}")

    def text(self) -> bytes:
        length = self.number("Q")
        start = self.file.tell()
        self.step(length)
        self.file.seek(start)
        return self.file.read(length)

    def number(self, form: str) -> int:
        content = self.file.read(struct.calcsize(form))
        if len(content) < struct.calcsize(form):
            raise self.truncated(self.file.tell() + 1)
        return int(struct.unpack(f"<{form}", content)[0])

    def step(self, length: int) -> None:
        if self.file.tell() + length > self.size:
            raise self.truncated(self.file.tell() + length)
        self.file.seek(length, 1)

    def truncated(self, expected: int, purpose: str = "for its header") -> BadModelFileError:
        return BadModelFileError(
            f"{self.path}: truncated: expected {expected:,} bytes {purpose}, found {self.size:,}",
            hint="fetch the file again",
        )

    def damaged(self, found: str) -> BadModelFileError:
        return BadModelFileError(
            f"{self.path}: damaged at byte {self.file.tell():,}: found {found}", hint="fetch the file again"
        )


def read(path: Path) -> Any:
    """A `gguf.GGUFReader` of the file.

    Raises:
        BadModelFileError, UnsupportedModelError: as `check`, or names repeat, or text is no UTF-8.
    """
    import gguf

    check(path)
    try:
        return gguf.GGUFReader(path)
    # The reader trusts the file: a damaged one makes it index, convert or decode what is not there.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise BadModelFileError(f"{path}: damaged: {error}", hint="fetch the file again") from error
