#!/usr/bin/env python
"""What pipelines cost and bring, side by side: size, perplexity, divergence and speed of one model after each.

    python benchmarks/curves.py MODEL --calibration valid.txt --text test.txt --output low-rank.json \\
        "svd(ratio=0.2)" "svd_llm(ratio=0.2)" "fast=svd_llm(ratio=0.4)"

MODEL is a directory that the pipelines start from, and that all are compared with, such as what
`onnxpress optimize SOURCE -o MODEL --recipe fp32` writes. Artifacts are kept in `--work` under their pipeline and made
once. With `--rounds`, the models speak in turn, one at a time, and speeds are ratios to MODEL within a round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import speed
from checkpoints import model_bytes, onnxpress, read_through, run
from client import HERE, Worker
from rich.console import Console
from rich.table import Table
from terminal import BenchmarkError, say
from tokenizers import Tokenizer

_DENSE = "dense"  # the model that all start from


def artifact(pipeline: str, options: argparse.Namespace) -> Path:
    """The directory of MODEL after a pipeline."""
    weights = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in options.model.glob("model*"))
    text = options.calibration.read_text() if options.calibration else ""
    name = hashlib.sha256(f"{options.model} {weights} {text} {pipeline}".encode()).hexdigest()[:12]
    path: Path = options.work / name
    if not (path / "onnxpress.json").is_file():
        say(pipeline)
        source: list[str | Path] = ["--calibration", options.calibration] if options.calibration else []
        command = ["optimize", options.model, "-o", path, "--passes", pipeline, "--no-measure", "--quiet"]
        run(onnxpress(*command, *source), pipeline)
    return path


def quality(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Facts about a directory: bytes, share of parameters that its first pass removed, and what the text shows."""
    told = f"{options.model} {options.tokens} {hashlib.sha256(options.text.read_bytes()).hexdigest()}"
    kept = path / f"curves-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    window = ["--tokens", str(options.tokens), "--context", "1024", "--reference", options.model]
    facts = json.loads(run(onnxpress("eval", path, "--text", options.text, *window, "--json", "--quiet"), str(path)))
    passes = json.loads((path / "onnxpress.json").read_text())["passes"]
    metrics = next((row["metrics"] for row in passes if "parameters_before" in row["metrics"]), {})
    before, after = metrics.get("parameters_before"), metrics.get("parameters_after")
    found = {
        "bytes": model_bytes(path),
        "removed": 1 - after / before if before else None,
        **{name: facts[name] for name in ("perplexity", "kl", "top1_agreement", "reference_perplexity")},
    }
    kept.write_text(json.dumps(found))
    return found


def speeds(paths: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Rounds in which all models speak in turn, and their ratios to the first."""
    ids = Tokenizer.from_file(str(options.model / "tokenizer.json")).encode(options.text.read_text()).ids
    load = speed.Load(ids[:128], 64, ids[:512])
    script, threads = str(HERE / "worker_onnxpress.py"), str(options.threads)
    with ExitStack() as stack:
        workers = []
        for name, path in paths.items():
            read_through(path)
            command = [sys.executable, script, str(path), threads]
            workers.append(stack.enter_context(Worker(name, command, options.work / f"worker-{path.name}.log")))
            workers[-1].ask("describe")
        table = speed.compare(workers, load, options.rounds)
    first = next(iter(paths))
    ratios = {name: speed.ratios(table, name, first) for name in paths if name != first}
    return {"ratios": ratios, "warning": speed.noise(table)}


def show(console: Console, report: dict[str, Any]) -> None:
    """The table for people."""
    made = Table(title="pipelines", title_justify="left")
    for column in ("pipeline", "MB", "removed", "perplexity", "KL", "same first choice", "prefill", "decode"):
        made.add_column(column, justify="left" if column == "pipeline" else "right")
    for name, row in report["models"].items():
        ratios = report.get("speed", {}).get("ratios", {}).get(name, {})
        made.add_row(
            name,
            f"{row['bytes'] / 1e6:.1f}",
            "" if row["removed"] is None else f"{row['removed']:.1%}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.1%}",
            *(
                f"{one['median']:.2f} ({one['least']:.2f} to {one['greatest']:.2f})" if one else ""
                for one in (ratios.get("prefill_tokens_per_s"), ratios.get("decode_tokens_per_s"))
            ),
        )
    console.print(made)
    if report.get("speed", {}).get("warning"):
        console.print(f"warning: {report['speed']['warning']}")


def main() -> int:
    """Runs the comparison."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path, help="directory that all pipelines start from")
    made.add_argument("pipelines", nargs="+", help="text of a pipeline, or NAME=TEXT")
    made.add_argument("--calibration", type=Path, help="text for fitting; default: that of onnxpress")
    made.add_argument("--text", type=Path, required=True, help="text for perplexity")
    made.add_argument("--tokens", type=int, default=8192, help="of it")
    made.add_argument("--rounds", type=int, default=0, help="of speed; 0: no speed")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--work", type=Path, default=Path("curves"), help="where artifacts are kept")
    made.add_argument("--output", type=Path, help="JSON of all numbers")
    options = made.parse_args()
    for name in ("model", "calibration", "text", "work"):  # tools run in a directory of their own
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).resolve())
    options.work.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for text in options.pipelines:
        first, _, rest = text.partition("=")
        name, pipeline = (first, rest) if rest and "(" not in first else (text, text)
        if name in (*paths, _DENSE):
            raise BenchmarkError(f"{text}: expected another name, {name!r} is taken")
        paths[name] = artifact(pipeline, options)
    report: dict[str, Any] = {"models": {name: quality(path, options) for name, path in paths.items()}}
    if options.rounds:
        report["speed"] = speeds({_DENSE: options.model, **paths}, options)
    show(Console(width=160), report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
