"""Weights that are neither a linear nor an embedding: what holds them, and why a quantization pass leaves them.

Says too in which formats the quantized weights of a graph are stored, whoever made it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.compiler.formats import stored
from onnxpress.compiler.linears import MICROSOFT, Embedding, Linear, extends
from onnxpress.compiler.pass_ import subgraphs

# Elements from which on an array counts as a weight; scales, norms and axes are smaller or flat.
_LEAST = 1024
_CODES = tuple(
    kind
    for kind in ir.DataType
    if (kind.is_integer() and kind.bitwidth <= 8) or kind.name.startswith(("FLOAT8", "FLOAT4"))
)
# Tables of cosines and sines are no weights.
_ROTATES = ("RotaryEmbedding", "GroupQueryAttention")


@dataclass(frozen=True)
class OtherWeight:
    """A constant with two or more axes that something else than a linear or an embedding reads.

    Attributes:
        site: its name.
        format: how it is quantized, "" when it is not.
        reason: why a pass that quantizes linears and embeddings leaves it.
    """

    site: str
    format: str
    reason: str


def find_other_weights(
    model: ir.Model, linears: Sequence[Linear], embeddings: Sequence[Embedding]
) -> list[OtherWeight]:
    """The weights that no linear and no embedding holds, those in branches and loops included.

    Args:
        model: any ONNX model; not changed.
        linears: what `find_linears(model, expand_pairs=True)` returned.
        embeddings: what `find_embeddings` returned.
    """
    nodes = {id(node) for node in _holders(linears, embeddings)}
    seen = {id(_constant(value)) for one in linears for value in one.weights} | {
        id(_constant(one.table)) for one in embeddings
    }
    found = []
    for node, parent in _nodes(model.graph, None):
        for index, value in enumerate(node.inputs):
            tensor = _constant(value)
            if tensor is None or id(tensor) in seen or id(node) in nodes or tensor.size < _LEAST or extends(node):
                continue
            site = (value.name if value is not None else None) or node.name or node.op_type
            if tensor.dtype in _CODES:
                seen.add(id(tensor))
                how = node_format(node) or f"{_reader(node).op_type}, {tensor.dtype.bitwidth} bits"
                found.append(OtherWeight(site, how, f"already quantized: {how}"))
            elif tensor.dtype.is_floating_point() and len(tensor.shape) > 1 and node.op_type not in _ROTATES:
                seen.add(id(tensor))
                found.append(OtherWeight(site, "", _reason(node, index, tensor, parent)))
    return found


def quantized_formats(model: ir.Model, linears: Sequence[Linear], embeddings: Sequence[Embedding]) -> dict[str, int]:
    """How many weights are stored in which quantized format, the most frequent first."""
    counts = Counter(node_format(node) for node in _holders(linears, embeddings))
    counts.update(one.format for one in find_other_weights(model, linears, embeddings))
    del counts[""]
    return dict(counts.most_common())


def node_format(node: ir.Node) -> str:
    """Format of the quantized weight of a linear or a GatherBlockQuantized, "" for any other operator."""
    if (held := stored(node)) is not None:
        return held.description
    if node.op_type not in ("MatMulNBits", "GatherBlockQuantized") or node.domain != MICROSOFT:
        return ""
    bits, block_size = (_int(node, name, default) for name, default in (("bits", 4), ("block_size", 128)))
    zeros = ", zero points" if len(node.inputs) > 3 and node.inputs[3] is not None else ""
    return f"{node.op_type}, {bits} bits in blocks of {block_size}{zeros}"


def _holders(linears: Sequence[Linear], embeddings: Sequence[Embedding]) -> list[ir.Node]:
    return [one.node for one in linears] + [one.node for one in embeddings]


def _reader(node: ir.Node) -> ir.Node:
    """The operator that computes with what `node` reads, when `node` only gives a view of it."""
    while node.op_type in ("Transpose", "Reshape", "Identity") and len(node.outputs[0].consumers()) == 1:
        node = node.outputs[0].consumers()[0]
    return node


def _reason(node: ir.Node, index: int, tensor: ir.TensorProtocol, parent: ir.Node | None) -> str:
    kind = node.op_type
    if parent is not None:
        return f"inside of {parent.op_type}: only the main graph is rewritten"
    if kind == "MatMul" and len(tensor.shape) > 2:
        return "a stack of matrices, of which MatMulNBits takes one"
    if kind == "MatMul" and index == 0:
        return "the weight is the left factor, for which there is no kernel"
    if kind == "Gemm":
        return "a Gemm that scales or transposes, for which there is no kernel"
    if kind == "Gather":
        return "a table whose rows the graph chooses itself (positions, say)"
    if kind in ("Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Einsum"):
        return f"ONNX Runtime has no {kind} with weights in blocks"
    return f"read by {kind}; only matrix products and tables that an input chooses from are quantized"


def _nodes(graph: ir.Graph, parent: ir.Node | None) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """All nodes, each with the If, Loop or Scan of the main graph that it lies in."""
    for node in graph:
        yield node, parent
        for inner in subgraphs(node):
            yield from _nodes(inner, parent or node)


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant node, also behind a view of it."""
    while value is not None and value.const_value is None:
        maker = value.producer()
        if maker is None or maker.op_type not in ("Constant", "Reshape"):
            return None
        if maker.op_type == "Constant":
            attribute = maker.attributes.get("value")
            return None if attribute is None else attribute.as_tensor()
        value = maker.inputs[0]
    return None if value is None else value.const_value


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
