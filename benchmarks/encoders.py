#!/usr/bin/env python
"""Encoders in float32: onnxpress's graph against ONNX Runtime's own fusions at their highest level.

    python benchmarks/encoders.py --sets 7 --rounds 9

Run it with the Python that has onnxpress, on a machine that does nothing else. Models have the sizes of BERT and ViT,
with random weights. Both graphs run in one process with all optimizations on (ours gets ONNX Runtime's too), in an
order that changes from round to round. Where a session's buffers happen to lie is worth up to 5 %, so each graph has
two sessions, a round compares their sums, and each set of rounds opens new sessions: shown are the median of the sets'
medians, the least and the greatest. The ratio of the two sessions of the original graph shows what is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table
from terminal import say

import onnxpress
from onnxpress import models
from onnxpress.models.tiny import save_tiny

_BASE = {"num_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_TEXT = {**_BASE, "vocab_size": 30522, "max_position_embeddings": 512}
_IMAGE = {**_BASE, "image_size": 224, "patch_size": 16}
CASES = {"bert": (_TEXT, ((1, 128), (1, 512), (8, 128))), "vit": (_IMAGE, ((1, 224), (4, 224)))}


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin after their work would slow the other graph's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(running: ort.InferenceSession, batch: int, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for value in running.get_inputs():
        if value.name == "pixel_values":
            found[value.name] = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
        elif value.name == "input_ids":
            found[value.name] = rng.integers(3, 30000, (batch, size))
        else:
            found[value.name] = (np.ones if "mask" in value.name else np.zeros)((batch, size), np.int64)
    return found


def timed(running: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> float:
    started = time.perf_counter()
    running.run(None, inputs)
    return time.perf_counter() - started


def measured(
    exported: Path, fused: Path, batch: int, size: int, rng: random.Random, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Medians of one set: our speed over the original's, the same of two equal sessions; and the largest difference."""
    # 0 and 2 run the original, 1 and 3 ours; opened in any order, since memory is handed out in turn.
    paths = [exported, fused] * 2
    opened = {index: session(paths[index] / "model.onnx", options.threads) for index in rng.sample(range(4), 4)}
    inputs = feeds(opened[0], batch, size)
    outputs = {index: each.run(None, inputs)[0] for index, each in opened.items()}
    difference = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())
    rounds, noise = [], []
    for _ in range(options.rounds):
        took = {index: timed(opened[index], inputs) for index in rng.sample(range(4), 4)}
        rounds.append((took[0] + took[2]) / (took[1] + took[3]))
        noise.append(took[0] / took[2])
    return median(rounds), median(noise), difference


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="onnxpress-encoders-") as folder:
        for name, (fields, shapes) in CASES.items():
            say(f"exporting {name}")
            work = Path(folder) / name
            (work / "export").mkdir(parents=True)
            checkpoint = save_tiny(name, work / "checkpoint", **fields)
            exported = models.load(checkpoint, work_dir=work / "export", exporter="optimum").directory
            fused = onnxpress.optimize(exported, output=work / "fused", recipe="fp32", measure=False).directory
            for batch, size in shapes:
                say(f"{name}, {batch} x {size}")
                rng = random.Random(0)
                speeds: list[float] = []
                noise: list[float] = []
                for _ in range(options.sets):
                    one, two, difference = measured(exported, fused, batch, size, rng, options)
                    speeds.append(one)
                    noise.append(two)
                spread = {"median": median(speeds), "least": min(speeds), "greatest": max(speeds)}
                row = {"model": name, "batch": batch, "size": size, "difference": difference, "speed": spread}
                rows.append({**row, "noise": median(noise)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=7, help="sets of rounds of each case, each with new sessions")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds of a set")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write everything measured into this file")
    options = parser.parse_args()
    rows = compare(options)
    table = Table("model", "batch x size", "times ONNX Runtime's speed", "the same twice", "difference", box=None)
    for row in rows:
        speed = row["speed"]
        shown = f"{speed['median']:.3f} ({speed['least']:.3f} to {speed['greatest']:.3f})"
        noise = f"{row['noise']:.2f}"
        table.add_row(row["model"], f"{row['batch']} x {row['size']}", shown, noise, f"{row['difference']:.0e}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "onnxruntime": ort.__version__}, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
