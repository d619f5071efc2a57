"""Which matrix of a graph a module of a checkpoint is: names that trainers use, against blocks and roles.

A module is found by its own name where the graph still has it (a node or weight called after it), else by the number
of its block and what it is there. One module may be several matrices of the graph (`c_attn` taken apart into queries,
keys and values), and several modules one matrix (`qkv`, `gate_up`, packed): rows say which.

Nothing here knows ONNX: a graph's targets come from `lora_graph`, those of a session from its inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import UnsupportedModelError, near_miss

Rows = npt.NDArray[np.int64]

# Name of an input that is half of a slot: `block0.q.lora_A`.
SLOT = re.compile(r"^(.+)\.lora_([AB])$")

# Endings of a module's path behind the number of its block, and what the module is. The first that fits counts.
TAILS = {
    "attention.output.dense": "o",
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "mlp.c_proj": "down",
    "attn.Wqkv": "qkv",
    "attn.Wo": "o",
    "mlp.Wi": "gate_up",
    "mlp.Wo": "down",
    "attention.dense": "o",
    "self_attention.dense": "o",
    "output.dense": "down",
    "intermediate.dense": "up",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "c_fc": "up",
    "fc1": "up",
    "fc2": "down",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "query": "q",
    "key": "k",
    "value": "v",
    "q_lin": "q",
    "k_lin": "k",
    "v_lin": "v",
    "out_lin": "o",
    "lin1": "up",
    "lin2": "down",
}
TABLE_KINDS = ("embedding", "table")
_HEADS = ("lm_head", "embed_out")
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
# Families whose packed projection has the rows of each group of heads together: queries, then its key and its value.
_GROUPED = ("bloom", "falcon", "gpt_neox", "gpt_neox_japanese")
# Modules of which other families lie so too, or in yet another way.
_FAMILIES_DIFFER = ("query_key_value", "qkv_proj")
_IN_ORDER = ("phi3", "phi4", "chatglm", "internlm", "glm", "glm4", "codeshell")
# Experts of a mixture repeat the names of a plain layer.
_ELSEWHERE = re.compile(
    r"\.(experts?|shared_expert|encoder_attn|cross_attn|crossattention|EncDecAttention"
    r"|vision_tower|vision_model|visual|audio_tower)\b"
)


@dataclass(frozen=True)
class Target:
    """One matrix [N, K] of a graph, or some rows of a packed one.

    Attributes:
        name: "block0.q", "head", "embedding"; of rows of a packed matrix that of the part.
        kind: one of `roles.KINDS`; "embedding" for the tokens' table and "table" for others, turned: [H, V].
        block: None outside of all blocks.
        shape: (N, K).
        paths: names of the node and weight in the graph, to look for a module's own name in.
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, int]
    paths: tuple[str, ...] = ()

    def is_called(self, module: str) -> bool:
        """Whether a node or weight of the graph is called after the module."""
        inside = f".{module}."
        return any(inside in f".{path.replace('/', '.')}.".replace("..", ".") for path in self.paths)


@dataclass(frozen=True)
class Place:
    """Where some rows of a module's update go: all rows of `target` get rows `rows` of the module; None is all."""

    target: Target
    rows: Rows | None = None


def locate(module: str) -> tuple[int | None, str | None]:
    """(number of the block, kind) that a module's path tells; None where it does not."""
    last = module.rpartition(".")[2]
    if last in _HEADS:
        return None, "head"
    if last in _TABLES:
        return None, "embedding"
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", module)
    if match is None or _ELSEWHERE.search(f".{module}"):
        return None, None
    number, rest = int(match.group(1)), f".{match.group(2)}"
    return number, next((kind for tail, kind in TAILS.items() if rest.endswith(f".{tail}")), None)


def place(
    module: str, shape: tuple[int, int], targets: Sequence[Target], config: Mapping[str, Any], *, is_table: bool = False
) -> list[Place]:
    """Where the update of a module goes.

    Args:
        module: path in the checkpoint.
        shape: (N, K) of its update; of a token table (H, V).
        targets: of the graph.
        config: `config.json`; tells how heads and packed rows lie.
        is_table: the module is a token table.

    Raises:
        UnsupportedModelError: the graph has no such matrix, several that could be meant, or one of another shape.
    """
    targets = [one for one in targets if (one.kind in TABLE_KINDS) == is_table]
    own = [one for one in targets if one.name == module or one.is_called(module)]
    if len(own) == 1 and own[0].shape == shape:
        return [Place(own[0])]
    block, kind = locate(module)
    if kind is None:
        _fail(module, own, targets, shape)
    found = [one for one in targets if (one.block, one.kind) == (block, kind)]
    if len(found) == 1:
        if found[0].shape != shape:
            _fail(module, found, targets, shape)
        return [Place(found[0])]
    parts = [[one for one in targets if (one.block, one.kind) == (block, part)] for part in _PARTS.get(kind or "", ())]
    if not found and parts and all(len(one) == 1 for one in parts):
        return _spread(module, shape, [one[0] for one in parts], config)
    _fail(module, found, targets, shape)
    raise AssertionError


