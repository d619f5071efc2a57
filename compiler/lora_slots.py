"""Slots: pairs of inputs `NAME.lora_A` [K, R] and `NAME.lora_B` [R, N] that a graph adds to a product, of any rank R.

Their defaults have rank 0, so that a session that knows nothing of them computes what it always did. What fills them
comes from a PEFT directory or an `.onnx_adapter` file; in both, names and shapes are checked against the slots.

Axes: N out features, K in features, R rank
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError, near_miss
from onnxpress.compiler.lora_targets import SLOT, Target, locate, place
from onnxpress.compiler.peft import Adapter

Array = npt.NDArray[Any]

PATHS = "onnxpress.slots"  # metadata of the model: names of linears by slot
ADAPTER_VERSION = 1
_MAX_RANK = 1 << 16
_IDENTIFIER = b"TORT"


@dataclass(frozen=True)
class Slot:
    """A pair of inputs.

    Attributes:
        name: "block0.q"; the inputs are `name.lora_A` and `name.lora_B`.
        num_in, num_out: K and N.
        dtype: numpy's, of both.
        paths: names that its linear had in the graph, which tell a module where roles do not.
    """

    name: str
    num_in: int
    num_out: int
    dtype: Any
    paths: tuple[str, ...] = ()

    @property
    def target(self) -> Target:
        """The slot as what an adapter may name."""
        match = re.match(r"^(?:block(\d+)\.)?([a-z_]+?)(?:\.\d+)?$", self.name)
        block = int(match.group(1)) if match and match.group(1) else None
        kind = match.group(2) if match else "linear"
        return Target(self.name, kind, block, (self.num_out, self.num_in), self.paths or (self.name,))


def write_paths(slots: Mapping[str, Sequence[str]]) -> str:
    """The text in which a model keeps the `paths` of its slots, under `PATHS`."""
    return json.dumps({name: list(paths) for name, paths in slots.items()}, separators=(",", ":"))


def read_paths(text: str | None) -> dict[str, tuple[str, ...]]:
    """What `write_paths` wrote; {} for anything else."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: tuple(map(str, paths)) for name, paths in found.items() if isinstance(paths, list)}


