"""The worker's half of the benchmark protocol: one JSON request a line on stdin, one JSON reply a line on stdout.

A worker runs in the Python of the engine that it measures, so this file needs the standard library only and imports
nothing of onnxpress. A request is `{"op": NAME, ...arguments}`; a reply is `{"ok": true, "result": ...}` or
`{"ok": false, "error": TEXT}`. Between requests a worker blocks in `read`, so it costs no processor time as soon as the
engine's own threads have stopped spinning.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Operation = Callable[..., Any]


def serve(operations: Mapping[str, Operation]) -> None:
    """Answers requests until stdin closes.

    Args:
        operations: what the worker can do, by name; each takes the request's other fields as keyword arguments and
            returns something that JSON can hold. `usage` is always there: peak resident memory of this process, bytes.

    Ctrl-C is left to the parent: its end closes stdin, and that ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Engines print to stdout at will; the protocol gets its own copy of the pipe, and stdout goes where stderr goes.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    table: dict[str, Operation] = {"usage": _usage, **operations}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"ok": True, "result": table[request.pop("op")](**request)}
        except Exception as error:  # the outer edge of the process: the parent reports it
            traceback.print_exc()
            reply = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        try:
            replies.write(json.dumps(reply) + "\n")
            replies.flush()
        except BrokenPipeError:
            return


def timed_generation(tokens: Iterator[int], started: float, new_tokens: int) -> dict[str, Any]:
    """Draws `new_tokens` tokens from an engine and times the first one apart from the rest.

    Args:
        tokens: yields one token id after the other, each when it is known.
        started: `time.perf_counter()` before the engine saw the prompt, in seconds.
        new_tokens: how many to draw, at least 1.

    Returns:
        `tokens`, `first_s` (prompt and first token, seconds), `decode_s` (the other `new_tokens - 1`, seconds).
    """
    drawn = [next(tokens)]
    first = time.perf_counter()
    drawn.extend(next(tokens) for _ in range(new_tokens - 1))
    last = time.perf_counter()
    return {"tokens": drawn, "first_s": first - started, "decode_s": last - first}


def _usage() -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024}
