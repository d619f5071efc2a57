"""Which node runs where. Nothing may fall back from CUDA to the CPU in silence.

ONNX Runtime plans a session when it is created, so the plan can be read without running anything. Small integer
arithmetic on shapes belongs on the CPU; a float node there, or a copy between the devices in the middle of the graph,
costs more on every step than the GPU gains.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from onnxpress.compiler.errors import OptionError, ProviderError, near_miss
from onnxpress.runtime import providers as _providers
from onnxpress.runtime.config import find_model
from onnxpress.runtime.session import open_session
from onnxpress.runtime.skeleton import Skeleton, check_external_data, read

_FLOATS = frozenset({1, 10, 11, 16, 17, 18, 19, 20, 23, 24})  # of TensorProto.DataType
_INTEGER = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})  # always int64
_LOGICAL = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "IsNaN"})
_COPIES = frozenset({"MemcpyToHost", "MemcpyFromHost"})


@dataclass(frozen=True)
class Placement:
    """The plan of a session.

    Attributes:
        provider: cpu or cuda, the one the plan was made for.
        operators: for each execution provider, how many nodes of each operator.
        stray: float nodes on the CPU though the provider is CUDA, as `operator name`.
        copies: copies between the devices, of inputs and outputs included.
        inner_copies: copies of values that are neither input nor output of the graph, by name.
    """

    provider: str
    operators: dict[str, dict[str, int]]
    stray: tuple[str, ...]
    copies: int
    inner_copies: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether everything that matters runs on the provider asked for."""
        return not self.stray and not self.inner_copies

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the attributes."""
        return {
            "provider": self.provider,
            "operators": self.operators,
            "stray": list(self.stray),
            "copies": self.copies,
            "inner_copies": list(self.inner_copies),
        }


def audit(path: str | Path, provider: str = "cuda", *, strict: bool = False) -> Placement:
    """Plans a session and says which node runs where; runs nothing.

    Args:
        path: a model directory or an .onnx file, of any kind of model.
        provider: cpu or cuda.
        strict: fail where a float node strays to the CPU or a value is copied between devices.

    Raises:
        BadModelFileError: the file is missing or broken.
        OptionError: there is no such provider.
        ProviderError: CUDA cannot make a session; or `strict`, and the plan is not clean.
    """
    if provider not in ("cpu", "cuda"):
        raise OptionError(
            f"provider: expected cpu or cuda, got {provider!r}", hint=near_miss(provider, ("cpu", "cuda"))
        )
    model = find_model(path)
    check_external_data(read(model))
    if provider == "cuda":
        if _providers.CUDA not in ort.get_available_providers():
            raise ProviderError(
                f"{model}: this onnxruntime was built without CUDA", hint="install the package onnxruntime-gpu"
            )
        missing = _providers.missing_cuda_libraries()
        if missing:
            raise ProviderError(
                f"{model}: a plan for CUDA needs its libraries, not found: {', '.join(missing)}",
                hint="install CUDA, or ask for the cpu",
            )
    names = (_providers.CUDA, _providers.CPU) if provider == "cuda" else (_providers.CPU,)
    with tempfile.TemporaryDirectory(prefix="onnxpress-placement-") as folder:
        planned = Path(folder) / "planned.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(planned)
        # The weights of the planned model go beside it: inside, they could exceed what one file holds.
        entries = {
            "session.record_ep_graph_assignment_info": "1",
            "session.optimized_model_external_initializers_file_name": "planned.data",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        session = open_session(model, names, entries=entries, options=options)
        if provider == "cuda" and _providers.CUDA not in session.get_providers():
            raise ProviderError(f"{model}: ONNX Runtime refused the CUDA provider", hint="see `onnxpress doctor`")
        placement = _placement(provider, session, read(planned))
    if strict and not placement.is_clean:
        found = [*placement.stray, *(f"copy of {name}" for name in placement.inner_copies)]
        raise ProviderError(
            f"{model}: expected every float node on {provider}, got on the CPU or copied: {', '.join(found[:8])}"
            f"{f' and {len(found) - 8} more' if len(found) > 8 else ''}",
            hint=f"optimize the model with --target {provider}",
        )
    return placement


def _placement(provider: str, session: Any, planned: Skeleton) -> Placement:
    operators: dict[str, Counter[str]] = {}
    on_cpu: set[str] = set()
    for part in session.get_provider_graph_assignment_info():
        counts = operators.setdefault(part.ep_name, Counter())
        for node in part.get_nodes():
            counts[node.op_type] += 1
            if part.ep_name == _providers.CPU:
                on_cpu.add(node.name)
    types = _types(planned)
    stray: list[str] = []
    inner: list[str] = []
    copies = 0
    for node in planned.nodes:
        if node.op_type in _COPIES:
            copies += 1
            if node.inputs[0] not in planned.inputs and node.outputs[0] not in planned.outputs:
                inner.append(node.inputs[0])
        elif provider != "cpu" and node.name in on_cpu and _is_float(node.outputs, types):
            stray.append(f"{node.op_type} {node.name}")
    histogram = {name: dict(counts.most_common()) for name, counts in sorted(operators.items())}
    return Placement(provider, histogram, tuple(stray), copies, tuple(inner))


def _types(planned: Skeleton) -> dict[str, int]:
    """Element types of the values of a planned graph: those it states, and those that follow from them."""
    types = {name: kind for name, kind in planned.types.items() if kind}
    for node in planned.nodes:
        if node.op_type == "Cast":
            kind = node.to
        elif node.op_type in _INTEGER:
            kind = 7
        elif node.op_type in _LOGICAL:
            kind = 9
        else:
            sources = node.inputs[1:] if node.op_type == "Where" else node.inputs
            kind = next((types[name] for name in sources if name in types), 0)
        if kind:
            for name in node.outputs:
                types.setdefault(name, kind)
    return types


def _is_float(names: tuple[str, ...], types: dict[str, int]) -> bool:
    """Whether a value is of a float type. One of unknown type counts: better a false alarm than a silent fallback."""
    return any(types.get(name, 1) in _FLOATS for name in names if name)
