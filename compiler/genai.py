"""Describes a decoder to onnxruntime-genai: `genai_config.json`, read off the graph itself.

onnxruntime-genai refuses unknown keys and unknown model types, so only keys that it knows are written, only inputs that
the graph has, and the generic type "decoder" for an architecture that it has no name for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnxpress.compiler.target import Target

# `model.type` that onnxruntime-genai 0.18 accepts for a text decoder with an ordinary key-value cache.
KNOWN_TYPES = frozenset(
    (
        *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gptoss", "granite"),
        *("hunyuandensev1", "internlm2", "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phi3small"),
        *("phimoe", "qwen2", "qwen3", "smollm3"),
    )
)
_DEFAULT_CONTEXT = 2048  # when no config says how long a sequence may be
# Families whose first position is the one behind the padding id.
_POSITIONS_AFTER_PADDING = ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert")
_LENGTH_KEYS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"),
    "max_target_positions",  # of decoders that read an encoder
)
_CACHE_NAME = re.compile(r"^(.*?)(\d+)(.*?)(key|value|k|v)$")


@dataclass(frozen=True)
class Cache:
    """The key-value cache of a decoder, as its graph declares it.

    Attributes:
        num_layers: layers with a cache.
        num_heads, head_size: of one layer's cache [batch, num_heads, length, head_size]; None where symbolic.
        is_even: every layer has as many heads.
        type: of its numbers, such as "float16"; "int4" where two of them are packed to a byte.
        past_key, past_value, present_key, present_value: name templates with `%d` for the layer.
        is_shareable: every cache is appended in place by an operator that allows past and present to be one buffer.
    """

    num_layers: int
    num_heads: int | None
    head_size: int | None
    type: str
    past_key: str
    past_value: str
    present_key: str
    present_value: str
    is_shareable: bool
    is_even: bool = True


def find_cache(model: ir.Model) -> Cache | None:
    """The key-value cache that `model` takes in and gives out; None when it has none, or one of another form."""
    past = _templates(value for value in model.graph.inputs if "past" in (value.name or ""))
    present = _templates(value for value in model.graph.outputs if "present" in (value.name or ""))
    if past is None or present is None or past[0] != present[0]:
        return None
    num_layers, past_key, past_value = past
    _, present_key, present_value = present
    caches = [value for value in model.graph.inputs if "past" in (value.name or "")]
    first = next(value for value in caches if value.name == past_key % 0)
    shape = first.shape
    dims = [dim if isinstance(dim, int) else None for dim in shape] if shape is not None and len(shape) == 4 else []
    return Cache(
        num_layers=num_layers,
        num_heads=dims[1] if dims else None,
        head_size=dims[3] * _packed(first) if dims and dims[3] else None,
        type="int4" if _packed(first) == 2 else (first.dtype or ir.DataType.FLOAT).name.lower(),
        past_key=past_key,
        past_value=past_value,
        present_key=present_key,
        present_value=present_value,
        is_shareable=all(_appends_in_place(value) for value in model.graph.outputs if "present" in (value.name or "")),
        is_even=len(set(_head_counts(caches))) <= 1,
    )


def _head_counts(caches: Iterable[ir.Value]) -> list[int]:
    """Heads of the caches that tell them."""
    shapes = [value.shape for value in caches if value.shape is not None and len(value.shape) == 4]
    return [shape[1] for shape in shapes if isinstance(shape[1], int)]


def settle_head_sizes(model: ir.Model, config: Mapping[str, Any]) -> None:
    """Writes the size of a head into caches that leave it symbolic; onnxruntime-genai's builder declares them so.

    Args:
        model: its caches [batch, heads, length, size] are changed where a GroupQueryAttention reads or makes them.
        config: `config.json`; asked when the graph does not say how wide the queries are.
    """
    for node in model.graph:
        if node.op_type != "GroupQueryAttention":
            continue
        size = _head_size(node, config.get("text_config") or config)
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            shape = None if value is None else value.shape
            if size and value is not None and shape is not None and len(shape) == 4 and not isinstance(shape[3], int):
                value.shape = ir.Shape([*shape[:3], size // _packed(value)])


def _packed(cache: ir.Value) -> int:
    """Numbers in one element of a cache: GroupQueryAttention packs those of 4 bits in pairs."""
    return 2 if cache.dtype == ir.DataType.UINT8 else 1


def _head_size(node: ir.Node, config: Mapping[str, Any]) -> int | None:
    heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    queries, is_packed = node.inputs[0], node.inputs[1] is None
    width = queries.shape[-1] if queries is not None and queries.shape is not None else None
    if isinstance(width, int):
        return width // (heads + 2 * kv_heads if is_packed else heads)
    hidden = config.get("hidden_size")
    size = config.get("head_dim") or (hidden // heads if isinstance(hidden, int) else None)
    return size if isinstance(size, int) else None


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model was made for, None when its `config.json` does not say."""
    text = config.get("text_config") or config
    length = next((text[key] for key in _LENGTH_KEYS if isinstance(text.get(key), int)), None)
    if length is not None and text.get("model_type") in _POSITIONS_AFTER_PADDING:
        length -= (text.get("pad_token_id") or 0) + 1  # rows of the table that no position reaches
    return length


