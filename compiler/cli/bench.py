"""`onnxpress bench`: load time, time to first token, tokens per second, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxpress.compiler.cli.common import (
    AdapterPath,
    Json,
    PathArgument,
    Provider,
    Quiet,
    Strict,
    Threads,
    emit,
    escape,
    size,
    working,
)

if TYPE_CHECKING:
    from rich.console import Console


def bench(
    path: PathArgument,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    rounds: Annotated[int, typer.Option(help="Measurements, of which the median counts.")] = 3,
    provider: Provider = "auto",
    threads: Threads = None,
    strict: Strict = False,
    adapter: AdapterPath = None,
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
            rounds=rounds,
            provider=provider,
            threads=threads,
            strict=strict,
            adapter=adapter,
        )
    facts = {"path": path, **found.to_json()}
    emit(facts, as_json=as_json, quiet=quiet, show=lambda console: _show(console, facts))


def _show(console: Console, facts: dict[str, Any]) -> None:
    threads = facts["threads"] or "all physical"
    rows = [
        ("workload", f"{facts['batch']} x ({facts['prompt_tokens']} prompt + {facts['new_tokens']} new tokens)"),
        ("provider", f"{facts['provider']}: {facts['provider_reason']}"),
        ("machine", f"{facts['cpu']}, {facts['cores']} cores, {threads} threads, onnxruntime {facts['onnxruntime']}"),
        ("load", f"{facts['load_s']:.3f} s"),
        ("time to first token", f"{facts['time_to_first_token_s']:.3f} s"),
        ("prefill", f"{facts['prefill_tokens_per_s']:,.1f} tokens per second"),
        ("decode", f"{facts['decode_tokens_per_s']:,.1f} tokens per second"),
        ("peak memory", f"{size(facts['peak_memory_bytes'])}, {size(facts['base_memory_bytes'])} before loading"),
        ("cache per token", size(facts["cache_bytes_per_token"])),
        ("read per token", size(facts["bytes_read_per_token"])),
        (
            "memory bandwidth",
            f"{facts['bandwidth_share']:.0%} of {size(facts['memory_bandwidth_bytes_per_s'])} per second",
        ),
    ]
    for name, value in rows:
        console.print(f"{name:<19} {escape(value)}")
