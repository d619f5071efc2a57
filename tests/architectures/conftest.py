"""Collects what the tests of architectures measure, and writes docs/architectures.md when asked to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_HEAD = """# Architectures

Small random models of each architecture (width 128), exported, fused with the recipe `fp32` for the CPU, and
compared with torch. Where a residual meets a LayerNorm it becomes a Sum: on the CPU that takes a third of the time of
SkipLayerNormalization, which CUDA artifacts have. The numbers are the largest difference of the
logits, relative to the largest logit, over all steps. Fused operators
are per layer. attention: the implementation in transformers that was exported.
cuda: whether ONNX Runtime's CUDA provider takes every float node of the artifact for `--target cuda`
(fp16) and `--target cuda-bf16`, without a copy between devices inside the graph; planned, not run.
Written by `pytest tests/architectures --update-architectures`.

"""


@pytest.fixture(scope="session")
def placements() -> dict[tuple[str, str], str]:
    """What does not run on CUDA, by (model, column of the table); of optimum's exports."""
    return {}


@pytest.fixture(scope="session")
def architectures(
    request: pytest.FixtureRequest, placements: dict[tuple[str, str], str]
) -> Iterator[list[dict[str, Any]]]:
    """Rows for the table."""
    if request.config.getoption("--update-architectures") and hasattr(request.config, "workerinput"):
        raise pytest.UsageError("--update-architectures needs all tests in one process: leave --numprocesses out")
    rows: list[dict[str, Any]] = []
    yield rows
    if request.config.getoption("--update-architectures"):
        PAGE.write_text(_HEAD + table(rows, placements), encoding="utf-8")


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["exporter"] != "optimum", row["opset"], row["attention"], row["model"])


def table(rows: list[dict[str, Any]], placements: dict[tuple[str, str], str]) -> str:
    names = list(max((row["differences"] for row in rows), key=len)) if rows else []
    targets = sorted({target for _, target in placements}, reverse=True)
    columns = [*names, *targets]
    lines = [
        "| model | exporter | opset | attention | layers | nodes | fused, per layer | moves before attention | "
        + f"{' | '.join(columns)} |",
        "|" + "---|" * (8 + len(columns)),
    ]
    for row in sorted(rows, key=_order):
        fused = ", ".join(f"{name} {count:.3g}" for name, count in row["operators"].items())
        stray = ", ".join(f"{name} {count}" for name, count in row["stray"].items()) or "none"
        found = row["differences"]
        cells = [f"{found[name]:.0e}" if name in found else "" for name in names]
        if row["exporter"] == "optimum":
            cells += [placements.get((row["model"], target), "") for target in targets]
        else:
            cells += [""] * len(targets)
        nodes = f"{row['nodes'][0]:,} to {row['nodes'][1]}"
        how = f"{row['exporter']} | {row['opset']} | {row['attention']} | {row['layers']}"
        lines.append(f"| {row['model']} | {how} | {nodes} | {fused} | {stray} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def big_tiny_export(tiny_export: Callable[..., Path]) -> Callable[..., Path]:
    """As `tiny_export`, with three layers of width 128."""
    return functools.partial(tiny_export, num_layers=3, hidden_size=128)
