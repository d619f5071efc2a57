"""Runs an artifact on ONNX Runtime: session, generation, evaluation, benchmark, placement."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxpress.runtime.benchmark import Benchmark
    from onnxpress.runtime.evaluate import Evaluation, detokenize_wikitext, perplexity
    from onnxpress.runtime.generate import Generation, Generator, Stream
    from onnxpress.runtime.model import Model, load
    from onnxpress.runtime.placement import Placement, audit
    from onnxpress.runtime.providers import Choice, choose, explain
    from onnxpress.runtime.sampling import GenerationOptions
    from onnxpress.runtime.session import DecoderSession, Decoding
    from onnxpress.runtime.tokenizer import Tokenizer

# Loaded when first asked for: `python -m onnxpress.runtime.benchmark` measures memory, and must not pay for the rest.
_HOMES = {
    "Benchmark": "benchmark",
    "Choice": "providers",
    "DecoderSession": "session",
    "Decoding": "session",
    "Evaluation": "evaluate",
    "Generation": "generate",
    "GenerationOptions": "sampling",
    "Generator": "generate",
    "Model": "model",
    "Placement": "placement",
    "Stream": "generate",
    "Tokenizer": "tokenizer",
    "audit": "placement",
    "choose": "providers",
    "detokenize_wikitext": "evaluate",
    "explain": "providers",
    "load": "model",
    "perplexity": "evaluate",
}

__all__ = [
    "Benchmark",
    "Choice",
    "DecoderSession",
    "Decoding",
    "Evaluation",
    "Generation",
    "GenerationOptions",
    "Generator",
    "Model",
    "Placement",
    "Stream",
    "Tokenizer",
    "audit",
    "choose",
    "detokenize_wikitext",
    "explain",
    "load",
    "perplexity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
