"""GGUF files: every tensor is dequantized to float32 into a config-built transformers model, which is then exported.

transformers reads the config and maps the tensors; its tokenizer is corrected where it contradicts the file: it takes
the beginning-of-text token for the end-of-text one, and adds it to every text whatever `add_bos_token` says.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError
from onnxpress.models import directory as directories
from onnxpress.models import export, huggingface
from onnxpress.models.source import Source

if TYPE_CHECKING:
    from onnxpress.models.load import Exporter

logger = logging.getLogger(__name__)

_VERSIONS = (2, 3)
_HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, metadata entries
# How byte-level vocabularies cut a text before merging, by `tokenizer.ggml.pre`; transformers cuts all as GPT-2 does.
_GPT2_LIKE = ("default", "gpt-2")
_SPLITS_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_LLAMA3_LIKE = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(
    path: Path, *, name: str, work_dir: Path, exporter: Exporter, opset: int, tell: Callable[[str], None]
) -> Source:
    """Exports the model in a GGUF file to a graph below `work_dir`; see `onnxpress.models.load`.

    Raises:
        BadModelFileError: the file is no GGUF, of another byte order or version, or truncated.
        UnsupportedModelError: an architecture that transformers or the exporter does not know.
    """
    check_header(path)
    tell(f"dequantizing {path.name} and exporting it with {exporter}")
    out = export.make_out(work_dir)
    facts = export.run(export.Job("gguf", str(path.absolute()), str(out), exporter, opset))
    provenance = {"format": "gguf", **facts, "files": directories.hashes([path])}
    return directories.onnx_source(out / "model.onnx", name=name, kind="gguf", beside=(out,), provenance=provenance)


def check_header(path: Path) -> None:
    """Raises BadModelFileError unless `path` begins like a GGUF file that we can read. Cheap: 24 bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except OSError as error:
        raise BadModelFileError(f"{path}: cannot be read: {error.strerror}", hint="check its permissions") from error
    if head.startswith(b"version https://git-lfs"):
        raise BadModelFileError(f"{path}: expected GGUF, found a git-lfs pointer", hint="fetch it: git lfs pull")
    if head[:4] != b"GGUF":
        raise BadModelFileError(f"{path}: expected a GGUF file, it begins with {head[:4]!r}", hint="fetch it again")
    if len(head) < _HEADER.size:
        raise BadModelFileError(f"{path}: truncated: found {len(head)} bytes", hint="fetch it again")
    version = _HEADER.unpack(head)[1]
    if version not in _VERSIONS:
        raise BadModelFileError(
            f"{path}: expected GGUF version {' or '.join(map(str, _VERSIONS))} (little-endian), found {version:#x}",
            hint="convert it with a current llama.cpp",
        )


def read(path: Path) -> Any:
    """A `gguf.GGUFReader` of the file, in which every tensor lies inside the file.

    Raises:
        BadModelFileError: the file is damaged or truncated.
    """
    import gguf

    check_header(path)
    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        ends = [(int(tensor.data_offset) + int(tensor.n_bytes), tensor.name) for tensor in reader.tensors]
    # The reader trusts the file: a damaged one makes it index, convert or decode what is not there.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, OSError) as error:
        raise BadModelFileError(
            f"{path}: damaged or truncated at {size:,} bytes: {error}", hint="fetch the file again"
        ) from error
    if not ends:
        raise BadModelFileError(f"{path}: expected tensors, found none", hint="is it a vocabulary-only file?")
    end, name = max(ends)
    if end > size:
        raise BadModelFileError(
            f"{path}: truncated: tensor {name!r} ends at byte {end:,}, the file at {size:,}",
            hint="fetch the file again",
        )
    return reader


