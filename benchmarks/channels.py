#!/usr/bin/env python
"""What `prune_channels` costs small trained networks, and what it gains a larger one in speed.

    python benchmarks/channels.py [--only accuracy|speed] [--steps N] [--rounds N]

Four networks of `tests/plain_networks.py` learn to tell twenty blurred, shifted, noisy patterns apart (the last of
them is what accuracy is measured on: 1,000 images that neither training nor fitting has seen). The speed is that of a
network like ResNet-18 with random weights, whole and pruned sessions run in turn; ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from rich.console import Console

from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_arrays import CalibrationArrays
from onnxpress.compiler.pass_ import Context

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import itertools

import graphs
from plain_networks import Block, export, patterns, trained

console = Console(width=160)


class Larger(torch.nn.Module):
    """The layers of ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
        self.stem = torch.nn.Conv2d(3, 64, 7, 2, 3)
        pairs = list(itertools.pairwise(widths))
        self.blocks = torch.nn.Sequential(*(Block(one, two, 1 if one == two else 2) for one, two in pairs))
        self.head = torch.nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


def pruned(model: ir.Model, text: str, images: Any = None) -> ir.Model:
    context = Context() if images is None else Context(arrays=CalibrationArrays({"x": images.numpy()}, "images"))
    for one in pipeline.parse(text).passes:
        one.run(model, context)
    return model


def accuracy(steps: int) -> None:
    seen, _ = patterns(256, seed=100)
    images, classes = patterns(1000, seed=7)
    for name in ("residual", "inverted", "flat", "dense"):
        made = trained(name, steps)

        def share(model: ir.Model) -> float:
            found = graphs.run(model, {"x": images.numpy()})["y"]
            return float((found.argmax(1) == classes.numpy()).mean())

        row = [f"whole {share(export(made, images[:2])):.1%}"]
        for ratio in (0.3, 0.5):
            for label, options, data in (
                ("weights", "", None),
                ("chosen", ", refit=False", seen),
                ("fitted", "", seen),
            ):
                text = f"prune_channels(ratio={ratio}, multiple=4{options})"
                row.append(f"{ratio} {label} {share(pruned(export(made, images[:2]), text, data)):.1%}")
        console.print(name, " | ".join(row))


def speed(rounds: int) -> None:
    torch.manual_seed(0)
    made, sample = Larger().eval(), torch.randn(1, 3, 224, 224)
    sessions, sizes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for ratio in (None, None, 0.3, 0.5):
            model = export(made, sample)
            if ratio is not None:
                pruned(model, f"prune_channels(ratio={ratio})")
            path = Path(folder) / f"{len(sessions)}.onnx"
            ir.save(model, path)
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            sessions.append(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
            sizes.append(path.stat().st_size)
    times: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds + 1):
        for index, session in enumerate(sessions):
            start = time.process_time()
            session.run(None, {"x": sample.numpy()})
            if number:
                times[index].append(time.process_time() - start)
    for label, nbytes, some in zip(("whole", "whole again", "0.3", "0.5"), sizes, times, strict=True):
        ratios = [whole / one for whole, one in zip(times[0], some, strict=True)]
        console.print(
            f"{label}: {nbytes / 1e6:.1f} MB, median {statistics.median(some) * 1e3:.0f} ms of processor time, ratio "
            f"{statistics.median(ratios):.2f} ({np.quantile(ratios, 0.25):.2f} to {np.quantile(ratios, 0.75):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("accuracy", "speed"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "speed":
        accuracy(options.steps)
    if options.only != "accuracy":
        speed(options.rounds)


if __name__ == "__main__":
    main()
