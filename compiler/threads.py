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

_allowed: int | None = None  # of the process, as those of the linear algebra library are


@contextmanager
def limited(count: int | None) -> Iterator[None]:
    """Within it nothing that compresses a model uses more than `count` threads at a time; None leaves the choice.

    The limit is that of the process: two limits at a time, in two threads, would not be kept apart.
    """
    global _allowed
    before, _allowed = _allowed, count
    try:
        with threadpool_limits(count, user_api="blas"):
            yield
    finally:
        _allowed = before


def workers() -> int:
    """Threads that work side by side: as many as were allowed, else one for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _allowed or cores


def session_threads() -> int:
    """What ONNX Runtime is told: as many threads as were allowed, or 0, its own choice (one for each physical core)."""
    return _allowed or 0


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
