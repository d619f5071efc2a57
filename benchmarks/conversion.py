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

Command = Callable[[Path], list[str]]


def compare(
    converters: Mapping[str, Command], starts: Mapping[str, list[str]], inputs: list[Path], scratch: Path, rounds: int
) -> dict[str, Any]:
    """Times each converter `rounds` times, in turns.

    Args:
        converters: by name, the command line that writes the model to a given directory.
        starts: by name, a command of the same program that only starts and ends; tells imports from work.
        inputs: files and directories that the converters read.
        scratch: folder for the outputs, which are deleted.
        rounds: measured runs of each.

    Returns:
        by name: `runs` (wall_s, cpu_s, peak_rss_bytes each), `median` of the three, `start` (the same of one run of the
        start command) and `bytes` of what was written.
    """
    for path in inputs:
        read_through(path)
    table: dict[str, Any] = {name: {"start": _cost(command, scratch), "runs": []} for name, command in starts.items()}
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
        keys = ("wall_s", "cpu_s", "peak_rss_bytes")
        entry["median"] = {key: median(run[key] for run in entry["runs"]) for key in keys}
    return table


def _cost(command: list[str], scratch: Path) -> dict[str, Any]:
    log = scratch / "convert.log"
    output = run([sys.executable, "-I", str(HERE / "measure.py"), str(log), *command], "measure.py")
    cost: dict[str, Any] = json.loads(output)
    if cost["returncode"] != 0:
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
        raise BenchmarkError(f"{' '.join(command)}: expected exit status 0, got {cost['returncode']}\n{tail}")
    return cost
