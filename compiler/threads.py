"""Work beside the caller: how many threads there are to be, and one that dies with the process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")

# Limits that hold now, of the process as those of the linear algebra library are, and how that one was before.
_limits: list[int] = []
_before: list[threadpool_limits] = []
_lock = threading.Lock()


@contextmanager
def limited(count: int | None) -> Iterator[None]:
    """Within it each part of the work that compresses a model uses at most `count` threads; None changes nothing.

    The limit is that of the process: of several at a time, in threads or one inside the other, the smallest holds. The
    loss of the uncompressed model is measured beside the first pass, in a part of its own.
    """
    if count is None:
        yield
        return
    _change(_limits.append, count)
    try:
        yield
    finally:
        _change(_limits.remove, count)


def _change(change: Callable[[int], None], count: int) -> None:
    with _lock:
        change(count)
        if _before:
            _before.pop().restore_original_limits()
        if _limits:
            _before.append(threadpool_limits(min(_limits), user_api="blas"))


def workers() -> int:
    """Threads that work side by side: as many as were allowed, else one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_limits, default=cores)


def session_threads() -> int:
    """What ONNX Runtime is told: as many threads as were allowed, or 0, its own choice (one for each physical core)."""
    return min(_limits, default=0)


def in_thread(compute: Callable[[], T], name: str) -> Future[T]:
    """What `compute` returns or raises, later; neither the end of the program nor an interrupt waits for it.

    Args:
        compute: called once, in a thread of its own.
        name: of the thread.
    """
    promise: Future[T] = Future()

    def work() -> None:
        try:
            promise.set_result(compute())
        except BaseException as error:  # handed to whoever asks for the result
            promise.set_exception(error)

    threading.Thread(target=work, name=f"onnxpress-{name}", daemon=True).start()
    return promise
