"""Perplexity of every system's model on the same token ids, in the same windows."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import last_json, model_bytes, onnxpress, run
from client import Worker
from terminal import say

_TOKEN_IDS = """
import json, pathlib, sys
from onnxpress.runtime import Tokenizer, detokenize_wikitext
directory, file, detokenized = sys.argv[1:]
text = pathlib.Path(file).read_text(encoding="utf-8")
text = detokenize_wikitext(text) if detokenized == "True" else text
print(json.dumps(Tokenizer(directory).encode(text, add_special_tokens=False)))
"""


def token_ids(directory: Path, text: Path, *, detokenized: bool, tokens: int) -> list[int]:
    """The first `tokens` ids of a text as `onnxpress eval` sees them, with the tokenizer of a model directory."""
    command = [sys.executable, "-c", _TOKEN_IDS, str(directory), str(text), str(detokenized)]
    ids: list[int] = json.loads(run(command, "onnxpress tokenizes the text"))
    return ids[:tokens]


def of_onnx(name: str, directory: Path, text: Path, *, tokens: int, context: int) -> dict[str, Any]:
    """Perplexity of an ONNX directory, whoever wrote it, by `onnxpress eval`.

    Returns:
        `perplexity`, `tokens`, `bytes`, and `detokenized`: whether eval undid WikiText's tokenisation first.
    """
    say(f"perplexity of {name}")
    counts = ("--tokens", str(tokens), "--context", str(context))
    command = onnxpress("eval", directory, "--text", text, *counts, "--json")
    report = last_json(run(command, f"onnxpress eval {directory}"), "onnxpress eval --json")
    return {
        "perplexity": report["perplexity"],
        "tokens": report["tokens"],
        "detokenized": report["detokenized"],
        "bytes": model_bytes(directory),
    }


def of_gguf(worker: Worker, path: Path, ids: Sequence[int], *, context: int) -> dict[str, Any]:
    """Perplexity of a GGUF file in llama.cpp.

    Args:
        worker: a `worker_llama.py` with room for `context` tokens.
        path: the file it holds.
        ids: the text, without a token for its beginning; cut into windows of `context`, each predicted on its own.
    """
    say(f"perplexity of {worker.name}")
    windows = [list(ids[start : start + context]) for start in range(0, len(ids), context)]
    parts = [worker.ask("negative_log_likelihood", window=window) for window in windows if len(window) > 1]
    total, count = sum(part["sum"] for part in parts), sum(part["tokens"] for part in parts)
    return {"perplexity": math.exp(total / count), "tokens": len(ids), "bytes": model_bytes(path)}
