"""Hugging Face checkpoints: a directory with config.json and safetensors, or an id that resolves to one.

The files are untrusted: no pickle is opened, no code of a checkpoint runs, and a weight that is missing is an error
and not a random number.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError, UserError
from onnxpress.models import directory as directories
from onnxpress.models import export
from onnxpress.models.source import COMPANION_FILES, Source

logger = logging.getLogger(__name__)

_CHECKPOINT = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *COMPANION_FILES]
_GRAPH = [f"{folder}model.onnx{suffix}" for folder in ("", "onnx/") for suffix in ("", "_data", ".data")]
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


def load(
    directory: Path,
    *,
    name: str,
    work_dir: Path,
    exporter: export.Exporter | None,
    opset: int,
    tell: Callable[[str], None],
) -> Source:
    """Exports the checkpoint in `directory` to a graph below `work_dir`; see `onnxpress.models.load`.

    Raises:
        BadModelFileError: a file is missing, truncated or no checkpoint.
        UnsupportedModelError: only pickled weights, already quantized, needs its own code, or cannot be exported.
    """
    config = directories.read_json(directory / "config.json")
    weights = check_checkpoint(directory, config)
    chosen, why = export.choose(exporter)
    tell(f"exporting {config.get('model_type', name)} with {chosen}{why and f' ({why})'}")
    out = export.make_out(work_dir)
    job = export.Job("huggingface", str(directory.absolute()), str(out), chosen, opset)
    facts = export.run(job)
    files = directories.hashes([directory / "config.json", *weights])
    provenance = {"format": "huggingface", **facts, **({"exporter_because": why} if why else {}), "files": files}
    return directories.onnx_source(
        out / "model.onnx", name=name, kind="huggingface", beside=(directory, out), provenance=provenance
    )


def fetch(model_id: str, tell: Callable[[str], None]) -> Path:
    """The local snapshot of a hub repository: its safetensors checkpoint, or its ONNX graph if it has no other.

    Raises:
        UnsupportedModelError: the hub has no such repository, or not for us.
        UserError: the hub cannot be reached and the repository is not in the cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    tell(f"fetching {model_id} from the Hugging Face hub")
    try:
        snapshot = Path(huggingface_hub.snapshot_download(model_id, allow_patterns=_CHECKPOINT))
        if not any(snapshot.glob("*.safetensors")):
            snapshot = Path(huggingface_hub.snapshot_download(model_id, allow_patterns=[*_CHECKPOINT, *_GRAPH]))
    except errors.GatedRepoError as error:
        raise UnsupportedModelError(
            f"{model_id}: its owner asks for consent first", hint="accept it on the hub, then run: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UnsupportedModelError(
            f"{model_id!r} is neither a file or directory here nor a model on the Hugging Face hub",
            hint="check the name; a private model needs: hf auth login",
        ) from error
    # LocalEntryNotFoundError (offline), HTTP errors, and those of whichever HTTP library the hub client uses.
    except (OSError, ValueError, RuntimeError) as error:
        logger.debug("%s: no snapshot", model_id, exc_info=True)
        raise UserError(
            f"{model_id}: no such file here, and it cannot be fetched from the Hugging Face hub",
            hint="check the network, or give the path of a local model",
        ) from error
    return snapshot


def check_checkpoint(directory: Path, config: dict[str, Any]) -> list[Path]:
    """The weight files of a checkpoint, each found whole; torch-free, so that bad input fails at once.

    Raises:
        BadModelFileError, UnsupportedModelError: as `load`.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        raise UnsupportedModelError(
            f"{directory}: expected float weights, found a checkpoint quantized with {method!r}",
            hint="start from the checkpoint it was made of",
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{directory}: expected one graph, an encoder-decoder model exports to several",
            hint=f"optimum-cli export onnx --no-post-process --task {_task(config)}-with-past --model {directory} PARTS"
            ", then for each file there onnxpress optimize PARTS/encoder_model.onnx -o OUT",
        )
    index = directories.read_json(directory / "model.safetensors.index.json")
    if isinstance(weight_map := index.get("weight_map"), dict):
        shards = sorted({str(shard) for shard in weight_map.values()})
        if missing := [shard for shard in shards if not (directory / shard).is_file()]:
            raise BadModelFileError(
                f"{directory}: expected {len(shards)} weight files, missing {', '.join(missing)}", hint="fetch the rest"
            )
        weights = [directory / shard for shard in shards]
    else:
        weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise UnsupportedModelError(
            f"{directory}: expected weights as safetensors, found only pickled ones, which can run code when opened",
            hint="convert them: load in transformers and save_pretrained()",
        )
    for path in weights:
        check_safetensors(path)
    return weights


def _task(config: dict[str, Any]) -> str:
    """What optimum calls the use of an encoder-decoder model; it does not find that out from a directory."""
    if "num_mel_bins" in config:
        return "automatic-speech-recognition"
    is_vision = str(config.get("model_type", "")).startswith("vision")
    return "image-to-text" if is_vision else "text2text-generation"


def check_safetensors(path: Path) -> None:
    """Raises BadModelFileError unless `path` holds a safetensors header and every byte that it promises."""
    import json

    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_SAFETENSORS_HEADER_LIMIT, size - 8):
            pointer = head == b"version "
            raise BadModelFileError(
                f"{path}: expected safetensors, found {'a git-lfs pointer' if pointer else 'no header of that kind'}",
                hint="fetch the file: git lfs pull" if pointer else "fetch the file again",
            )
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise BadModelFileError(
                f"{path}: its safetensors header is damaged", hint="fetch the file again"
            ) from error
    if size < expected:
        raise BadModelFileError(
            f"{path}: truncated: expected {expected:,} bytes, found {size:,}", hint="fetch the file again"
        )


def read_model(directory: Path, *, attention: str | None = None) -> Any:
    """The checkpoint as a transformers model in float32, of the class that its config names. Imports torch.

    Args:
        directory: config.json and weights.
        attention: "eager" or "sdpa", as transformers calls them; None for the model's own choice.

    Raises:
        BadModelFileError: weights are missing or do not fit.
        UnsupportedModelError: transformers does not know the architecture, or it needs code from the checkpoint.
    """
    import torch
    import transformers

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **local)
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        model_type = directories.read_json(directory / "config.json").get("model_type")
        raise UnsupportedModelError(
            f"{directory}: transformers {transformers.__version__} cannot read the architecture {model_type!r}",
            hint="models that bring their own code are not supported",
        ) from error
    name = (getattr(config, "architectures", None) or [None])[0]
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        is_decoder = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        cls = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModel
    try:
        model, loaded = cls.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **({} if attention is None else {"attn_implementation": attention}),
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadModelFileError(
            f"{directory}: the weights do not load: {reason}", hint="do config.json and weights belong together?"
        ) from error
    require_all(str(directory), loaded["missing_keys"])
    return model


def require_all(where: str, missing: Any) -> None:
    """Raises BadModelFileError if weights are `missing`; transformers would go on with random numbers."""
    if missing:
        names = sorted(missing)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise BadModelFileError(f"{where}: {len(names)} weights are missing: {shown}", hint="fetch or convert it again")


def save_fast_tokenizer(directory: Path, out: Path) -> None:
    """Writes tokenizer.json to `out` if a checkpoint has only the slow tokenizer's files. Imports transformers."""
    if (directory / "tokenizer.json").is_file() or not directories.companions(directory):
        return
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(out)
    # A model is worth exporting without a tokenizer; which converters are installed decides what is raised here.
    except Exception as error:
        logger.warning("%s: its tokenizer cannot be converted to tokenizer.json: %s", directory, error)
