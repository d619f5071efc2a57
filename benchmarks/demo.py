"""The whole way of a real model: fetched, exported, made small, checked against the original, spoken to, measured.

    python benchmarks/demo.py [--output DIR]

Everything here goes through the public face of onnxpress; the same steps as commands stand in the README.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import onnxpress
from onnxpress.runtime.benchmark import benchmark

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write one sentence in praise of small language models.",
)
console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("out"), help="where models are written (default: out)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of text for the comparison (default: 2048)")
    output = parser.parse_args().output
    tokens = parser.parse_args().tokens
    start = time.perf_counter()

    step("1. SmolLM2-135M-Instruct to ONNX (fetches 90 MB once, exports with optimum)")
    source = onnxpress.export("smollm2-135m", output / "smollm2-135m", tell=note)
    step("2. Fused, and fitted to text with the recipe int4 (minutes); every exact and close pass is verified")
    small = onnxpress.optimize(
        source.directory, output=output / "smollm2-135m-int4", recipe="int4", verify=True, tell=note
    )
    step(f"3. Compared with the original on {tokens} tokens of English text")
    found = small.evaluate(reference=source, tokens=tokens)
    step("4. Some answers of the small model")
    for prompt in PROMPTS:
        console.print(f"[bold]{prompt}[/bold]")
        console.print(small.generate(prompt, max_new_tokens=60).strip(), highlight=False)
    step("5. Speed and memory of both, each in a process of its own")
    before, after = (benchmark(one.directory, prompt_tokens=128, new_tokens=64) for one in (source, small))
    card(source, small, found, before.to_json(), after.to_json())
    # Installed by `make`, the command is not on the search path.
    command = shutil.which("onnxpress") or Path(sys.executable).with_name("onnxpress")
    console.print(f"{time.perf_counter() - start:.0f} s in all. The artifact: {small.directory}")
    console.print(f'Talk to it: {command} run {small.directory} "your question"')
    return 0


def card(source: Any, small: Any, found: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Size, quality and speed, before and after."""
    table = Table(title="SmolLM2-135M-Instruct")
    for name in ("", "original", "int4", "ratio"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, one: float, two: float, unit: str, scale: float = 1.0, digits: int = 1) -> None:
        one, two = one / scale, two / scale
        table.add_row(name, f"{one:,.{digits}f} {unit}", f"{two:,.{digits}f} {unit}", f"{two / one:.2f}")

    row("model data", source.nbytes, small.nbytes, "MB", 1e6)
    row("operators", *(one.report["size"]["nodes_after"] for one in (source, small)), "", digits=0)
    row("perplexity", found.reference_perplexity, found.perplexity, "", digits=2)
    row("prompt", before["prefill_tokens_per_s"], after["prefill_tokens_per_s"], "tokens/s")
    row("decode", before["decode_tokens_per_s"], after["decode_tokens_per_s"], "tokens/s")
    row("peak memory", before["peak_memory_bytes"], after["peak_memory_bytes"], "MB", 1e6, 0)
    table.add_row("KL divergence", "", f"{found.kl:.4f} nats", "")
    table.add_row("same first choice", "", f"{found.top1_agreement:.1%}", "")
    console.print(table)


def step(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


def note(text: str) -> None:
    console.print(f"   {text}", style="dim", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
