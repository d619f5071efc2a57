"""How fast a model is, and how much memory it takes: measured in a process of its own, so that the peak is its own.

Decoding reads every weight once per step, so the share of the memory bandwidth that the weights and the cache use per
second says how far from the machine's limit a model runs.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxpress.compiler import errors
from onnxpress.compiler.errors import OnnxpressError, OptionError
from onnxpress.runtime import providers as _providers
from onnxpress.runtime.config import find_model
from onnxpress.runtime.session import DecoderSession
from onnxpress.runtime.skeleton import Node, Skeleton, read

_ITEM_BYTES = {"tensor(float)": 4, "tensor(float16)": 2, "tensor(bfloat16)": 2}
_ITEM_BYTES |= {"tensor(int8)": 1, "tensor(uint8)": 1, "tensor(float8e4m3fn)": 1}
_WARM_UP_STEPS = 8


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` measured. Seconds, bytes, tokens per second; medians of the rounds, after a warm-up.

    Attributes:
        load_s: from the path to a session that can run.
        time_to_first_token_s: the whole prompt, and the choice of a token.
        decode_tokens_per_s: after the first token, all sequences of the batch together.
        peak_memory_bytes: largest resident size of the process, interpreter and libraries included.
        base_memory_bytes: resident size before the model was loaded.
        weight_bytes_per_step: weights that one decode step reads; of a table that is only looked up, one row.
        cache_bytes_per_token: what one token of one sequence adds to the key-value cache.
        bytes_read_per_token: weights, shared by the batch, and the cache at the middle of the decoding.
        memory_bandwidth_bytes_per_s: of this machine, measured.
        bandwidth_share: bytes read per second while decoding, over the bandwidth.
    """

    load_s: float
    time_to_first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_memory_bytes: int
    base_memory_bytes: int
    weight_bytes_per_step: int
    cache_bytes_per_token: int
    bytes_read_per_token: int
    memory_bandwidth_bytes_per_s: float
    bandwidth_share: float
    prompt_tokens: int
    new_tokens: int
    batch: int
    rounds: int
    threads: int | None
    provider: str
    provider_reason: str
    cpu: str
    cores: int
    onnxruntime: str

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the attributes."""
        return asdict(self)


def benchmark(
    path: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    batch: int = 1,
    rounds: int = 3,
    threads: int | None = None,
    provider: str = "auto",
    strict: bool = False,
    adapter: str | Path | None = None,
) -> Benchmark:
    """Measures a decoder in a fresh process.

    Args:
        path: a model directory or an .onnx file.
        prompt_tokens, new_tokens: per sequence; the tokens are random, the end of a text is ignored.
        batch: sequences decoded together.
        rounds: measurements, of which the median counts.
        threads, provider, strict: as in `load`.
        adapter: file or directory of a LoRA adapter to run with.

    Raises:
        OptionError: a number is too small, or prompt and new tokens exceed what the model was made for.
        OnnxpressError: as `load`; whatever the measuring process met.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("batch", batch, 1),
        ("rounds", rounds, 1),
    ):
        if value < least:
            raise OptionError(f"{name}: expected at least {least}, got {value}")
    model = find_model(path)
    options = {
        "path": str(path),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        "rounds": rounds,
        "threads": threads,
        "provider": provider,
        "strict": strict,
        "adapter": None if adapter is None else str(adapter),
    }
    found = _in_fresh_process(options)
    weights = weight_bytes_per_step(read(model))
    per_token = weights // batch + found["cache_bytes_per_token"] * (prompt_tokens + new_tokens // 2)
    bandwidth = _providers.memory_bandwidth()
    return Benchmark(
        **found,
        weight_bytes_per_step=weights,
        bytes_read_per_token=per_token,
        memory_bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=per_token * found["decode_tokens_per_s"] / bandwidth,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        rounds=rounds,
        threads=threads,
        cpu=_providers.cpu_features()[0],
        cores=os.cpu_count() or 1,
        onnxruntime=ort.__version__,
    )