def read_model(path: Path, out: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and facts for the card; its tokenizer is written to `out`. Imports torch.

    Raises:
        BadModelFileError: the file is damaged, or lacks weights.
        UnsupportedModelError: transformers cannot read this architecture from GGUF.
    """
    reader = read(path)
    architecture = str(_metadata(reader, "general.architecture", ""))

    import torch
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    supported = sorted(modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES)
    # transformers calls some architectures by another name than the file does: qwen2moe, qwen2_moe.
    spellings = {known.replace("_", "") for known in supported}
    if architecture.replace("_", "") not in spellings:
        raise UnsupportedModelError(
            f"{path}: GGUF architecture {architecture!r} is not supported", hint=f"supported: {', '.join(supported)}"
        )
    with _shared(reader):
        try:
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (ValueError, KeyError, RuntimeError, NotImplementedError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedModelError(
                f"{path}: {architecture} cannot be read by transformers {transformers.__version__}: {reason}",
                hint="convert the original checkpoint instead",
            ) from error
        huggingface.require_all(str(path), loaded["missing_keys"])
        _save_tokenizer(reader, path, out)
    _scale_rotary(reader, path, model)
    # Else optimum looks for a tokenizer where the file lies, and writes its own reading of it over ours.
    model.config._name_or_path = str(out)
    _set_special_ids(reader, model)
    types = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
    facts = {
        "gguf_architecture": architecture,
        "general_name": _metadata(reader, "general.name", None),
        "tensor_types": dict(sorted(types.items())),
    }
    return model, facts


def _save_tokenizer(reader: Any, path: Path, out: Path) -> None:
    """Writes tokenizer.json and its configs; special tokens and templates are those that the file names."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise UnsupportedModelError(
            f"{path}: its tokenizer cannot be read: {error}", hint="convert the original checkpoint instead"
        ) from error
    tokens = reader.fields["tokenizer.ggml.tokens"]
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _metadata(reader, f"tokenizer.ggml.{key}_token_id", None)
        if index is not None:
            setattr(tokenizer, f"{kind}_token", tokens.contents(int(index)))
    backend = tokenizer.backend_tokenizer
    is_byte_level = _metadata(reader, "tokenizer.ggml.model", "") == "gpt2"
    kind = _metadata(reader, "tokenizer.ggml.pre", "default")
    if is_byte_level:
        _cut_like(kind, backend)
    adds = {end: _metadata(reader, f"tokenizer.ggml.add_{end}_token", None) for end in ("bos", "eos")}
    if adds["bos"] is None:  # llama.cpp's defaults: sentencepiece vocabularies and Llama 3
        adds["bos"] = not is_byte_level or kind in _LLAMA3_LIKE
    backend.post_processor = _post_processor(tokenizer, adds)
    tokenizer.init_kwargs |= {f"add_{end}_token": bool(wanted) for end, wanted in adds.items()}
    tokenizer.save_pretrained(out)


def _cut_like(kind: str, backend: Any) -> None:
    """Corrects the parts of a byte-level tokenizer that transformers builds alike for every vocabulary."""
    import tokenizers
    from tokenizers import pre_tokenizers

    if kind in _SPLITS_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif kind in _LLAMA3_LIKE:
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
        backend.model.ignore_merges = True
    elif kind not in _GPT2_LIKE and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning("pre-tokenizer %r is not known; texts are cut as for GPT-2, token counts may differ", kind)
    # Its decoder for llama has sentencepiece steps, which turn a literal "▁" into a space and which genai refuses.
    backend.decoder = tokenizers.decoders.ByteLevel()


def _post_processor(tokenizer: Any, adds: dict[str, Any]) -> Any:
    """Puts the begin and end tokens around a text where the file asks for it."""
    import tokenizers

    pieces = {end: getattr(tokenizer, f"{end}_token") if wanted else None for end, wanted in adds.items()}
    single = [piece for piece in (pieces["bos"], "$A", pieces["eos"]) if piece]
    pair = [*single, *(f"{piece}:1" for piece in (pieces["bos"], "$B", pieces["eos"]) if piece)]
    special = [(piece, tokenizer.convert_tokens_to_ids(piece)) for piece in {*pieces.values()} if piece]
    return tokenizers.processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def _set_special_ids(reader: Any, model: Any) -> None:
    """Gives config and generation config the special tokens of the file; generation stops at end of text or of turn."""
    ids = {
        kind: _metadata(reader, f"tokenizer.ggml.{key}_token_id", None)
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    turn = _metadata(reader, "tokenizer.ggml.eot_token_id", None)
    for kind, index in ids.items():
        if index is None:
            continue
        setattr(model.config, f"{kind}_token_id", int(index))
        stops = sorted({int(index), int(turn)}) if kind == "eos" and turn is not None else int(index)
        setattr(model.generation_config, f"{kind}_token_id", stops[0] if stops == [int(index)] else stops)


def _scale_rotary(reader: Any, path: Path, model: Any) -> None:
    """Applies the stretched rotary frequencies of the file (Llama 3.1, linear scaling); transformers ignores them.

    Raises:
        UnsupportedModelError: they are stretched in a way that depends on the length of the text.
    """
    import torch

    architecture = _metadata(reader, "general.architecture", "")
    kind = _metadata(reader, f"{architecture}.rope.scaling.type", "none")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if kind not in ("none", "linear") or any(name.startswith("rope_factors_") for name in tensors):
        raise UnsupportedModelError(
            f"{path}: rotary scaling {kind!r} cannot be read from GGUF", hint="convert the original checkpoint instead"
        )
    divisor = torch.tensor(1.0)
    if "rope_freqs.weight" in tensors:
        divisor = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    elif kind == "linear":
        divisor = torch.tensor(float(_metadata(reader, f"{architecture}.rope.scaling.factor", 1.0)))
    for module in model.modules():
        if isinstance(frequencies := getattr(module, "inv_freq", None), torch.Tensor):
            module.inv_freq = frequencies / divisor


def _metadata(reader: Any, key: str, default: Any) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


@contextlib.contextmanager
def _shared(reader: Any) -> Iterator[None]:
    """Lets transformers use our reader, and each name map once.

    It opens the file anew for the config, the weights and the tokenizer, and builds a map of all tensor names for
    every submodule: three quarters of the time of reading a small model.
    """
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda *_: reader
    gguf.get_tensor_name_map = functools.lru_cache(originals[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals
