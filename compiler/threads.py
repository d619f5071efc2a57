"""Work beside the caller, in a thread that dies with the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


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