def genai_config(
    model: ir.Model, config: Mapping[str, Any], generation_config: Mapping[str, Any], target: Target
) -> dict[str, Any] | None:
    """The content of `genai_config.json` for `model.onnx`; None when it is no decoder that genai can run.

    Args:
        model: the final graph.
        config: `config.json`.
        generation_config: `generation_config.json`; its token ids come before those of `config`.
        target: what the artifact is built for.
    """
    cache = find_cache(model)
    inputs = {value.name for value in model.graph.inputs}
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if cache is None or logits is None or "input_ids" not in inputs:
        return None
    if not cache.is_even:  # it makes the caches of all layers by one number of heads
        return None
    text = config.get("text_config") or config
    vocab = logits.shape[-1] if logits.shape is not None else None
    vocab_size = vocab if isinstance(vocab, int) else text.get("vocab_size")
    if not isinstance(vocab_size, int):
        return None
    length = context_length(config) or _DEFAULT_CONTEXT
    heads = _num_attention_heads(model) or text.get("num_attention_heads")
    facts = {
        "head_size": cache.head_size,
        "hidden_size": text.get("hidden_size"),
        "num_attention_heads": heads,
        "num_hidden_layers": cache.num_layers,
        "num_key_value_heads": cache.num_heads,
    }
    decoder: dict[str, Any] = {
        "session_options": {
            "log_id": "onnxpress",
            "provider_options": [] if target.provider == "cpu" else [{target.provider: {}}],
        },
        "filename": "model.onnx",
        **{key: value for key, value in facts.items() if isinstance(value, int)},
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs},
            "past_key_names": cache.past_key,
            "past_value_names": cache.past_value,
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": cache.present_key,
            "present_value_names": cache.present_value,
        },
    }
    model_type = str(config.get("model_type", ""))
    return {
        "model": {
            **_special_tokens(text, generation_config),
            "context_length": length,
            "decoder": decoder,
            "type": model_type if model_type in KNOWN_TYPES else "decoder",
            "vocab_size": vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": cache.is_shareable,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _special_tokens(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Begin, end and padding ids; genai takes 0 for a missing one, so each is filled from its neighbour."""

    def find(key: str) -> Any:
        for source in (generation_config, config):
            if source.get(key) is not None:
                return source[key]
        return None

    eos, bos, pad = find("eos_token_id"), find("bos_token_id"), find("pad_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    pad = first if pad is None else pad
    bos = first if bos is None else bos
    known = {"bos_token_id": bos, "eos_token_id": eos if eos != [] else pad, "pad_token_id": pad}
    return {key: value for key, value in known.items() if value is not None}


def _templates(values: Iterable[ir.Value]) -> tuple[int, str, str] | None:
    """(layers, key template, value template) of cache names numbered from 0 without a gap; None for anything else."""
    numbers: dict[str, dict[str, set[int]]] = {"k": {}, "v": {}}
    for value in values:
        match = _CACHE_NAME.match(value.name or "")
        if match is None:
            return None
        head, number, middle, role = match.groups()
        numbers[role[0]].setdefault(f"{head}%d{middle}{role}", set()).add(int(number))
    if len(numbers["k"]) != 1 or len(numbers["v"]) != 1:
        return None
    (key, key_layers), (value_name, value_layers) = (next(iter(numbers[role].items())) for role in "kv")
    if key_layers != value_layers or key_layers != set(range(len(key_layers))):
        return None
    return len(key_layers), key, value_name


def _appends_in_place(present: ir.Value) -> bool:
    """Whether a GroupQueryAttention makes this present cache right from a graph input that nobody else reads.

    Who asks for the size of the past would be told that of the whole buffer.
    """
    node = present.producer()
    if node is None or node.op_type != "GroupQueryAttention":
        return False
    return all(past is not None and past.is_graph_input() and len(past.uses()) == 1 for past in node.inputs[3:5])


def _num_attention_heads(model: ir.Model) -> int | None:
    counts = {node.attributes["num_heads"].as_int() for node in model.graph if node.op_type == "GroupQueryAttention"}
    return counts.pop() if len(counts) == 1 else None
