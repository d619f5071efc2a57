"""What a front end hands to the compiler: a graph, its config, and the files that travel with it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

# Files beside a model that belong to its tokenizer or its generation; copied into the artifact unchanged.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "preprocessor_config.json",
    "processor_config.json",
)


@dataclass
class Source:
    """A model as it came in.

    Attributes:
        model: the graph; weights are external tensors, memory-mapped below `directory`.
        name: what the user asked for.
        kind: "huggingface", "gguf", "onnx" or "artifact" (a directory that onnxpress wrote).
        directory: where `model.onnx` (the graph file) lies; weights are read from here until the artifact is written.
        model_path: the graph file.
        config: the Hugging Face `config.json`, {} when there is none.
        generation_config: `generation_config.json`, {} when there is none.
        files: companion files (tokenizer, chat template) by name.
        facts: exporter, versions, formats; part of `provenance`.
        stored_types: how a GGUF file stores a weight, as `Context.stored_types` has it; {} for other sources.
        hashing: size and SHA-256 of the source files, on their way from a thread: hashing a large file takes longer
            than everything else about loading it.
    """

    model: ir.Model
    name: str
    kind: str
    directory: Path
    model_path: Path
    config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    stored_types: dict[str, tuple[str, str]] = field(default_factory=dict)
    hashing: Future[dict[str, dict[str, Any]]] | None = field(default=None, repr=False)

    @property
    def provenance(self) -> dict[str, Any]:
        """Exporter, versions, hashes, source files; goes into the card. Waits for the hashes."""
        if self.hashing is not None:
            self.facts["files"] = self.hashing.result()
            self.hashing = None
        return self.facts