def weight_bytes_per_step(graph: Skeleton) -> int:
    """Bytes of the weights that one decode step reads: each once, of a table that is only looked up one row."""
    readers: dict[str, list[tuple[Node, int]]] = defaultdict(list)
    for node in graph.nodes:
        for slot, name in enumerate(node.inputs):
            readers[name].append((node, slot))
        for name in node.inner:
            readers[name].append((node, -1))
    casts = {node.outputs[0] for node in graph.nodes if node.op_type == "Cast" and node.inputs[0] in graph.initializers}
    total = 0
    for name, tensor in graph.initializers.items():
        if not readers[name]:
            continue
        rows = tensor.shape[0] if tensor.shape and _is_table(name, readers) else 1
        num_bytes = tensor.num_bytes
        # The short form of scales is multiplied out once, and read as float32 (`onnxpress.compiler.scales`).
        if all(node.op_type == "Cast" and node.to == _FLOAT for node, _ in readers[name]):
            num_bytes = 4 * math.prod(tensor.shape)
        elif all((node.op_type == "Mul" and node.inputs[0] in casts) or _is_place(node) for node, _ in readers[name]):
            continue
        # Sparse weights are made dense once (`onnxpress.compiler.sparse`).
        elif all((node.op_type, slot) == ("ScatterElements", 2) for node, slot in readers[name]):
            num_bytes = max(graph.sizes.get(node.outputs[0], num_bytes) for node, _ in readers[name])
        total += num_bytes // max(1, rows)
    return total


_FLOAT, _INT32 = 1, 6  # of TensorProto.DataType


def _is_place(node: Node) -> bool:
    """Whether a node helps to find the places of sparse weights."""
    return node.op_type in ("ConstantOfShape", "CumSum") or (node.op_type == "Cast" and node.to == _INT32)


# Slots of which an operator reads only the row that an index names.
_TABLES = {
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "GroupQueryAttention": {7, 8},
    "RotaryEmbedding": {1, 2, 3},
}
_VIEWS = frozenset({"Identity", "Reshape", "Cast", "Mul"})


def _is_table(name: str, readers: dict[str, list[tuple[Node, int]]]) -> bool:
    return all(
        slot in _TABLES.get(node.op_type, ())
        or (node.op_type in _VIEWS and slot == 0 and _is_table(node.outputs[0], readers))
        for node, slot in readers[name]
    )


def _in_fresh_process(options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "onnxpress.runtime.benchmark", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise OnnxpressError(
            f"benchmark: the measuring process ended with {done.returncode}: {done.stderr.strip()[-400:]}",
            hint="a negative number is a signal; -9 means that the memory did not suffice",
        ) from None
    if "error" in answer:
        kind = getattr(errors, answer["error"], OnnxpressError)
        raise kind(answer["message"], hint=answer["hint"])
    return dict(answer)


def measure(
    path: str,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    rounds: int,
    threads: int | None,
    provider: str,
    strict: bool,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Measures in this very process; `benchmark` calls it in one that holds nothing else."""
    base = _memory("VmRSS")
    started = time.perf_counter()
    session = DecoderSession(path, provider=provider, threads=threads, strict=strict)
    load_s = time.perf_counter() - started
    if adapter is not None:
        session.adapters.default = session.load_adapter(adapter)
    limit = session.context_length
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise OptionError(
            f"benchmark: expected at most {limit} tokens in and out, got {prompt_tokens + new_tokens}",
            hint="ask for fewer prompt or new tokens",
        )
    prompt = np.random.default_rng(0).integers(0, session.vocab_size, (batch, prompt_tokens))
    _round(session, prompt, _WARM_UP_STEPS if new_tokens > _WARM_UP_STEPS else new_tokens)
    times = [_round(session, prompt, new_tokens) for _ in range(rounds)]
    first = statistics.median(first for first, _ in times)
    rest = statistics.median(rest for _, rest in times)
    cache = sum(t.heads * t.head_dim * _ITEM_BYTES[t.type] for t in session.interface.cache)
    return {
        "load_s": load_s,
        "time_to_first_token_s": first,
        "prefill_tokens_per_s": batch * prompt_tokens / first,
        "decode_tokens_per_s": batch * (new_tokens - 1) / rest,
        "peak_memory_bytes": _memory("VmHWM"),
        "base_memory_bytes": base,
        "cache_bytes_per_token": cache,
        "provider": session.choice.provider,
        "provider_reason": session.choice.reason,
    }


def _round(session: DecoderSession, prompt_BS: Any, new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, seconds of all others)."""
    decoding = session.begin(len(prompt_BS), prompt_BS.shape[1] + new_tokens)
    started = time.perf_counter()
    logits_BV = decoding.prefill(prompt_BS)
    step, single = decoding.step, len(prompt_BS) == 1
    token: Any = int(logits_BV[0].argmax()) if single else logits_BV.argmax(axis=1)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        logits_BV = step(token)
        token = int(logits_BV[0].argmax()) if single else logits_BV.argmax(axis=1)
    return first - started, time.perf_counter() - first


def _memory(field: str) -> int:
    """A field of this process's memory status in bytes; its peak where the system does not say more."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: list[str]) -> int:
    """Measures as the JSON object in the first argument says, and writes one JSON line."""
    try:
        answer = measure(**json.loads(arguments[0]))
    except OnnxpressError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0 if "error" not in answer else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
