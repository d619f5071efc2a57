"""What it costs to make the int4 model: whole processes, in turns, from inputs that are already in the page cache."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import model_bytes, read_through, run
from client import HERE
from terminal import BenchmarkError, say

_KEYS = ("wall_s", "cpu_s", "peak_rss_bytes")

Command = Callable[[Path], list[str]]


def compare(
    converters: Mapping[str, Command],
    starts: Mapping[str, list[str]],
    baseline: str,
    inputs: list[Path],
    scratch: Path,
    rounds: int,
) -> dict[str, Any]:
    """Times each converter `rounds` times, in turns.

    Args:
        converters: by name, the command line that writes the model to a given directory.
        starts: by name, a command of the same program that only starts and ends; tells imports from work. A name may be
            the beginning of several in `converters`.
        baseline: the converter that the others are compared with.
        inputs: files and directories that the converters read.
        scratch: folder for the outputs, which are deleted.
        rounds: measured runs of each.

    Returns:
        by name: `runs` (wall_s, cpu_s, peak_rss_bytes each), `median` of the three, `ratio` of the three to the
        baseline (median of the ratios within a round), `start` (one run of the start command) and `bytes` written.
    """
    for path in inputs:
        read_through(path)
    started = {name: _cost(command, scratch) for name, command in starts.items()}
    table: dict[str, Any] = {}
    for name in converters:
        start = next(cost for beginning, cost in started.items() if name.startswith(beginning))
        table[name] = {"start": start, "runs": []}
    for number in range(rounds):
        for name, command in converters.items():
            output = Path(tempfile.mkdtemp(prefix="convert-", dir=scratch))
            try:
                # The converter makes the directory itself; an existing one could count as a wish to overwrite.
                target = output / "model"
                cost = _cost(command(target), scratch)
                table[name]["runs"].append(cost)
                table[name]["bytes"] = model_bytes(target)
            finally:
                shutil.rmtree(output)
            say(f"round {number + 1} of {rounds}: {name} {cost['wall_s']:.1f} s, {cost['peak_rss_bytes'] / 1e6:.0f} MB")
    for entry in table.values():
        pairs = list(zip(entry["runs"], table[baseline]["runs"], strict=True))
        entry["median"] = {key: median(mine[key] for mine in entry["runs"]) for key in _KEYS}
        entry["ratio"] = {key: median(mine[key] / base[key] for mine, base in pairs) for key in _KEYS}
    return table


def _cost(command: list[str], scratch: Path) -> dict[str, Any]:
    log = scratch / "convert.log"
    output = run([sys.executable, "-I", str(HERE / "measure.py"), str(log), *command], "measure.py")
    cost: dict[str, Any] = json.loads(output)
    if cost["returncode"] != 0:
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
        raise BenchmarkError(f"{' '.join(command)}: expected exit status 0, got {cost['returncode']}\n{tail}")
    return cost
