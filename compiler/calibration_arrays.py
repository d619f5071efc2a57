"""Calibration data of models that read no text: arrays by the name of an input, from `.npz` and `.npy` files.

Axes: N samples, the first axis of every array
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.errors import CalibrationError

Array = npt.NDArray[Any]
Bound = tuple[Array, np.dtype[Any]]  # samples, and the type that an input has

SUFFIXES = (".npz", ".npy")
_BATCH = 8  # samples of a window, where the graph leaves it open
_HELD_OUT = 8  # one of so many samples is left for measuring the loss
_FORM = (
    "give a .npz file with an array for each input, samples along the first axis: np.savez('data.npz', input=images)"
)


@dataclass(frozen=True)
class CalibrationArrays:
    """Samples that the user gave.

    Attributes:
        arrays: by the name that they have in the files, each [N, ...]; {} when there are none.
        about: where they come from, for the card.
    """

    arrays: Mapping[str, Array] = field(default_factory=dict)
    about: str = ""

    def __bool__(self) -> bool:
        return bool(self.arrays)

    def windows(self, graph: ir.Graph, count: int) -> tuple[list[dict[str, Array]], dict[str, Any]]:
        """Inputs of the model, a batch each and all of the same shape, and facts for the card.

        Args:
            graph: its inputs say what is read.
            count: of samples at most, evenly spread over those that are not held out; one window at least.

        Raises:
            CalibrationError: the arrays are not what the graph reads.
        """
        bound = self._bound(graph)
        total = min(len(one) for one, _ in bound.values())
        batch = min(self._batch(graph) or _BATCH, total)
        left = np.arange(max(batch, total - self._held(total)))
        windows = max(1, min(count, len(left)) // batch)
        chosen = left[np.unique(np.linspace(0, len(left) - 1, windows * batch).round().astype(int))]
        taken = [self._rows(bound, rows) for rows in chosen.reshape(-1, batch)]
        digest = hashlib.sha256()
        for feeds in taken:
            for name in sorted(feeds):
                digest.update(np.ascontiguousarray(feeds[name]).tobytes())
        samples = f"{len(chosen)} sample{'s' * (len(chosen) > 1)}"
        facts = {"text": f"{samples} of {self.about}{self._told(bound)}", "windows": [len(taken), batch]}
        return taken, {**facts, "sha256": digest.hexdigest()}

    def held_out(self, graph: ir.Graph) -> tuple[dict[str, Array], str]:
        """One batch for measuring the loss, of samples that `windows` does not give where there are enough."""
        bound = self._bound(graph)
        total = min(len(one) for one, _ in bound.values())
        batch = self._batch(graph) or min(max(1, self._held(total)), 32)
        about = f"{batch} samples of {self.about}" + (", held out" if self._held(total) >= batch else "")
        return self._rows(bound, np.arange(total - batch, total)), about

    def _rows(self, bound: Mapping[str, Bound], rows: npt.NDArray[np.integer]) -> dict[str, Array]:
        """Some samples, of the types that the graph reads."""
        found = {name: array[rows].astype(dtype, copy=False) for name, (array, dtype) in bound.items()}
        for name, array in found.items():
            if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
                raise CalibrationError(
                    f"calibration: {name!r} of {self.about} holds NaN", hint="leave out samples with missing numbers"
                )
        return found

    def _told(self, bound: Mapping[str, Bound]) -> str:
        """What a person may not expect: arrays of another name or type than the inputs, or that nothing reads."""
        own = {id(array): name for name, array in self.arrays.items()}
        said = []
        for name, (array, dtype) in bound.items():
            if (given := own.pop(id(array), name)) != name:
                said.append(f"{given!r} as {name}")
            if array.dtype != dtype:
                said.append(f"{name} from {array.dtype}, not scaled")
        said += [f"{name!r} not read" for name in own.values()]
        return f" ({', '.join(said)})" if said else ""

    @staticmethod
    def _held(total: int) -> int:
        return total // _HELD_OUT

    @staticmethod
    def _batch(graph: ir.Graph) -> int | None:
        """The size of a batch that the graph fixes."""
        sizes = [value.shape[0] for value in _needed(graph) if value.shape is not None and len(value.shape)]
        return next((int(one) for one in sizes if isinstance(one, int) and one > 0), None)  # some write -1 for any

    def _bound(self, graph: ir.Graph) -> dict[str, Bound]:
        """The array of each input that the graph needs, and the type that it reads."""
        needed = {str(value.name): value for value in _needed(graph)}
        arrays = dict(self.arrays)
        if len(needed) == 1 == len(arrays):  # whatever the file calls it
            arrays = dict(zip(needed, arrays.values(), strict=True))
        if missing := sorted(set(needed) - set(arrays)):
            raise CalibrationError(
                f"calibration: the model reads {', '.join(sorted(needed))}; {self.about} has no {missing[0]!r}, "
                f"only {', '.join(sorted(self.arrays))}",
                hint=_FORM,
            )
        found = {}
        for name, value in needed.items():
            array = arrays[name]
            shape = None if value.shape is None else list(value.shape)
            if shape is not None and (
                len(shape) != array.ndim
                or any(
                    isinstance(dim, int) and 0 < dim != size
                    for dim, size in zip(shape[1:], array.shape[1:], strict=True)
                )
                or (isinstance(shape[0], int) and len(array) < shape[0])
            ):
                raise CalibrationError(
                    f"calibration: {name!r} of {self.about}: expected "
                    f"{[dim if isinstance(dim, int) else str(dim or '?') for dim in shape]}, found {list(array.shape)}",
                    hint=_shape_hint(shape, array.shape),
                )
            found[name] = array, (value.dtype or ir.DataType.FLOAT).numpy()
        return found


def _shape_hint(wanted: list[Any], found: tuple[int, ...]) -> str:
    if len(found) == len(wanted) - 1:
        return "the first axis counts samples: of a single one give array[None]"
    turned = (found[0], found[-1], *found[1:-1])
    fits = len(turned) == len(wanted) and all(
        not isinstance(dim, int) or dim < 1 or dim == size for dim, size in zip(wanted[1:], turned[1:], strict=True)
    )
    return "channels come second: np.moveaxis(array, -1, 1)" if fits and len(found) > 2 else _FORM


def _needed(graph: ir.Graph) -> list[ir.Value]:
    """Inputs without a default."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def _load(path: Path) -> dict[str, Array]:
    """The arrays of a file, by name."""
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return {path.stem: loaded}
    with loaded:
        held = {key: loaded[key] for key in loaded.files}
    if others := [key for key, one in held.items() if not isinstance(one, np.ndarray)]:
        raise ValueError(f"{others[0]} is none")
    return held


