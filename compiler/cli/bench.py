"""`onnxpress bench`: load time, time to first token, tokens per second, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxpress.compiler.cli.common import Json, PathArgument, Provider, Quiet, Strict, Threads, emit, size, working

if TYPE_CHECKING:
    from rich.console import Console


def bench(
    path: PathArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    provider: Provider = "auto",
    threads: Threads = None,
    strict: Strict = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed and memory of a model, and the share of this machine's memory bandwidth that decoding reaches."""
    from onnxpress.runtime.benchmark import benchmark

    with working(quiet=quiet or as_json) as progress:
        progress.tell("measuring")
        found = benchmark(
            path,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            provider=provider,
            threads=threads,
            strict=strict,
        )
    facts = {"path": path, **found.to_json()}
    emit(facts, as_json=as_json, quiet=quiet, show=lambda console: _show(console, facts))


def _show(console: Console, facts: dict[str, Any]) -> None:
    for key, value in facts.items():
        console.print(f"{_name(key):<30} {_text(key, value)}")


def _name(key: str) -> str:
    for suffix in ("_bytes_per_s", "_per_s", "_bytes", "_s"):
        if key.endswith(suffix):
            key = key.removesuffix(suffix)
            return f"{key} per second".replace("_", " ") if suffix.endswith("per_s") else key.replace("_", " ")
    return key.replace("_", " ")


def _text(key: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if key.endswith(("_bytes", "_bytes_per_s", "bytes_per_token")):
        return size(value)
    if key.endswith("_per_s"):
        return f"{value:,.1f}"
    if key.endswith("_s"):
        return f"{value:.3f} s"
    if key.endswith("share"):
        return f"{value:.0%}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
