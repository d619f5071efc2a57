"""Facts of one model: architecture, blocks, parameters and bytes by block and by kind, operators, cost of a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.blocks import Block, find_blocks
from onnxpress.compiler.genai import Cache, find_cache
from onnxpress.compiler.linears import Embedding, Linear, find_embeddings, find_linears, table_of_blocks
from onnxpress.compiler.other_weights import quantized_formats
from onnxpress.compiler.pass_ import weight_bytes
from onnxpress.compiler.report import operators

# Integer initializers below this size are shapes and indices, not parameters.
_SMALL = 1024
_ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention")


@dataclass
class KindFacts:
    """Weights of one role.

    Attributes:
        count: matrices.
        parameters: numbers they stand for, however they are stored.
        bytes: what stores them, scales and zero points included; shared bytes are counted where they come first.
        shape: (N, K) when all are alike, else None.
        holders: operators that hold them, with counts.
        zeros: share of the weights that are 0, None where nobody looked.
    """

    count: int = 0
    parameters: int = 0
    bytes: int = 0
    shape: tuple[int, int] | None = None
    holders: dict[str, int] = field(default_factory=dict)
    zeros: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass
class BlockFacts:
    """One block of the network."""

    index: int
    parameters: int
    bytes: int
    nodes: int
    has_attention: bool
    kinds: dict[str, int] = field(default_factory=dict)  # kind -> bytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each parameter."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass
class Summary:
    """What `summarize` found.

    Attributes:
        architecture: as its config says, or what the graph looks like.
        nodes: operators of the graph, those of sub-graphs included.
        operators: type to count, most frequent first.
        parameters: numbers in weights and tables.
        bytes: of all initializers, shared ones once.
        bits_per_weight: 8 * bytes / parameters of linears and embeddings.
        blocks: the repeated parts, in order.
        kinds: role to facts.
        quantized: format to how many weights are stored so, whoever quantized them.
        flops_per_token: multiplications and additions of one decode step with an empty cache.
        flops_per_cached_token: further ones for each token in the cache.
        bytes_per_token: weights read for one decode step.
        cache_bytes_per_token: what one token adds to the key-value cache.
        inputs, outputs: name to type and shape.
        opset: of `ai.onnx`; `opset_imports` has all domains.
        provenance: producer, and the card's source and pipeline when onnxpress wrote the model.
    """

    architecture: str
    nodes: int
    operators: dict[str, int]
    parameters: int
    bytes: int
    bits_per_weight: float
    blocks: list[BlockFacts]
    kinds: dict[str, KindFacts]
    quantized: dict[str, int]
    flops_per_token: int
    flops_per_cached_token: int
    bytes_per_token: int
    cache_bytes_per_token: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    opset: int
    opset_imports: dict[str, int]
    ir_version: int
    cache: dict[str, Any] | None
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        facts = dataclasses.asdict(self)
        for row, block in zip(facts["blocks"], self.blocks, strict=True):
            row["bits_per_weight"] = round(block.bits_per_weight, 4)
        for name, kind in self.kinds.items():
            facts["kinds"][name]["bits_per_weight"] = round(kind.bits_per_weight, 4)
        return facts


def summarize(
    model: ir.Model | str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    count_zeros: bool = False,
) -> Summary:
    """Looks at a model; nothing is changed, and no weight is read unless zeros are to be counted.

    Args:
        model: a graph, or the path of an `.onnx` file.
        config: its `config.json`, when there is one.
        provenance: what is known of its origin.
        count_zeros: read every matrix, one at a time, for the share of its weights that are 0.
    """
    if not isinstance(model, ir.Model):
        model = ir.load(Path(model))
    blocks = find_blocks(model)
    linears = find_linears(model, blocks=blocks)
    embeddings = find_embeddings(model, linears)
    cache = find_cache(model)
    seen: set[int] = set()
    kinds: dict[str, KindFacts] = {}
    for embedding in embeddings:
        _add(kinds, "embedding", _embedding_parameters(embedding, seen), _embedding_tensors(embedding, seen), embedding)
    rows = {block.index: BlockFacts(block.index, 0, 0, len(block.nodes), block.has_attention) for block in blocks}
    for linear in linears:
        parameters, size = _linear_parameters(linear, seen), _linear_tensors(linear, seen)
        _add(kinds, linear.kind, parameters, size, linear)
        if linear.block is not None and linear.block in rows:
            row = rows[linear.block]
            row.parameters += parameters
            row.bytes += size
            row.kinds[linear.kind] = row.kinds.get(linear.kind, 0) + size
    if count_zeros:
        _count_zeros(kinds, linears)
    rest = _rest(model, blocks, rows, seen)
    if rest.count:
        kinds["other"] = rest
    weights = [kind for name, kind in kinds.items() if name != "other"]
    stored, numbers = sum(kind.bytes for kind in weights), sum(kind.parameters for kind in weights)
    return Summary(
        architecture=_architecture(model, config or {}, cache),
        nodes=sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph)),
        operators=operators(model),
        parameters=numbers + rest.parameters,
        bytes=weight_bytes(model),
        bits_per_weight=round(8 * stored / numbers, 4) if numbers else 0.0,
        blocks=list(rows.values()),
        kinds=kinds,
        quantized=quantized_formats(model, linears, embeddings),
        flops_per_token=sum(2 * _work(linear) for linear in linears),
        flops_per_cached_token=_attention_flops(model, cache, config or {}),
        bytes_per_token=sum(linear.nbytes for linear in linears)
        + sum(_row_bytes(embedding) for embedding in embeddings),
        cache_bytes_per_token=_cache_bytes(model),
        inputs={value.name or "": _describe(value) for value in model.graph.inputs},
        outputs={value.name or "": _describe(value) for value in model.graph.outputs},
        opset=model.opset_imports.get("", 0),
        opset_imports=dict(model.opset_imports),
        ir_version=model.ir_version or 0,
        cache=None if cache is None else dataclasses.asdict(cache),
        provenance={
            "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
            **{key: value for key, value in model.metadata_props.items() if key.startswith("onnxpress.")},
            **(provenance or {}),
        },
    )


def _add(kinds: dict[str, KindFacts], name: str, parameters: int, size: int, view: Linear | Embedding) -> None:
    facts = kinds.setdefault(name, KindFacts())
    shape = view.shape if isinstance(view, Linear) else (view.num_rows, view.width)
    facts.shape = shape if facts.count == 0 or facts.shape == shape else None
    facts.count += 1
    facts.parameters += parameters
    facts.bytes += size
    holder = view.holder if isinstance(view, Linear) else view.node.op_type
    facts.holders[holder] = facts.holders.get(holder, 0) + 1


def _count_zeros(kinds: dict[str, KindFacts], linears: list[Linear]) -> None:
    counts: dict[str, list[int]] = {}
    for linear in linears:
        for one in linear.factors or (linear,):
            w_NK = one.w_NK()
            total = counts.setdefault(linear.kind, [0, 0])
            total[0] += w_NK.size - int(np.count_nonzero(w_NK))
            total[1] += w_NK.size
    for kind, (zeros, weights) in counts.items():
        kinds[kind].zeros = zeros / weights


def _work(linear: Linear) -> int:
    """Multiplications for one token."""
    if linear.factors is not None:
        return sum(_work(factor) for factor in linear.factors)
    return linear.num_out * linear.num_in


def _linear_parameters(linear: Linear, seen: set[int]) -> int:
    """Numbers of the matrix; offsets of blocks are none of them."""
    return 0 if _is_seen(linear.weight, seen) else _work(linear) - linear.num_out * linear.num_sums


def _linear_tensors(linear: Linear, seen: set[int]) -> int:
    """Bytes of a linear's matrix that nothing before it counted."""
    if linear.factors is not None:
        return sum(_linear_tensors(factor, seen) for factor in linear.factors)
    return _bytes_of(linear.weights, seen)


