"""Runs a model directory in onnxruntime-genai: `worker_genai.py MODEL_DIR THREADS`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime_genai as og
from worker import serve, timed_generation


def main(directory: str, threads: int) -> None:
    started = time.perf_counter()
    config = og.Config(directory)
    # An overlay changes the loaded configuration only; the directory stays as the builder wrote it.
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    load_s = time.perf_counter() - started

    def describe() -> dict[str, Any]:
        return {"engine": f"onnxruntime-genai {og.__version__}", "load_s": load_s}

    def generate(prompt: list[int], new_tokens: int) -> dict[str, Any]:
        begun = time.perf_counter()
        params = og.GeneratorParams(model)
        length = len(prompt) + new_tokens
        # min_length keeps end-of-sequence tokens out, so that every engine makes the same number of steps.
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        generator = og.Generator(model, params)
        ids = np.asarray(prompt, dtype=np.int32)
        setup_s = time.perf_counter() - begun

        def tokens() -> Iterator[int]:
            generator.append_tokens(ids)
            while True:
                generator.generate_next_token()
                yield int(generator.get_next_tokens()[0])

        return {**timed_generation(tokens(), time.perf_counter(), new_tokens), "setup_s": setup_s}

    serve({"describe": describe, "generate": generate})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
