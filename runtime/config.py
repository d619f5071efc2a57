"""The settings beside a model file that the runtime needs, whichever tool wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxpress.compiler.errors import BadModelFileError

_FILE_NAMES = ("model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx", "model_fp16.onnx")


@dataclass(frozen=True)
class ModelConfig:
    """What `config.json`, `generation_config.json` and `genai_config.json` say; None where none of them does.

    Attributes:
        context_length: tokens the model was made for.
        head_dim: width of one attention head, for graphs that leave it symbolic.
        eos_token_ids: the tokens that end a text.
    """

    context_length: int | None = None
    vocab_size: int | None = None
    head_dim: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    generation: dict[str, Any] = field(default_factory=dict)


def find_model(path: str | Path) -> Path:
    """The ONNX file meant by `path`: itself, or the decoder in that directory.

    Raises:
        BadModelFileError: there is none, or several and none has a usual name.
    """
    path = Path(path)
    if not path.exists():
        raise BadModelFileError(
            f"{path}: expected a model directory or an .onnx file, found nothing",
            hint="check the path; checkpoints and zoo names become ONNX by `onnxpress export NAME -o DIR`",
        )
    if path.is_file() and path.suffix.lower() in (".gguf", ".safetensors"):
        raise BadModelFileError(
            f"{path}: expected an .onnx file, got a {path.suffix} file",
            hint="checkpoints and GGUF files become ONNX by `onnxpress export NAME -o DIR`, or by `optimize`",
        )
    if path.is_file():
        return path
    genai = read_json(path / "genai_config.json")
    named = _at(genai, "model", "decoder", "filename")
    for name in (*([named] if isinstance(named, str) else []), *_FILE_NAMES):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    raise BadModelFileError(
        f"{path}: expected model.onnx, found {', '.join(file.name for file in found) or 'no .onnx file'}",
        hint="give the path of the .onnx file itself" if found else "optimize or export a model into this directory",
    )


def read_config(directory: Path) -> ModelConfig:
    """Reads the settings beside a model.

    Raises:
        BadModelFileError: one of the files is not JSON.
    """
    config = read_json(directory / "config.json")
    config = {**config, **(config.get("text_config") or {})}
    generation = read_json(directory / "generation_config.json")
    genai = _at(read_json(directory / "genai_config.json"), "model") or {}
    decoder = genai.get("decoder") or {}

    head_dim = decoder.get("head_size") or config.get("head_dim")
    if not head_dim and config.get("hidden_size") and config.get("num_attention_heads"):
        head_dim = config["hidden_size"] // config["num_attention_heads"]
    return ModelConfig(
        context_length=_int(_first(config.get("max_position_embeddings"), genai.get("context_length"))),
        vocab_size=_int(_first(config.get("vocab_size"), genai.get("vocab_size"))),
        head_dim=_int(head_dim),
        eos_token_ids=frozenset(_ids(_first(*(part.get("eos_token_id") for part in (generation, genai, config))))),
        bos_token_id=_int(_first(*(part.get("bos_token_id") for part in (generation, genai, config)))),
        pad_token_id=_int(_first(*(part.get("pad_token_id") for part in (generation, genai, config)))),
        generation=generation,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file at `path`, {} if there is no such file.

    Raises:
        BadModelFileError: the file is not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadModelFileError(f"{path}: expected JSON, got {error}", hint="copy the file again") from error
    if not isinstance(found, dict):
        raise BadModelFileError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _ids(value: Any) -> Iterable[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, list) else [int(value)]
