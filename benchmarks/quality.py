#!/usr/bin/env python
"""Size against perplexity, ours and the peers', from the same weights on the same tokens: a table and a picture.

    python benchmarks/quality.py --text test.txt --calibration valid.txt --output docs

Run it with the Python that has onnxpress and matplotlib (`pip install '.[benchmarks]'`). Peers: llama.cpp at every
type, onnxruntime-genai's builder, ONNX Runtime's own MatMulNBits quantizer. What was measured before is kept beside the
models and not measured again, unless the model's files have changed. Exit status: 0, 1 when a peer is smaller and
better than all of ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import environments
import perplexities
from checkpoints import Checkpoint, model_bytes, onnxpress, run
from client import HERE, Worker
from peers import _default_root, _existing, find_gguf
from rich.console import Console
from rich.table import Table
from terminal import BenchmarkError, say

TOKENS, CONTEXT = 8192, 1024
OURS, LLAMA, GENAI, ORT = "onnxpress", "llama.cpp", "onnxruntime-genai", "onnxruntime"

# What we ship, and pipelines between the sizes of the recipes.
PIPELINES = {
    "int8": "int8",
    "int4": "int4",
    "int4-small": "int4-small",
    "int4-fast": "int4-fast",
    "int4-rtn": "int4-rtn",
    # What the file holds, not rounded again.
    "kept": "fuse, keep_quantization, pack",
    "kept, float activations": "fuse, keep_quantization(accuracy_level=0), pack",
    "kept, float activations and head": "fuse,"
    " keep_quantization(accuracy_level=0, exclude=('head', 'embedding')), pack",
    "kept, steps in a byte": "fuse, keep_quantization(scale_bits=8), pack",
    "kept, head in 4 bits": "fuse, keep_quantization(scale_bits=8, exclude=('head', 'embedding')),"
    " gptq(block_size=64, symmetric=False), pack",
    "8 bits, blocks of 16": "fuse, gptq(bits=8, block_size=16), pack",
    "mixed 105.5MB": "fuse, mixed(size='105.5MB'), pack",
    "mixed 97MB": "fuse, mixed(size='97MB'), pack",
    "4 bits without zero points": "fuse, gptq(bits=4, head_bits=8, head_block_size=64), pack",
}
LLAMA_TYPES = (
    *("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_XS", "Q3_K_L", "Q3_K_M", "Q2_K"),
)
BUILDER = {
    "int8": ["-p", "int8"],
    "int4 b32": ["-p", "int4", "--extra_options", "block_size=32"],
    "int4 b64": ["-p", "int4", "--extra_options", "block_size=64"],
    "int4 b128": ["-p", "int4", "--extra_options", "block_size=128"],
    "int4 b32, int8 head": [
        *("-p", "int4", "--extra_options", "block_size=32", "matmul_mixed_precision=last_matmul:int8"),
    ],
    "k_quant, mixed": [
        *("-p", "int4", "--extra_options", "block_size=32", "algo_config=k_quant"),
        "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8",
    ],
}
QUANTIZER = ("default", "default asymmetric", "rtn", "k_quant", "hqq", "gptq")


@dataclass
class Point:
    """One model: who made it, how, its bytes, and what it predicts."""

    system: str
    name: str
    nbytes: int
    perplexity: float
    kl: float | None = None
    top1: float | None = None
    other: float | None = None


class Results:
    """What was measured, kept in a file as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError):
            self._rows = json.loads(path.read_text())

    def get(self, key: str, model: Path, settings: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        files = sorted(model.glob("*.onnx*")) if model.is_dir() else [model]
        state = [settings, *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]
        row = self._rows.get(key)
        if row is None or row["state"] != state:
            row = self._rows[key] = {"state": state, **measure()}
            self._path.write_text(json.dumps(self._rows, indent=1) + "\n")
        return row


def of_onnx(model: Path, reference: Path, text: Path) -> dict[str, Any]:
    say(f"perplexity of {model.name} on {text.name}")
    counts = ("--tokens", str(TOKENS), "--context", str(CONTEXT))
    command = onnxpress("eval", model, "--text", text, *counts, "--reference", reference, "--json", "--quiet")
    found = json.loads(run(command, f"onnxpress eval {model}"))
    return {key: found[key] for key in ("perplexity", "kl", "top1_agreement", "tokens", "detokenized")}


def measure(options: argparse.Namespace) -> Iterator[Point]:
    checkpoint = Checkpoint.of(find_gguf(options), options.work_dir or options.env_dir / "models")
    results = Results(checkpoint.folder / "quality.json")
    hugging_face = checkpoint.hugging_face()
    exported = checkpoint.exported(hugging_face)
    settings = f"{options.text} {options.other} {TOKENS} {CONTEXT}"

    def both(model: Path, *, is_ours: bool) -> dict[str, Any]:
        found = of_onnx(model, exported, options.text)
        if options.other and is_ours:
            other = of_onnx(model, exported, options.other)
            found |= {"other": other["perplexity"], "other_detokenized": other["detokenized"]}
        return found

    def onnx(system: str, name: str, model: Path) -> Point:
        row = results.get(f"{system} {name}", model, settings, partial(both, model, is_ours=system in (OURS, "source")))
        return Point(
            *(system, name, model_bytes(model), row["perplexity"]),
            *(row["kl"], row["top1_agreement"], row.get("other")),
        )

    yield onnx("source", "fp32", exported)
    for name, passes in PIPELINES.items():
        yield onnx(OURS, name, checkpoint.passed(exported, passes, options.calibration, fresh=options.fresh))
    if "genai" in options.peers:
        python = environments.provide(environments.GENAI, options.env_dir)
        for name, arguments in BUILDER.items():
            with skipping(f"{GENAI} {name}"):
                yield onnx(GENAI, name, checkpoint.built(python, hugging_face, name, arguments))
    if "ort" in options.peers:
        for name in QUANTIZER:
            with skipping(f"{ORT} {name}"):
                yield onnx(ORT, name, checkpoint.ort_quantized(exported, name, options.calibration or options.text))
    if "llama" in options.peers:
        python = environments.provide(environments.LLAMA, options.env_dir)
        source = results.get("source fp32", exported, settings, partial(both, exported, is_ours=True))
        ids = perplexities.token_ids(exported, options.text, detokenized=source["detokenized"], tokens=TOKENS)
        for kind in LLAMA_TYPES:
            path = checkpoint.requantized(python, kind)
            command = [str(python), str(HERE / "worker_llama.py"), str(path), str(options.threads), str(CONTEXT)]

            def ask(path: Path = path, kind: str = kind, command: list[str] = command) -> dict[str, Any]:
                with Worker(f"llama.cpp {kind}", command, checkpoint.folder / f"worker-{kind}.log") as worker:
                    return perplexities.of_gguf(worker, path, ids, context=CONTEXT)

            row = results.get(f"llama.cpp {kind}", path, settings, ask)
            yield Point(LLAMA, kind, model_bytes(path), row["perplexity"])


class skipping(suppress):  # noqa: N801  # reads as a statement
    """A peer's own failure is told, and costs one point."""

    def __init__(self, what: str) -> None:
        super().__init__(BenchmarkError)
        self._what = what

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, BenchmarkError):
            say(f"{self._what} is left out: {str(error).splitlines()[-1]}")
        return super().__exit__(kind, error, trace)


