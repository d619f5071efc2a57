"""LoRA adapters of a session: read once, then a request names the one that serves it.

A graph with slots (`NAME.lora_A`, `NAME.lora_B`: inputs with an empty default) takes its adapter as inputs. They are
bound like all others, since ONNX Runtime ignores the adapters of its own run options wherever inputs are bound
(1.31.1): to switch is to bind other addresses. A text keeps its adapter to its end, for the cache holds what it made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from onnxpress.compiler.errors import BadModelFileError, OptionError, UnsupportedModelError, near_miss
from onnxpress.runtime.config import read_json

if TYPE_CHECKING:
    from onnxpress.compiler.lora_slots import Slot

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": ml_dtypes.bfloat16}


@dataclass(frozen=True, eq=False)
class Adapter:
    """What fills the slots of a graph.

    Attributes:
        name: by which requests ask for it, "" for no adapter.
        path: where it came from.
        values: `OrtValue` by input, for the slots that it fills; the others keep their empty defaults.
    """

    name: str = ""
    path: Path | None = None
    values: Mapping[str, ort.OrtValue] = field(default_factory=dict)

    def bind(self, binding: ort.IOBinding) -> None:
        """Binds the inputs: addresses only, nothing is copied."""
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)


NO_ADAPTER = Adapter()


class Adapters:
    """The adapters that a session has loaded.

    Args:
        path: of the graph; the `config.json` beside it tells how packed rows of an adapter lie.
        slots: of the graph, by name.
        device: where the session computes; adapters lie there.
    """

    def __init__(self, path: Path, slots: Mapping[str, Slot], device: str = "cpu") -> None:
        self.path, self.slots, self._device = path, slots, device
        self.default: str | None = None  # serves whoever names none
        self._loaded: dict[str, Adapter] = {}

    @property
    def names(self) -> list[str]:
        """Those loaded, in their order."""
        return list(self._loaded)

    def load(self, path: str | Path, name: str | None = None) -> str:
        """Reads an adapter; one of the same name is replaced for texts that begin later.

        Args:
            path: an `.onnx_adapter` file, or the directory of a PEFT adapter.
            name: for requests; by default that of the file or directory.

        Returns:
            The name.

        Raises:
            UnsupportedModelError: the graph has no slots, or none for this adapter.
            BadModelFileError: the adapter is missing or damaged.
        """
        # Imported here: a model without adapters needs no part of the compiler.
        from onnxpress.compiler.lora_slots import fill, read_adapter, value_of
        from onnxpress.compiler.peft import is_peft, read_peft

        path = Path(path).expanduser()
        name = path.resolve().name.removesuffix(".onnx_adapter") if name is None else name
        if not name:
            raise OptionError("adapter: expected a name, got ''", hint="leave it out for that of the file")
        if not self.slots:
            raise UnsupportedModelError(
                f"{self.path}: expected a graph with slots for adapters, found none",
                hint="make one: onnxpress lora slots MODEL -o DIR",
            )
        values: dict[str, Any]
        if is_peft(path):
            filled = fill(read_peft(path), self.slots, read_json(self.path.parent / "config.json"))
            values = {key: value_of(array) for key, array in filled.items()}
        elif path.is_dir():
            raise BadModelFileError(
                f"{path}: expected an .onnx_adapter file or a PEFT directory, found no adapter_config.json in it",
                hint="check the path; a PEFT adapter is a directory with adapter_config.json and weights",
            )
        else:
            values = read_adapter(path, self.slots)
        self._loaded[name] = Adapter(name, path, {key: self._placed(value) for key, value in values.items()})
        return name

    def _placed(self, value: ort.OrtValue) -> ort.OrtValue:
        """The value on the session's device. numpy knows no bfloat16: such a one is copied whenever it is bound."""
        if self._device == "cpu" or value.data_type() == "tensor(bfloat16)":
            return value
        return ort.OrtValue.ortvalue_from_numpy(value.numpy(), self._device, 0)

    def find(self, name: str | None) -> Adapter:
        """A loaded adapter; None is the default, "" none at all.

        Raises:
            OptionError: no such adapter is loaded.
        """
        name = self.default if name is None else name
        if not name:
            return NO_ADAPTER
        if not isinstance(name, str) or name not in self._loaded:
            hint = (
                isinstance(name, str) and near_miss(name, self._loaded)
            ) or "load it first: load_adapter(path, name)"
            raise OptionError(f"adapter: expected the name of a loaded one, got {name!r}", hint=hint)
        return self._loaded[name]


def find_slots(session: ort.InferenceSession) -> dict[str, Slot]:
    """The slots of a loaded graph, by name."""
    overridable = [value for value in session.get_overridable_initializers() if ".lora_" in value.name]
    if not overridable:
        return {}
    from onnxpress.compiler.lora_slots import PATHS, Slot, read_paths
    from onnxpress.compiler.lora_targets import SLOT

    sides: dict[str, dict[str, Any]] = {}
    for value in overridable:
        if match := SLOT.match(value.name):
            sides.setdefault(match.group(1), {})[match.group(2)] = value
    paths = read_paths(session.get_modelmeta().custom_metadata_map.get(PATHS))
    found = {}
    for name, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].type not in _TYPES:
            continue
        num_in, num_out = pair["A"].shape[0], pair["B"].shape[1]
        if isinstance(num_in, int) and isinstance(num_out, int):
            found[name] = Slot(name, num_in, num_out, _TYPES[pair["A"].type], paths.get(name, ()))
    return found
