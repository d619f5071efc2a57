"""What lies beside a graph: configs, tokenizer files, a manifest; read as untrusted input."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from onnxpress.compiler.errors import BadModelFileError
from onnxpress.compiler.genai import settle_head_sizes
from onnxpress.compiler.threads import in_thread
from onnxpress.models import onnx_file
from onnxpress.models.source import COMPANION_FILES, Source

MANIFEST = "onnxpress.json"
GENAI_CONFIG = "genai_config.json"
HASH_LIMIT = (
    4 << 30
)  # bytes; a larger data file is named with its size only, hashing it would take longer than the work

# genai_config.json -> config.json; decoder keys first, model keys last.
_GENAI_DECODER = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "num_hidden_layers": "num_hidden_layers",
    "head_size": "head_dim",
}
_GENAI_MODEL = {
    "type": "model_type",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_GENAI_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} when there is no such file.

    Raises:
        BadModelFileError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelFileError(f"{path}: expected JSON: {error}", hint="fetch or write the file again") from error
    if not isinstance(content, dict):
        raise BadModelFileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def companions(*directories: Path) -> dict[str, Path]:
    """Tokenizer and generation files by name; an earlier directory wins."""
    found: dict[str, Path] = {}
    for directory in directories:
        for name in COMPANION_FILES:
            if (directory / name).is_file():
                found.setdefault(name, directory / name)
    return found


def onnx_source(
    graph: Path,
    *,
    name: str,
    kind: str = "onnx",
    beside: tuple[Path, ...] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Source:
    """A `Source` of the graph in `graph`, with the configs and tokenizer files found in the directories `beside`.

    Args:
        graph: the `.onnx` file.
        name: what the user asked for.
        kind: how the graph came about, see `Source.kind`.
        beside: where to look for companions, best first; by default the graph's directory, and the one above if the
            graph lies in a folder `onnx`, as on the Hugging Face hub.
        provenance: facts for the card; by default hash and size of the graph and its data files.

    Raises:
        BadModelFileError: see `onnx_file.load_onnx`, or a config is no JSON object.
    """
    graph = graph.absolute()
    if beside is None:
        beside = (graph.parent, graph.parent.parent) if graph.parent.name == "onnx" else (graph.parent,)
    model = onnx_file.load_onnx(graph)
    config = _first_json("config.json", beside)
    generation_config = _first_json("generation_config.json", beside)
    genai = _first_json(GENAI_CONFIG, beside)
    if genai and not config:
        config = _config_from_genai(genai)
    if genai and not generation_config:
        generation_config = {key: config[key] for key in _GENAI_GENERATION if key in config}
    settle_head_sizes(model, config)
    hashing = None
    if provenance is None:
        provenance = {
            "format": "onnx",
            "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        }
        hashing = in_thread(functools.partial(hashes, [graph, *onnx_file.data_files(model)]), "hash")
    if manifest := _first_json(MANIFEST, beside):
        provenance["artifact"] = manifest
        kind = "artifact" if kind == "onnx" else kind
    return Source(
        model=model,
        name=name,
        kind=kind,
        directory=graph.parent,
        model_path=graph,
        config=config,
        generation_config=generation_config,
        files=companions(*beside),
        facts=provenance,
        hashing=hashing,
    )


def hashes(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, by file name; of those above `HASH_LIMIT` the size only."""
    facts: dict[str, dict[str, Any]] = {}
    for path in {path.resolve(): path for path in paths}.values():
        size = path.stat().st_size
        facts[path.name] = {"bytes": size, **({"sha256": onnx_file.sha256(path)} if size <= HASH_LIMIT else {})}
    return facts


def find_graph(directory: Path) -> Path | None:
    """The graph that a directory means: an artifact's or genai's, `model.onnx`, or the only `.onnx` file; or None.

    Raises:
        BadModelFileError: several graphs and none is called `model.onnx`, or the one a config names is missing.
    """
    if genai := read_json(directory / GENAI_CONFIG):
        model = genai.get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        filename = decoder.get("filename") if isinstance(decoder, dict) else None
        if isinstance(filename, str) and filename:
            if Path(filename).is_absolute() or ".." in Path(filename).parts:
                raise BadModelFileError(
                    f"{directory / GENAI_CONFIG}: decoder.filename {filename!r} leaves the directory"
                )
            if not (directory / filename).is_file():
                raise BadModelFileError(
                    f"{directory / GENAI_CONFIG}: expected the graph {filename!r} beside it, found no such file",
                    hint="fetch or build the model again",
                )
            return directory / filename
    if (directory / "model.onnx").is_file():
        return directory / "model.onnx"
    if (directory / MANIFEST).is_file():
        raise BadModelFileError(
            f"{directory}: expected an onnxpress artifact with model.onnx, which is missing", hint="write it again"
        )
    graphs = sorted(directory.glob("*.onnx"))
    if len(graphs) > 1:
        names = ", ".join(graph.name for graph in graphs)
        raise BadModelFileError(f"{directory}: expected one graph, found {names}", hint="give one of the files")
    return graphs[0] if graphs else None


def _first_json(name: str, directories: tuple[Path, ...]) -> dict[str, Any]:
    return next((content for directory in directories if (content := read_json(directory / name))), {})


def _config_from_genai(genai: dict[str, Any]) -> dict[str, Any]:
    """What a genai_config.json knows of config.json; the builder writes no config.json of its own."""
    model = genai.get("model")
    if not isinstance(model, dict):
        return {}
    decoder = model.get("decoder")
    config: dict[str, Any] = {}
    if isinstance(decoder, dict):
        config |= {ours: decoder[theirs] for theirs, ours in _GENAI_DECODER.items() if theirs in decoder}
    return config | {ours: model[theirs] for theirs, ours in _GENAI_MODEL.items() if theirs in model}