def fill(adapter: Adapter, slots: Mapping[str, Slot], config: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of an adapter, by input.

    Args:
        adapter: from PEFT.
        slots: of the graph, by name.
        config: `config.json` of the model; tells how packed rows lie.

    Raises:
        UnsupportedModelError: a module has no slot, or the adapter adds more than a product.
    """
    targets = [slot.target for slot in slots.values()]
    pieces: dict[str, list[tuple[Array, Array]]] = {}
    taken: dict[str, str] = {}
    for module, update in adapter.updates.items():
        if update.magnitude_N is not None:
            raise UnsupportedModelError(
                f"{adapter.path}: {module}: DoRA scales the rows of the weight, which a slot cannot",
                hint="merge it: onnxpress lora merge",
            )
        try:
            places = place(module, update.shape, targets, config, is_table=update.is_table)
        except UnsupportedModelError as error:
            kind = "embedding" if update.is_table else locate(module)[1]
            if kind is not None and not any(one.kind == kind or kind.startswith(one.kind) for one in targets):
                raise UnsupportedModelError(
                    f"{adapter.path}: {module}: expected a slot for it, the graph has none of kind {kind!r}",
                    hint=f"make them: onnxpress lora slots MODEL --also {kind}",
                ) from None
            error.message = f"{adapter.path}: {error.message}"
            raise
        for one in places:
            other = taken.setdefault(one.target.name, module)
            if other != module:
                raise UnsupportedModelError(
                    f"{adapter.path}: expected one module for {one.target.name}, found {other} and {module}",
                    hint="the adapter holds modules of another part of the model, which this graph lacks",
                )
            b_NR = update.b_NR if one.rows is None else update.b_NR[one.rows]
            pieces.setdefault(one.target.name, []).append((update.a_RK.T, b_NR.T))
    found: dict[str, Array] = {}
    for name, parts in pieces.items():
        slot = slots[name]
        for side, arrays, axis in (("A", [a for a, _ in parts], 1), ("B", [b for _, b in parts], 0)):
            whole = np.ascontiguousarray(np.concatenate(arrays, axis=axis)).astype(slot.dtype)
            if not np.isfinite(whole.astype(np.float32)).all():
                raise UnsupportedModelError(
                    f"{adapter.path}: {name}: lora_{side} has numbers that {np.dtype(slot.dtype)} does not hold",
                    hint="use a float32 model (--target cpu)",
                )
            found[f"{name}.lora_{side}"] = whole
    return found


def write_adapter(path: Path, arrays: Mapping[str, Array]) -> None:
    """Writes an `.onnx_adapter` file, which ONNX Runtime and onnxruntime-genai load."""
    import onnxruntime as ort

    form = ort.AdapterFormat()
    form.set_adapter_version(ADAPTER_VERSION)
    form.set_model_version(1)
    form.set_parameters({name: value_of(array) for name, array in arrays.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    form.export_adapter(str(path))


def read_adapter(path: Path, slots: Mapping[str, Slot]) -> dict[str, Any]:
    """The parameters of an `.onnx_adapter` file as `OrtValue`, by input, checked against the slots.

    Raises:
        BadModelFileError: the file is missing, damaged or no adapter, or its parameters do not fit together.
        UnsupportedModelError: it belongs to another model.
    """
    import onnxruntime as ort

    if not path.is_file():
        raise BadModelFileError(f"{path}: expected an adapter, found no such file", hint="check the path")
    with path.open("rb") as file:
        start = file.read(8)
    if start[4:8] != _IDENTIFIER:
        raise BadModelFileError(
            f"{path}: expected an .onnx_adapter file, found another format", hint="write one: onnxpress lora convert"
        )
    try:
        form = ort.AdapterFormat.read_adapter(str(path))
        values = dict(form.get_parameters())
    except Exception as error:  # of whatever type ONNX Runtime chooses
        # Its own place in C++ comes first, and tells a reader nothing.
        text = re.sub(r"^\S+\.cc:\d+ .*?\) ", "", " ".join(str(error).split()))[:200]
        raise BadModelFileError(
            f"{path}: damaged, ONNX Runtime cannot read it: {text}", hint="write it again: onnxpress lora convert"
        ) from error
    if not values:
        raise BadModelFileError(f"{path}: expected parameters, found none", hint="onnxpress lora convert writes them")
    ranks: dict[str, dict[str, int]] = {}
    for name, value in values.items():
        match = SLOT.match(name)
        slot = slots.get(match.group(1)) if match else None
        if match is None or slot is None:
            known = [f"{one}.lora_{side}" for one in slots for side in "AB"]
            raise UnsupportedModelError(
                f"{path}: {name[:100]!r}: expected the name of a slot of this model, found none",
                hint=near_miss(name[:100], known),
            )
        shape, side = list(value.shape()), match.group(2)
        axis, fixed = (1, slot.num_in) if side == "A" else (0, slot.num_out)
        if len(shape) != 2 or shape[1 - axis] != fixed or not 0 <= shape[axis] <= _MAX_RANK:
            wanted = f"[{fixed}, rank]" if side == "A" else f"[rank, {fixed}]"
            raise UnsupportedModelError(
                f"{path}: {name}: expected {wanted}, found {shape}", hint="the adapter belongs to another model"
            )
        expected = _TYPES[np.dtype(slot.dtype).name]
        if value.data_type() != expected:
            raise UnsupportedModelError(
                f"{path}: {name}: expected {expected}, found {value.data_type()}",
                hint="convert the adapter for this model: onnxpress lora convert",
            )
        if expected != _TYPES["bfloat16"] and not np.isfinite(value.numpy()).all():
            raise BadModelFileError(
                f"{path}: {name}: expected finite numbers, found NaN or infinity", hint="convert the adapter again"
            )
        ranks.setdefault(match.group(1), {})[side] = shape[axis]
    for name, sides in ranks.items():
        if len(sides) != 2 or sides["A"] != sides["B"]:
            found = " and ".join(f"lora_{side} of rank {rank}" for side, rank in sorted(sides.items()))
            raise BadModelFileError(
                f"{path}: {name}: expected lora_A and lora_B of one rank, found {found}",
                hint="write it again: onnxpress lora convert",
            )
    return values


_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
_ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}


def value_of(array: Array) -> Any:
    """An OrtValue over a copy of `array`; numpy has no bfloat16 of its own, so ONNX Runtime is told the type."""
    import onnxruntime as ort

    name = array.dtype.name
    bits = array.view(np.uint16) if name == "bfloat16" else array
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(bits), _ONNX_TYPES[name])
