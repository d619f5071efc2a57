"""GGUF files: every tensor is dequantized to float32 into a config-built transformers model, which is then exported.

transformers reads the config and maps the tensors; its tokenizer is corrected where it contradicts the file: it takes
the beginning-of-text token for the end-of-text one, and adds it to every text whatever `add_bos_token` says.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.models import directory as directories
from onnxpress.models import export, gguf_file, huggingface
from onnxpress.models.source import Source

logger = logging.getLogger(__name__)

# How byte-level vocabularies cut a text before merging, by `tokenizer.ggml.pre`; transformers cuts all as GPT-2 does.
_GPT2_LIKE = ("default", "gpt-2")
_SPLITS_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_LLAMA3_LIKE = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tensors of a block by the roles that linears have in the graph; a packed one is taken apart there.
_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROLES = {
    "attn_q": ("q",),
    "attn_k": ("k",),
    "attn_v": ("v",),
    "attn_qkv": ("q", "k", "v", "qkv"),
    "attn_output": ("o",),
    "ffn_gate": ("gate",),
    "ffn_up": ("up", "gate_up"),
    "ffn_down": ("down",),
}


def load(
    path: Path, *, name: str, work_dir: Path, exporter: export.Exporter | None, opset: int, tell: Callable[[str], None]
) -> Source:
    """Exports the model in a GGUF file to a graph below `work_dir`; see `onnxpress.models.load`.

    Raises:
        BadModelFileError: the file is no GGUF, of another byte order or version, or truncated.
        UnsupportedModelError: an architecture that transformers or the exporter does not know.
    """
    types = gguf_file.check(path)
    chosen, why = export.choose(exporter)
    tell(f"dequantizing {path.name} and exporting it with {chosen}{why and f' ({why})'}")
    out = export.make_out(work_dir)
    facts = export.run(export.Job("gguf", str(path.absolute()), str(out), chosen, opset))
    facts |= {"exporter_because": why} if why else {}
    provenance = {"format": "gguf", **facts, "files": directories.hashes([path])}
    source = directories.onnx_source(out / "model.onnx", name=name, kind="gguf", beside=(out,), provenance=provenance)
    source.stored_types = _by_site(types)
    return source


def _by_site(types: dict[str, str]) -> dict[str, tuple[str, str]]:
    """(tensor, type) of the matrices by the names that `find_linears` and `find_embeddings` give them in the graph."""
    found: dict[str, tuple[str, str]] = {}
    for name, kind in types.items():
        if name in ("token_embd.weight", "output.weight"):
            found["embedding" if name.startswith("token") else "head"] = name, kind
        elif match := _BLOCK_TENSOR.fullmatch(name):
            for role in _ROLES.get(match[2], ()):
                found[f"block{match[1]}.{role}"] = name, kind
    for name, stored in list(found.items()):
        if name.endswith(".up"):  # Phi-3 packs the gate into it
            found.setdefault(name.replace(".up", ".gate"), stored)
    if "embedding" in found:  # tied: the head reads the table
        found.setdefault("head", found["embedding"])
    return found


def read_model(path: Path, out: Path, *, attention: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and facts for the card; its tokenizer is written to `out`. Imports torch.

    `attention` is that of `huggingface.read_model`.

    Raises:
        BadModelFileError: the file is damaged, or lacks weights.
        UnsupportedModelError: transformers cannot read this architecture from GGUF.
    """
    reader = gguf_file.read(path)
    architecture = str(_metadata(reader, "general.architecture", ""))

    import torch
    import transformers
    from transformers import modeling_gguf_pytorch_utils

    supported = sorted(set(modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
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
                **({} if attention is None else {"attn_implementation": attention}),
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
    special: dict[str, str] = {}
    for end, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _metadata(reader, f"tokenizer.ggml.{key}_token_id", None)
        if index is not None:
            special[f"{end}_token"] = tokens.contents(int(index))
    backend = tokenizer.backend_tokenizer
    kind = _metadata(reader, "tokenizer.ggml.pre", "default")
    is_byte_level = _metadata(reader, "tokenizer.ggml.model", "") == "gpt2"
    adds = {end: _metadata(reader, f"tokenizer.ggml.add_{end}_token", None) for end in ("bos", "eos")}
    if adds["bos"] is None:  # llama.cpp's defaults: sentencepiece vocabularies and Llama 3
        adds["bos"] = not is_byte_level or kind in _LLAMA3_LIKE
    if is_byte_level:
        _cut_like(kind, backend)
        # The plain class: that of Llama adds a begin token and tidies spaces, whatever tokenizer.json says.
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=tokenizer.chat_template,
            clean_up_tokenization_spaces=False,
            model_max_length=tokenizer.model_max_length,
            model_input_names=["input_ids", "attention_mask"],  # no token types: `generate` refuses them
            **special,
        )
    else:
        for name, token in special.items():
            setattr(tokenizer, name, token)
        tokenizer._add_bos_token, tokenizer._add_eos_token = bool(adds["bos"]), bool(adds["eos"])
    around = [special.get(f"{end}_token") if adds[end] else None for end in ("bos", "eos")]
    tokenizer.backend_tokenizer.post_processor = _post_processor(backend, *around)
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


def _post_processor(backend: Any, begin: str | None, end: str | None) -> Any:
    """Puts `begin` and `end` around a text."""
    from tokenizers import processors

    single = [piece for piece in (begin, "$A", end) if piece]
    pair = [*single, *(f"{piece}:1" for piece in (begin, "$B", end) if piece)]
    special = [(piece, backend.token_to_id(piece)) for piece in {begin, end} if piece]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


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