def _embedding_parameters(embedding: Embedding, seen: set[int]) -> int:
    return 0 if _is_seen(embedding.table, seen) else embedding.num_rows * embedding.width


def _embedding_tensors(embedding: Embedding, seen: set[int]) -> int:
    inputs = embedding.node.inputs
    values = [inputs[0], *inputs[2:4]] if embedding.node.op_type == "GatherBlockQuantized" else [embedding.table]
    return _bytes_of(values, seen)


def _bytes_of(values: Iterable[ir.Value | None], seen: set[int]) -> int:
    total = 0
    for value in values:
        origin = _origin(value)
        if origin is not None and origin.const_value is not None and id(origin) not in seen:
            seen.add(id(origin))
            total += origin.const_value.nbytes
    return total


def _is_seen(value: ir.Value, seen: set[int]) -> bool:
    return id(_origin(value)) in seen


def _origin(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind a value, through views of its bytes."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in ("Reshape", "Transpose", "Identity"):
            return None
        value = node.inputs[0]
    return value


def _row_bytes(embedding: Embedding) -> int:
    """Bytes of one row of a table."""
    return _bytes_of([embedding.table], set()) // max(embedding.num_rows, 1)


def _rest(model: ir.Model, blocks: list[Block], rows: Mapping[int, BlockFacts], seen: set[int]) -> KindFacts:
    """Norms, biases and tables that no linear and no embedding holds; those of a block are added to its row.

    Tables that sum up blocks of an activation are bytes, and no parameters.
    """
    block_of = {id(node): block.index for block in blocks for node in block.nodes}
    tables = {id(table_of_blocks(node)) for node in model.graph} - {id(None)}
    rest = KindFacts()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or id(value) in seen or (not tensor.dtype.is_floating_point() and tensor.size < _SMALL):
            continue
        seen.add(id(value))
        rest.count += 1
        is_table = id(value) in tables
        rest.parameters += 0 if is_table else tensor.size
        rest.bytes += tensor.nbytes
        owners = {block_of.get(id(node)) for node in value.consumers()}
        owner = owners.pop() if len(owners) == 1 else None
        if owner is not None:
            row = rows[owner]
            row.parameters += 0 if is_table else tensor.size
            row.bytes += tensor.nbytes
            row.kinds["other"] = row.kinds.get("other", 0) + tensor.nbytes
    return rest


def _architecture(model: ir.Model, config: Mapping[str, Any], cache: Cache | None) -> str:
    """Name of the architecture from the config, else a guess from inputs and outputs."""
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    if config.get("model_type"):
        return str(config["model_type"])
    inputs, outputs = {value.name for value in model.graph.inputs}, {value.name for value in model.graph.outputs}
    if cache is not None:
        return "decoder with key-value cache (guessed from inputs)"
    if "input_ids" in inputs:
        return "language model without cache (guessed)" if "logits" in outputs else "text encoder (guessed)"
    if any(value.shape is not None and len(value.shape) == 4 for value in model.graph.inputs):
        return "vision model (guessed)"
    return "unknown"


def _attention_flops(model: ir.Model, cache: Cache | None, config: Mapping[str, Any]) -> int:
    """Operations per token in the cache: scores and weighted sum, 2 * 2 * heads * head_size for each layer."""
    if cache is None or cache.head_size is None:
        return 0
    heads = [
        node.attributes["num_heads"].as_int()
        for node in model.graph
        if node.op_type in _ATTENTION and "num_heads" in node.attributes
    ]
    if not heads:
        count = (config.get("text_config") or config).get("num_attention_heads") or cache.num_heads or 0
        heads = [int(count)] * cache.num_layers
    return sum(4 * count * cache.head_size for count in heads)


def _cache_bytes(model: ir.Model) -> int:
    """Bytes that one token adds to all cache inputs."""
    total = 0
    for value in model.graph.inputs:
        if "past" not in (value.name or "") or value.shape is None or value.dtype is None or len(value.shape) != 4:
            continue
        heads, size = value.shape[1], value.shape[3]
        if isinstance(heads, int) and isinstance(size, int):
            total += int(heads * size * value.dtype.bitwidth) // 8
    return total


def _describe(value: ir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    shape = "?" if value.shape is None else ", ".join(str(dim) for dim in value.shape)
    return f"{dtype} [{shape}]"
