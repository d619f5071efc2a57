"""The directory that comes out: written once, opened often.

model.onnx, model.onnx.data     the graph and its weights
tokenizer.json, ...             as they came with the source
config.json, generation_config.json, genai_config.json
onnxpress.json                  the card: passes, numbers, hashes, versions
repair.onnx_adapter, ...        what a pass made beside the graph
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

from onnxpress.compiler.errors import BadModelFileError
from onnxpress.compiler.genai import genai_config
from onnxpress.compiler.report import Card, installed
from onnxpress.compiler.sample_text import default_text
from onnxpress.compiler.scales import shortened
from onnxpress.compiler.sparse import append_initializers, compacted
from onnxpress.compiler.staging import MANIFEST
from onnxpress.compiler.target import Target
from onnxpress.compiler.threads import workers

if TYPE_CHECKING:
    from onnxpress.runtime.evaluate import Evaluation
    from onnxpress.runtime.model import Model, Prompt
    from onnxpress.runtime.session import DecoderSession

GRAPH = "model.onnx"
DATA = "model.onnx.data"
IR_VERSION = 10  # the newest that every ONNX Runtime since 1.20 loads
INLINE_BYTES = 256  # smaller tensors stay in the graph file
PIPELINE_KEY = "onnxpress.pipeline"

# What exporters note on every node about the Python code it came from; megabytes in a large graph.
_EXPORTER_NOTES = ("pkg.", "namespace")


class Origin(Protocol):
    """What the writer needs to know of the source model."""

    generation_config: dict[str, Any]
    files: dict[str, Path]


@dataclass(frozen=True)
class Artifact:
    """A directory that onnxpress wrote.

    Attributes:
        directory: where it lies.
        report: its card, the content of `onnxpress.json`.
    """

    directory: Path
    report: Card

    @property
    def model_path(self) -> Path:
        """The graph file."""
        return self.directory / GRAPH

    @property
    def nbytes(self) -> int:
        """Bytes of graph and weights."""
        return sum(path.stat().st_size for path in (self.model_path, self.directory / DATA) if path.exists())

    def session(self, *, provider: str = "auto", threads: int | None = None, strict: bool = False) -> DecoderSession:
        """The graph in onnxpress' runtime, without a tokenizer; see `onnxpress.runtime.session.DecoderSession`."""
        from onnxpress.runtime.session import DecoderSession

        return DecoderSession(self.directory, provider=provider, threads=threads, strict=strict)

    def load(self, *, provider: str = "auto", threads: int | None = None, strict: bool = False) -> Model:
        """The graph with its tokenizer; see `onnxpress.runtime.model.load`."""
        from onnxpress.runtime.model import load

        return load(self.directory, provider=provider, threads=threads, strict=strict)

    def generate(self, prompt: Prompt, *, chat: bool | None = None, **settings: Any) -> str:
        """The text that the model writes after `prompt`.

        Args:
            prompt: what the user says, the beginning of a text, a conversation, or token ids.
            chat: put a plain `prompt` into the chat template; None does so when the model has one.
            settings: those of `onnxpress.runtime.sampling.GenerationOptions`: max_new_tokens, adapter, seed, ...
        """
        return self._model.generate(as_prompt(self._model, prompt, chat=chat), **settings).text

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Reads a LoRA adapter for `generate(prompt, adapter=name)`; see `onnxpress.runtime.model.Model`."""
        return self._model.load_adapter(path, name)

    def evaluate(
        self,
        text: str | None = None,
        *,
        reference: str | Path | Artifact | None = None,
        context: int = 1024,
        tokens: int = 8192,
        adapter: str | None = None,
    ) -> Evaluation:
        """Perplexity on `text`, and with a reference the distance from it.

        Args:
            text: plain text; None for English text that comes with Python.
            reference: a model directory or artifact with the same vocabulary, or the one this was pruned from.
            context: tokens of a window.
            tokens: how much of the text.
            adapter: name of a loaded adapter that this model uses, the reference not.
        """
        from onnxpress.runtime.model import load

        directory = reference.directory if isinstance(reference, Artifact) else reference
        return self._model.evaluate(
            text or default_text(),
            context=context,
            tokens=tokens,
            reference=None if directory is None else load(directory),
            adapter=adapter,
        )

    @functools.cached_property
    def _model(self) -> Model:
        return self.load()

    def __str__(self) -> str:
        return str(self.directory)


def open_artifact(directory: str | Path) -> Artifact:
    """The artifact in `directory`.

    Raises:
        BadModelFileError: no artifact there, its card is unreadable, or its graph is missing.
    """
    directory = Path(directory)
    manifest = directory / MANIFEST
    if not directory.exists():
        raise BadModelFileError(f"{directory}: no such file or directory", hint="check the path")
    if not manifest.is_file():
        raise BadModelFileError(
            f"{directory}: expected an artifact of onnxpress, found no {MANIFEST}", hint="write one: onnxpress optimize"
        )
    try:
        card = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModelFileError(f"{manifest}: expected JSON: {error}", hint="write the artifact again") from error
    if not isinstance(card, dict):
        raise BadModelFileError(f"{manifest}: expected a JSON object, found {type(card).__name__}")
    if not (directory / GRAPH).is_file():
        raise BadModelFileError(f"{directory}: {GRAPH} is missing", hint="write the artifact again")
    return Artifact(directory, card)


def write_graph(model: ir.Model, directory: Path, *, pipeline: str = "", max_in_flight_bytes: int = 256 << 20) -> Path:
    """Saves `model` with external data and returns the graph file.

    The model is set up for ONNX Runtime on the way: IR version, operator domains, producer, `onnxpress.pipeline`.

    Args:
        model: the graph; lazily computed weights are computed now, on several cores.
        directory: where it goes.
        pipeline: the text of the passes that made it.
        max_in_flight_bytes: weights that are in memory at once; a single larger one still is.
    """
    model.ir_version = IR_VERSION
    used = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    for domain in used - set(model.opset_imports):
        model.opset_imports[domain] = 1
    for domain in set(model.opset_imports) - used - {""} - {function.domain for function in model.functions.values()}:
        del model.opset_imports[domain]
    model.producer_name, model.producer_version = "onnxpress", installed("onnxpress") or ""
    if pipeline:
        model.metadata_props[PIPELINE_KEY] = pipeline
    _drop_exporter_notes(model)
    path = directory / GRAPH
    with shortened(model, threshold=INLINE_BYTES), compacted(model, threshold=INLINE_BYTES) as compact:
        ir.save(
            model,
            path,
            external_data=DATA,
            size_threshold_bytes=INLINE_BYTES,
            max_workers=min(4, workers()),
            max_in_flight_bytes=max_in_flight_bytes,
        )
        append_initializers(path, compact.initializers)
    return path


def write_companions(
    model: ir.Model, directory: Path, *, source: Origin, config: Mapping[str, Any], target: Target
) -> None:
    """Copies the tokenizer files and writes the configs beside a graph."""
    for name, path in source.files.items():
        shutil.copyfile(path, directory / name)
    if config:
        _write_json(directory / "config.json", dict(config))
    if source.generation_config:
        _write_json(directory / "generation_config.json", source.generation_config)
    if (genai := genai_config(model, config, source.generation_config, target)) is not None:
        _write_json(directory / "genai_config.json", genai)


def write_card(card: Card, directory: Path) -> None:
    """Writes `onnxpress.json`, which accounts for every file of the directory."""
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    card["files"] = {name: _facts(directory / name, with_hash=name in (GRAPH, DATA)) for name in names}
    _write_json(directory / MANIFEST, card)


def as_prompt(model: Model, prompt: Prompt, *, chat: bool | None = None) -> Prompt:
    """A plain text as a conversation, unless `chat` is False or the model has no chat template."""
    if not isinstance(prompt, str):
        return prompt
    if chat is None:
        chat = model.has_tokenizer and "default" in model.tokenizer.templates
    return [{"role": "user", "content": prompt}] if chat else prompt


def _drop_exporter_notes(model: ir.Model) -> None:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.doc_string = None
        for key in [key for key in node.metadata_props if key.startswith(_EXPORTER_NOTES)]:
            del node.metadata_props[key]
        for value in node.outputs:
            for key in [key for key in value.metadata_props if key.startswith(_EXPORTER_NOTES)]:
                del value.metadata_props[key]


def _facts(path: Path, *, with_hash: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"bytes": path.stat().st_size}
    if with_hash:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        facts["sha256"] = digest.hexdigest()
    return facts


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """numpy numbers, paths and sets as JSON knows them."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return str(value)
