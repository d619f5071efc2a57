"""How long one phase of a decoder takes, round by round, so that several can take turns.

Axes: B batch, S tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxpress.compiler.errors import ProviderError
from onnxpress.runtime.session import DecoderSession

_PROMPT, _STEPS, _PREFILL = 128, 16, 256  # tokens
_ROUND_S, _MOST = 0.1, 64  # a round takes at least so long, or so many runs: what is shorter drowns in noise


class Stopwatch:
    """An open decoder. Single rounds say little on a machine that does other things: compare models in turns."""

    def __init__(self, path: Path, phase: str, provider: str) -> None:
        """Opens the model.

        Args:
            path: a directory with a model.
            phase: "decode", 16 tokens behind 128 others, one by one; or "prefill", a text of 256 tokens; fewer where
                the model takes fewer.
            provider: cpu or cuda.

        Raises:
            ProviderError: the provider does not work here.
            UnsupportedModelError: the model is no decoder.
        """
        try:
            session = DecoderSession(path, provider=provider, strict=True)
        except ProviderError as error:
            raise ProviderError(
                f"speed is measured where the model will run, on {provider}: {error.message}",
                hint="run this on such a machine, or give size= instead of speedup=",
            ) from error
        self._run = {"decode": _decode, "prefill": _prefill}[phase](session, session.context_length or 1 << 30)
        self._run()  # the first one allocates
        self._runs = min(_MOST, 1 + int(_ROUND_S / self._run()))

    def seconds(self) -> float:
        """Of one round: the mean of its runs."""
        return sum(self._run() for _ in range(self._runs)) / self._runs


def _prefill(session: DecoderSession, limit: int) -> Callable[[], float]:
    length = max(1, min(_PREFILL, limit - 1))
    prompt_BS = np.random.default_rng(0).integers(0, session.vocab_size, (1, length))

    def run() -> float:
        decoding = session.begin(1, length + 1)
        start = time.perf_counter()
        decoding.prefill(prompt_BS)
        return time.perf_counter() - start

    return run


def _decode(session: DecoderSession, limit: int) -> Callable[[], float]:
    steps = max(1, min(_STEPS, limit // 2))
    length = max(1, min(_PROMPT, limit - steps))
    tokens = np.random.default_rng(0).integers(0, session.vocab_size, length + steps)
    decoding = session.begin(1, length + steps)
    decoding.prefill(tokens[None, :length])

    def run() -> float:
        decoding.truncate(length)
        start = time.perf_counter()
        for token in tokens[length:].tolist():
            decoding.step(token)
        return time.perf_counter() - start

    return run
