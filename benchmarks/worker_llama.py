"""Runs a GGUF file in llama.cpp through its C interface: `worker_llama.py MODEL.gguf THREADS CONTEXT`."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
from worker import serve, timed_generation

# Tokens whose logits are held at once in a perplexity run: 256 rows of a 50k vocabulary are 50 MB.
LOGITS_ROWS = 256


def main(path: str, threads: int, context_tokens: int) -> None:
    started = time.perf_counter()
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = context_tokens
    context_params.n_batch = 512
    context_params.n_ubatch = 512
    context_params.n_threads = threads
    context_params.n_threads_batch = threads
    context_params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, context_params)
    if not context:
        raise SystemExit(f"llama.cpp cannot make a context of {context_tokens} tokens for {path}")
    memory = llama_cpp.llama_get_memory(context)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    load_s = time.perf_counter() - started

    def describe() -> dict[str, Any]:
        return {
            "engine": f"llama-cpp-python {llama_cpp.__version__}",
            "load_s": load_s,
            "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    def decode(batch: Any, what: str) -> None:
        status = llama_cpp.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {what} returned {status}")

    def generate(prompt: list[int], new_tokens: int) -> dict[str, Any]:
        if len(prompt) + new_tokens > context_tokens:
            raise ValueError(f"{len(prompt)} + {new_tokens} tokens do not fit a context of {context_tokens}")
        llama_cpp.llama_memory_clear(memory, True)

        def tokens() -> Iterator[int]:
            # A batch from `get_one` continues the sequence and asks for the last token's logits only.
            pending = prompt
            while True:
                for start in range(0, len(pending), 512):
                    chunk = pending[start : start + 512]
                    array = (llama_cpp.llama_token * len(chunk))(*chunk)
                    decode(llama_cpp.llama_batch_get_one(array, len(chunk)), f"{len(chunk)} tokens")
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(vocabulary,))
                token = int(logits.argmax())
                yield token
                pending = [token]

        return {**timed_generation(tokens(), time.perf_counter(), new_tokens), "setup_s": 0.0}

    def negative_log_likelihood(window: list[int]) -> dict[str, Any]:
        """Sum of -ln p(token | earlier tokens of the window), and over how many tokens it goes."""
        llama_cpp.llama_memory_clear(memory, True)
        total = 0.0
        for start in range(0, len(window) - 1, LOGITS_ROWS):
            inputs = window[start : min(start + LOGITS_ROWS, len(window) - 1)]
            targets = window[start + 1 : start + 1 + len(inputs)]
            batch = llama_cpp.llama_batch_init(len(inputs), 0, 1)
            try:
                batch.n_tokens = len(inputs)
                for row, token in enumerate(inputs):
                    batch.token[row] = token
                    batch.pos[row] = start + row
                    batch.n_seq_id[row] = 1
                    batch.seq_id[row][0] = 0
                    batch.logits[row] = 1
                decode(batch, f"{len(inputs)} tokens")
            finally:
                llama_cpp.llama_batch_free(batch)
            pointer = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
            logits_TV = np.ctypeslib.as_array(pointer, shape=(len(inputs), vocabulary)).astype(np.float64)
            logits_TV -= logits_TV.max(axis=1, keepdims=True)
            log_sum_T = np.log(np.exp(logits_TV).sum(axis=1))
            total += float((log_sum_T - logits_TV[np.arange(len(targets)), targets]).sum())
        return {"sum": total, "tokens": len(window) - 1}

    serve({"describe": describe, "generate": generate, "negative_log_likelihood": negative_log_likelihood})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
