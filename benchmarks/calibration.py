#!/usr/bin/env python
"""What fitting to text costs: time beside one forward pass of the same tokens, memory, and runs that are killed.

    python benchmarks/calibration.py ARTIFACT --calibration FILE [--tokens 24576] [--kills 5]

ARTIFACT is a float decoder, as `onnxpress optimize --recipe fp32` writes it. A forward pass is one run of every window
in ONNX Runtime, logits included, the session already open. The second run of gptq is killed `--kills` times, at equal
distances, and goes on each time; what it writes has to be equal to the last byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from checkpoints import onnxpress
from client import HERE
from peers import _existing
from terminal import BenchmarkError, say

from onnxpress.compiler.calibration_text import CalibrationText, feeds

LENGTH = 1024


def forward_seconds(artifact: Path, text: Path, tokens: int) -> float:
    """Wall time of the windows of text through the model, one after the other."""
    ids_WS, _ = CalibrationText(
        texts={str(text): text.read_text(encoding="utf-8")},
        tokenizer=artifact / "tokenizer.json",
        vocab_size=1 << 31,
    ).windows(tokens, LENGTH)
    windows = feeds(ir.load(artifact / "model.onnx").graph, ids_WS)
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    session = ort.InferenceSession(artifact / "model.onnx", quiet, providers=["CPUExecutionProvider"])
    session.run(["logits"], windows[0])
    started = time.perf_counter()
    for window in windows:
        session.run(["logits"], window)
    return time.perf_counter() - started


def command(options: argparse.Namespace, output: Path) -> list[str]:
    passes = f"gptq(tokens={options.tokens}, length={LENGTH}, {options.options})"
    text = ("--calibration", str(options.calibration))
    return onnxpress("optimize", options.artifact, "-o", output, "--passes", passes, *text, "--no-measure", "--quiet")


def digest(output: Path) -> str:
    files = sorted(output.glob("model.onnx*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def killed(options: argparse.Namespace, output: Path, seconds: float) -> int:
    """Runs gptq, kills it after each share of the time it takes, and lets it end at last; how often it was killed."""
    kills = 0
    for _ in range(options.kills):
        run = subprocess.Popen(command(options, output))
        try:
            code = run.wait(seconds / (options.kills + 1))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills += 1
            say(f"killed after {seconds / (options.kills + 1):.0f} s")
            continue
        if code != 0:
            raise BenchmarkError(f"onnxpress optimize: expected exit status 0, got {code}")
        return kills
    if subprocess.run(command(options, output), check=False).returncode != 0:
        raise BenchmarkError("onnxpress optimize failed after it was killed")
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=_existing)
    parser.add_argument("--calibration", type=_existing, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--options", default="bits=4", help="further options of gptq (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="calibration-") as scratch:
        output = Path(scratch) / "out"
        before = forward_seconds(options.artifact, options.calibration, options.tokens)
        say(f"one forward pass: {before:.1f} s")
        log = Path(scratch) / "log"
        measured = [sys.executable, str(HERE / "measure.py"), str(log), *command(options, output)]
        cost = json.loads(subprocess.run(measured, capture_output=True, text=True, check=True).stdout)
        if cost["returncode"] != 0:
            raise BenchmarkError(f"onnxpress optimize: {log.read_text()[-500:]}")
        after = forward_seconds(options.artifact, options.calibration, options.tokens)
        forward = float(np.mean([before, after]))
        print(
            f"forward pass {before:.1f} and {after:.1f} s, gptq {cost['wall_s']:.1f} s: {cost['wall_s'] / forward:.2f}"
        )
        print(f"peak memory {cost['peak_rss_bytes'] / 1e9:.2f} GB")
        if not options.kills:
            return 0
        want = digest(output)
        kills = killed(options, Path(scratch) / "again", cost["wall_s"])
        is_equal = digest(Path(scratch) / "again") == want
        print(f"killed {kills} times: {'equal' if is_equal else 'NOT equal'} to the last byte")
        return 0 if is_equal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