def _spread(module: str, shape: tuple[int, int], parts: list[Target], config: Mapping[str, Any]) -> list[Place]:
    """The rows of a packed module, for each of the matrices that the graph has instead."""
    sizes = [one.shape[0] for one in parts]
    if sum(sizes) != shape[0] or any(one.shape[1] != shape[1] for one in parts):
        _fail(module, parts, parts, shape)
    rows = np.arange(shape[0])
    text = config.get("text_config") or config
    if len(parts) == 3 and text.get("model_type") in _GROUPED:
        heads = text.get("num_attention_heads", text.get("n_head"))
        if not isinstance(heads, int) or heads < 1 or sizes[0] % heads or sizes[1] % (sizes[0] // heads):
            raise UnsupportedModelError(
                f"{module}: expected num_attention_heads in config.json that divides {sizes[0]}, found {heads!r}",
                hint="put the config.json of the checkpoint beside the model",
            )
        width = sizes[0] // heads
        groups = rows.reshape(sizes[1] // width, -1, width)
        pieces = [groups[:, :-2], groups[:, -2], groups[:, -1]]
        return [Place(one, np.ascontiguousarray(piece).reshape(-1)) for one, piece in zip(parts, pieces, strict=True)]
    if len(parts) == 3 and module.endswith(_FAMILIES_DIFFER) and text.get("model_type") not in _IN_ORDER:
        raise UnsupportedModelError(
            f"{module}: expected a model_type of which it is known how queries, keys and values lie in it, "
            f"found {text.get('model_type')!r}",
            hint="put the config.json of the checkpoint beside the model; or merge it in PEFT, and export the result",
        )
    ends = np.cumsum(sizes)
    return [Place(one, rows[end - size : end]) for one, size, end in zip(parts, sizes, ends, strict=True)]


def _fail(module: str, found: Sequence[Target], targets: Sequence[Target], shape: tuple[int, int]) -> None:
    """Raises what is wrong: another shape, several candidates, or none."""
    if len(found) > 1 and all(one.shape == shape for one in found):
        names = ", ".join(one.name for one in found[:4])
        raise UnsupportedModelError(
            f"{module}: expected one matrix of the graph, found {names}", hint="merge the adapter in PEFT before export"
        )
    if found:
        shapes = ", ".join(f"{one.name} {list(one.shape)}" for one in found)
        raise UnsupportedModelError(
            f"{module}: expected an update of {shapes} [out, in], found one of {list(shape)}",
            hint="the adapter belongs to another model",
        )
    known = [one.name for one in targets]
    block, kind = locate(module)
    wanted = module if kind is None else kind if block is None else f"block{block}.{kind}"
    hint = near_miss(wanted, known) if known else "the graph has no float or quantized linear at all"
    raise UnsupportedModelError(f"{module}: expected a matrix of the graph for it, found none ({wanted})", hint=hint)


def modules(targets: Iterable[Target], config: Mapping[str, Any]) -> dict[str, list[Target]]:
    """The module of the checkpoint that each target belongs to, with its targets; the targets' own names where unknown.

    Args:
        targets: of a graph.
        config: `config.json`; its model_type says how a checkpoint calls its modules.
    """
    text = config.get("text_config") or config
    head, table, layers, names = _FAMILIES.get(str(text.get("model_type")), _LLAMA)
    found: dict[str, list[Target]] = {}
    for one in targets:
        whole = next((pack for pack, parts in _PARTS.items() if one.kind in parts and pack in names), None)
        if one.kind in ("head", "embedding") and one.block is None:
            name = head if one.kind == "head" else table
        elif one.block is not None and (one.kind in names or whole) and "." not in one.name.partition(".")[2]:
            name = f"{layers}.{one.block}.{names[whole or one.kind]}"
        else:
            name = one.name
        found.setdefault(name, []).append(one)
    return found


_Family = tuple[str, str, str, dict[str, str]]
_ATTENTION = {kind: f"self_attn.{kind}_proj" for kind in "qkvo"}
_GATED = {kind: f"mlp.{kind}_proj" for kind in ("gate", "up", "down")}
_LLAMA: _Family = ("lm_head", "model.embed_tokens", "model.layers", {**_ATTENTION, **_GATED})
_PHI3 = {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
_GPT2 = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_FOUR_H = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
_NEOX = {"qkv": "attention.query_key_value", "o": "attention.dense", **_FOUR_H}
_BLOOM = {"qkv": "self_attention.query_key_value", "o": "self_attention.dense", **_FOUR_H}
_OPT = {**_ATTENTION, "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"}
_BERT = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
_BERT |= {"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
_DISTILBERT = {f"{kind}": f"attention.{kind}_lin" for kind in "qkv"}
_DISTILBERT |= {"o": "attention.out_lin", "up": "ffn.lin1", "down": "ffn.lin2"}
_FAMILIES: dict[str, _Family] = {
    "phi3": ("lm_head", "model.embed_tokens", "model.layers", _PHI3),
    "gpt2": ("lm_head", "transformer.wte", "transformer.h", _GPT2),
    "gpt_neox": ("embed_out", "gpt_neox.embed_in", "gpt_neox.layers", _NEOX),
    "bloom": ("lm_head", "transformer.word_embeddings", "transformer.h", _BLOOM),
    "falcon": ("lm_head", "transformer.word_embeddings", "transformer.h", _BLOOM),
    "opt": ("lm_head", "model.decoder.embed_tokens", "model.decoder.layers", _OPT),
    "bert": ("cls.predictions.decoder", "bert.embeddings.word_embeddings", "bert.encoder.layer", _BERT),
    "roberta": ("lm_head.decoder", "roberta.embeddings.word_embeddings", "roberta.encoder.layer", _BERT),
    "distilbert": (
        "vocab_projector",
        "distilbert.embeddings.word_embeddings",
        "distilbert.transformer.layer",
        _DISTILBERT,
    ),
}
TURNED = ("gpt2",)  # families whose checkpoints store [K, N]
