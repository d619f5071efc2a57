"""What the benchmark tells a person: one error type, one way to say what happens, on stderr."""

from __future__ import annotations

import sys


class BenchmarkError(Exception):
    """The comparison cannot go on. `hint` is one action the reader can take."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\n  hint: {self.hint}" if self.hint else message


def say(text: str) -> None:
    """One line about what happens now; stdout is left to the tables."""
    print(f"peers: {text}", file=sys.stderr, flush=True)