def read_arrays(files: list[Path]) -> CalibrationArrays:
    """Samples of all files; arrays of the same name are put one after the other.

    Args:
        files: `.npz` files with an array for each input, or `.npy` files named after one. Pickled objects are not read.

    Raises:
        CalibrationError: a file cannot be read, or its arrays do not fit those of another.
    """
    parts: dict[str, list[Array]] = {}
    for path in files:
        try:
            held = _load(path)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CalibrationError(f"{path}: expected arrays of numpy: {error}", hint=_FORM) from error
        for name, array in held.items():
            if not array.ndim or not len(array):
                raise CalibrationError(f"{path}: {name!r} has no samples: its shape is {list(array.shape)}", hint=_FORM)
            if name in parts and parts[name][0].shape[1:] != array.shape[1:]:
                raise CalibrationError(
                    f"{path}: {name!r} is {list(array.shape)}, and {list(parts[name][0].shape)} in another file",
                    hint="samples of one input have one shape",
                )
            parts.setdefault(name, []).append(array)
    if not files:
        return CalibrationArrays()
    if not parts:
        raise CalibrationError(f"{files[0]}: expected arrays, found none", hint=_FORM)
    if len({sum(map(len, some)) for some in parts.values()}) > 1:
        counts = ", ".join(f"{name} {sum(map(len, some))}" for name, some in sorted(parts.items()))
        raise CalibrationError(f"{files[0]}: inputs have different numbers of samples: {counts}", hint=_FORM)
    arrays = {name: np.concatenate(some) if len(some) > 1 else some[0] for name, some in parts.items()}
    return CalibrationArrays(arrays, ", ".join(str(path.name) for path in files[:3]) + (", ..." if files[3:] else ""))
