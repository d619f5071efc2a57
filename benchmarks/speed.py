"""Interleaved speed rounds: every engine in turn, one at a time, the same token ids, the same number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from client import Foreign, Worker, settle
from terminal import BenchmarkError, say

# Beyond this share of foreign processor time in a turn, its numbers are not worth reporting without a word.
_NOISY = 0.05

MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s")


@dataclass(frozen=True)
class Load:
    """What one turn asks of an engine.

    Attributes:
        prompt: token ids before decoding.
        new_tokens: tokens to generate after it, at least 2.
        long_prompt: token ids of the prefill measurement, which generates one token.
    """

    prompt: Sequence[int]
    new_tokens: int
    long_prompt: Sequence[int]


def compare(workers: Sequence[Worker], load: Load, rounds: int) -> dict[str, Any]:
    """Runs one discarded round and `rounds` measured ones.

    Returns:
        by worker name: `peak_rss_bytes`, `first_tokens` (the first 16 generated ids), `rounds`
        (one dictionary of `MEASURES` and `foreign_share` each) and `median` of each measure.
    """
    table: dict[str, Any] = {worker.name: {"rounds": []} for worker in workers}
    for worker in workers:
        # Weights into memory, arenas to their size, frequency up.
        settle(workers)
        _turn(worker, load)
    for number in range(rounds):
        for worker in workers:
            settle(workers)
            measured, tokens = _turn(worker, load)
            entry = table[worker.name]
            entry["rounds"].append(measured)
            entry["first_tokens"] = tokens[:16]
        say(f"round {number + 1} of {rounds}: {', '.join(_brief(worker.name, table) for worker in workers)}")
    for worker in workers:
        entry = table[worker.name]
        entry.update(worker.ask("usage"))
        entry["median"] = {measure: median(turn[measure] for turn in entry["rounds"]) for measure in MEASURES}
    return table


def ratios(table: dict[str, Any], ours: str, peer: str) -> dict[str, dict[str, float]]:
    """How many times faster `ours` is than `peer`: the ratio within each round, its median, least and greatest."""
    result = {}
    for measure in MEASURES:
        pairs = zip(table[ours]["rounds"], table[peer]["rounds"], strict=True)
        values = [mine[measure] / theirs[measure] for mine, theirs in pairs]
        if measure.endswith("_s") and not measure.endswith("_per_s"):
            values = [1 / value for value in values]
        result[measure] = {"median": median(values), "least": min(values), "greatest": max(values)}
    return result


def noise(table: dict[str, Any]) -> str | None:
    """A warning when other processes took part of the machine during the measured turns."""
    shares = [turn["foreign_share"] for entry in table.values() for turn in entry["rounds"]]
    noisy = sum(share > _NOISY for share in shares)
    if not noisy:
        return None
    return (
        f"not a quiet machine: in {noisy} of {len(shares)} turns other processes took more than {_NOISY:.0%} of the "
        f"processors (worst {max(shares):.0%}). Engines suffer differently, so not even the ratios count: run again"
    )


def _turn(worker: Worker, load: Load) -> tuple[dict[str, float], list[int]]:
    with Foreign(worker) as foreign:
        prefill = worker.ask("generate", prompt=list(load.long_prompt), new_tokens=1)
        generation = worker.ask("generate", prompt=list(load.prompt), new_tokens=load.new_tokens)
    tokens = [int(token) for token in generation["tokens"]]
    if len(tokens) != load.new_tokens:
        raise BenchmarkError(f"{worker.name}: expected {load.new_tokens} new tokens, got {len(tokens)}")
    measured = {
        "prefill_tokens_per_s": len(load.long_prompt) / prefill["first_s"],
        # The first token belongs to the prompt's pass.
        "decode_tokens_per_s": (load.new_tokens - 1) / generation["decode_s"],
        "time_to_first_token_s": generation["first_s"],
        "setup_s": generation["setup_s"],
        "foreign_share": foreign.share,
    }
    return measured, tokens


def _brief(name: str, table: dict[str, Any]) -> str:
    return f"{name} {table[name]['rounds'][-1]['decode_tokens_per_s']:.0f} tok/s"
