"""`onnxpress doctor`: versions, providers and what this machine can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxpress.compiler.cli.common import Json, Quiet, emit, escape, size, working

if TYPE_CHECKING:
    from rich.console import Console


def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Show versions, execution providers and why CUDA is or is not used, kernels, memory and its bandwidth."""
    from onnx_ir import DataType

    from onnxpress.compiler.kernels import probe_kernels
    from onnxpress.compiler.report import versions
    from onnxpress.runtime import providers

    with working(quiet=quiet or as_json) as progress:
        progress.tell("looking at this machine")
        facts: dict[str, Any] = {"versions": versions(), **providers.explain(), "cpu_kernels": probe_kernels()}
        if facts["cuda_usable"]:
            facts["cuda_kernels"] = probe_kernels(providers.CUDA, DataType.FLOAT16)
    emit(facts, as_json=as_json, quiet=quiet, show=lambda console: _show(console, facts))


def _show(console: Console, facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        if key.endswith("_kernels"):
            console.print(f"{key.replace('_', ' ')}:")
            for operator, answer in value.items():
                console.print(f"  {operator:<34} {escape(answer)}")
            continue
        name = key.removesuffix("_bytes").removesuffix("_bytes_per_s").replace("_", " ")
        console.print(f"{name:<22} {escape(_text(key, value))}")


def _text(key: str, value: Any) -> str:
    if key.endswith("_bytes_per_s"):
        return f"{size(value)}/s"
    if key.endswith("_bytes"):
        return size(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(name, one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
