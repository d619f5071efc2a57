#!/usr/bin/env python
"""Optimizes a small random model of every decoder architecture and lets two engines continue the same prompt.

    python benchmarks/agreement.py --recipe int4-rtn

Run it with the Python that has onnxpress. Greedy tokens of `onnxpress run`'s runtime and of onnxruntime-genai must be
the same; a difference, or an engine that refuses the artifact, gives status 1. Random weights make the logits flat, so
one wrong scale, mask or head changes a token soon.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import environments
from client import HERE, Worker
from rich.console import Console
from rich.table import Table
from terminal import BenchmarkError, say

import onnxpress
from onnxpress import models
from onnxpress.models.tiny import VOCABULARY, save_tiny, tiny_names

_ENCODERS = ("bert", "bert_classifier", "distilbert", "modernbert", "resnet", "roberta", "t5", "vit", "whisper")
PROMPT = [1, *range(40, 51)]
LAYERS, HIDDEN = 3, 128


def tokens_of(name: str, python: Path, worker: str, model: Path, count: int, log: Path) -> list[int]:
    """The greedy continuation of the prompt in a process of its own."""
    with Worker(name, [str(python), str(HERE / worker), str(model), "2"], log) as engine:
        return list(engine.ask("generate", prompt=PROMPT, new_tokens=count)["tokens"])


def artifact_of(architecture: str, recipe: str, work: Path) -> Path:
    """The optimized small model."""
    checkpoint = save_tiny(architecture, work / "checkpoint", num_layers=LAYERS, hidden_size=HIDDEN)
    (work / "export").mkdir()
    source = models.load(checkpoint, work_dir=work / "export", exporter="optimum").directory
    artifact = onnxpress.optimize(source, output=work / "artifact", recipe=recipe, measure=False).directory
    # onnxruntime-genai keeps the end of the text from being chosen before min_length; onnxpress chooses it and goes on.
    config = json.loads((artifact / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = VOCABULARY - 1
    (artifact / "genai_config.json").write_text(json.dumps(config))
    return artifact


def compare(options: argparse.Namespace) -> int:
    python = environments.provide(environments.GENAI, options.env_dir)
    table = Table("model", "nodes", "onnxpress", "onnxruntime-genai", box=None)
    wrong = 0
    for architecture in options.models or [name for name in tiny_names() if name not in _ENCODERS]:
        say(architecture)
        work = Path(tempfile.mkdtemp(prefix="agreement-"))
        try:
            artifact = artifact_of(architecture, options.recipe, work)
            nodes = str(len(models.load(artifact, work_dir=work).model.graph))
            ours = tokens_of(
                "onnxpress", Path(sys.executable), "worker_onnxpress.py", artifact, options.tokens, work / "1"
            )
            theirs = tokens_of("genai", python, "worker_genai.py", artifact, options.tokens, work / "2")
        except (BenchmarkError, onnxpress.OnnxpressError) as error:
            table.add_row(architecture, "", "", str(error).splitlines()[0])
            wrong += 1
            continue
        finally:
            shutil.rmtree(work, ignore_errors=True)
        same = next((place for place, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one != two), len(ours))
        wrong += same < len(ours)
        table.add_row(
            architecture, nodes, f"{len(ours)} tokens", "the same" if same == len(ours) else f"differs at {same}"
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(wrong > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="architectures; every decoder by default")
    parser.add_argument("--recipe", default="int4-rtn", help="recipe of the artifacts (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens (24)")
    parser.add_argument("--env-dir", type=Path, default=Path("~/.cache/onnxpress/peers").expanduser())
    try:
        return compare(parser.parse_args(arguments))
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