def beaten(points: list[Point]) -> list[Point]:
    """Peers' models that are smaller and better than each of ours."""
    ours = [one for one in points if one.system == OURS]
    return [
        peer
        for peer in points
        if peer.system not in (OURS, "source")
        and not any(one.nbytes <= peer.nbytes and one.perplexity <= peer.perplexity for one in ours)
    ]


def markdown(points: list[Point], options: argparse.Namespace) -> str:
    other = f"perplexity, {options.other.name}" if options.other else None
    heads = ["system", "model", "MB", "perplexity", "KL", "same first choice", *([other] if other else [])]
    rows = []
    for one in sorted(points, key=lambda one: -one.nbytes):
        cells = [one.system, one.name, f"{one.nbytes / 1e6:.1f}", f"{one.perplexity:.2f}"]
        cells += ["" if one.kl is None else f"{one.kl:.4f}", "" if one.top1 is None else f"{one.top1:.1%}"]
        rows.append([*cells, *(["" if one.other is None else f"{one.other:.2f}"] if other else [])])
    lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"


def draw(points: list[Point], path: Path) -> None:
    """Perplexity over size, the best of ours at each size joined by a line."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchmarkError("matplotlib is not installed", hint="pip install '.[benchmarks]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    shown = [one for one in points if one.system != "source"]
    top = 1.35 * min(one.perplexity for one in points)
    for system, mark in ((LLAMA, "s"), (GENAI, "^"), (ORT, "v"), (OURS, "o")):
        some = [one for one in shown if one.system == system]
        inside = [one for one in some if one.perplexity <= top and one.nbytes <= 160e6]
        label = system if len(inside) == len(some) else f"{system} ({len(some) - len(inside)} outside the picture)"
        axes.plot([one.nbytes / 1e6 for one in inside], [one.perplexity for one in inside], mark, label=label)
        for one in inside:
            axes.annotate(
                one.name, (one.nbytes / 1e6, one.perplexity), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    best: list[Point] = []
    for one in sorted((one for one in shown if one.system == OURS), key=lambda one: one.nbytes):
        if one.nbytes <= 160e6 and (not best or one.perplexity < best[-1].perplexity):
            best.append(one)
    axes.step(
        [one.nbytes / 1e6 for one in best], [one.perplexity for one in best], where="post", color="C3", linewidth=1
    )
    source = next(one for one in points if one.system == "source")
    axes.axhline(source.perplexity, linestyle=":", color="gray", label=f"fp32, {source.nbytes / 1e6:.0f} MB")
    axes.set(xlabel="model data, MB (10^6 bytes)", ylabel=f"perplexity, {TOKENS:,} tokens in windows of {CONTEXT:,}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--text", type=_existing, required=True, metavar="FILE", help="text to predict")
    add("--other", type=_existing, metavar="FILE", help="a second text to predict")
    add("--calibration", type=_existing, metavar="FILE", help="calibration text; our default and, for the peer, --text")
    add("--output", type=Path, default=Path(), metavar="DIR", help="where quality.md, .json and .png go (%(default)s)")
    add("--peers", nargs="*", choices=("genai", "ort", "llama"), default=["genai", "ort", "llama"])
    add("--gguf", type=_existing, metavar="FILE", help="the weights, if not those of the zoo")
    add("--fresh", action="store_true", help="make our artifacts anew, for the code may have changed")
    add("--threads", type=int, default=2)
    add("--env-dir", type=Path, default=_default_root(), metavar="DIR", help="the peers' environments (%(default)s)")
    add("--work-dir", type=Path, metavar="DIR", help="where models are made; by default a folder of --env-dir")
    options = parser.parse_args()
    try:
        points = list(measure(options))
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "quality.md").write_text(markdown(points, options), encoding="utf-8")
        rows = [asdict(one) for one in points]
        (options.output / "quality.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        draw(points, options.output / "quality.png")
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table(title="Smaller and better than each of ours")
    for heading in ("system", "model", "MB", "perplexity"):
        table.add_column(heading)
    ahead = beaten(points)
    for one in ahead:
        table.add_row(one.system, one.name, f"{one.nbytes / 1e6:.1f}", f"{one.perplexity:.2f}")
    Console().print(table if ahead else "no peer is smaller and better than all of ours")
    return 1 if ahead else 0


if __name__ == "__main__":
    sys.exit(main())
