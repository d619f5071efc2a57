"""Runs a model directory in onnxpress: `worker_onnxpress.py MODEL_DIR THREADS`."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from typing import Any

from worker import serve, timed_generation

from onnxpress.runtime import DecoderSession, GenerationOptions, Generator


def main(directory: str, threads: int) -> None:
    started = time.perf_counter()
    session = DecoderSession(directory, provider="cpu", threads=threads)
    load_s = time.perf_counter() - started

    def describe() -> dict[str, Any]:
        return {"engine": f"onnxpress {version('onnxpress')}", "load_s": load_s}

    def generate(prompt: list[int], new_tokens: int) -> dict[str, Any]:
        options = GenerationOptions(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        begun = time.perf_counter()
        # A new generator for each request: a used one remembers its last text, and would skip a prompt it has seen.
        tokens = Generator(session).tokens(prompt, options)
        return {**timed_generation(tokens, begun, new_tokens), "setup_s": 0.0}

    serve({"describe": describe, "generate": generate})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
