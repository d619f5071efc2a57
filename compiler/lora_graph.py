"""The matrices of a graph that an adapter can change, packed ones part by part; and the inputs that slots are.

Axes: N out features, K in features, R rank
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.compiler import formats
from onnxpress.compiler.artifact import PIPELINE_KEY
from onnxpress.compiler.errors import PreconditionError, UnsupportedModelError
from onnxpress.compiler.linears import Embedding, Linear, find_linears, is_slot
from onnxpress.compiler.lora_slots import PATHS, Slot, read_paths, write_paths
from onnxpress.compiler.lora_targets import SLOT, Target

# Passes that move numbers between matrices, or renumber blocks: an adapter of the original fits no longer.
_TRANSFORMS = re.compile(r"\b(smooth|awq|rotate|drop_blocks)\b")
_ACTIVATIONS = ("Sigmoid", "QuickGelu", "Gelu", "FastGelu", "Erf", "Tanh", "Relu", "Swish", "Softplus", "Elu", "Silu")


@dataclass(frozen=True)
class Site:
    """A target, and where it lies in the graph.

    Attributes:
        target: what an adapter may name.
        holder: the linear or embedding that stores it.
        start: its first row in the stored matrix.
    """

    target: Target
    holder: Linear | Embedding
    start: int = 0

    @property
    def linear(self) -> Linear:
        """The holder, of a target that is no embedding."""
        assert isinstance(self.holder, Linear)
        return self.holder


def find_sites(linears: Iterable[Linear], embeddings: Sequence[Embedding] = ()) -> list[Site]:
    """All targets of a graph.

    Args:
        linears: what `find_linears` returned.
        embeddings: what `find_embeddings` returned.
    """
    found = []
    for linear in linears:
        if linear.is_side:
            continue
        parts = _parts(linear)
        if not parts:
            found.append(whole(linear))
        start = 0
        for kind, rows in parts:
            name = kind if linear.block is None else f"block{linear.block}.{kind}"
            found.append(Site(Target(name, kind, linear.block, (rows, _columns(linear))), linear, start))
            start += rows
    by_size = sorted(embeddings, key=lambda one: -one.num_rows)  # positions and types have fewer rows than tokens
    for number, embedding in enumerate(by_size):
        name, kind = ("embedding", "embedding") if not number else (f"table.{number + 1}", "table")
        paths = tuple(one for one in (embedding.node.name, embedding.table.name) if one)
        target = Target(name, kind, None, (embedding.width, embedding.num_rows), paths)
        found.append(Site(target, embedding))
    return found


def whole(linear: Linear) -> Site:
    """A linear as one site, whatever it packs."""
    paths = tuple(name for name in (linear.node.name, linear.weight.name) if name)
    shape = linear.num_out, _columns(linear)
    return Site(Target(linear.name, linear.kind, linear.block, shape, paths), linear)


def _columns(linear: Linear) -> int:
    """Features that it reads, sums of blocks left out."""
    return linear.num_in - linear.num_sums


def refuse_transformed(model: ir.Model, history: Iterable[str]) -> None:
    """Raises UnsupportedModelError when a pass before has moved numbers between matrices, or within one.

    Args:
        model: its own record of passes is read too.
        history: texts of passes and pipelines that ran before.
    """
    # Not what lies in quotes: paths have any name.
    done = re.sub(r"'[^']*'|\"[^\"]*\"", "''", " ".join([*history, model.metadata_props.get(PIPELINE_KEY, "")]))
    if match := _TRANSFORMS.search(done):
        raise UnsupportedModelError(
            f"expected the matrices of the checkpoint, found those that {match.group(1)} has changed",
            hint=f"apply the adapter before {match.group(1)}, or leave that pass out",
        )
    if (pair := next((one for one in find_linears(model) if one.pivots), None)) is not None:
        raise UnsupportedModelError(
            f"expected the matrices of the checkpoint, found features of {pair.name} in the order of its pivots",
            hint="apply the adapter before svd_llm, or split without pivot=True",
        )


def float_type(linear: Linear) -> ir.DataType:
    """Type of the activations that a linear reads and makes."""
    stored = linear.factors[0] if linear.factors is not None else linear
    if stored.holder == "MatMulNBits":
        tensor = stored.weights[1].const_value
        assert tensor is not None
        return tensor.dtype
    if stored.is_quantized:
        return formats.float_type(stored.node)
    tensor = stored.weight.const_value
    assert tensor is not None
    return tensor.dtype


def _parts(linear: Linear) -> list[tuple[str, int]]:
    """(kind, rows) of what a packed matrix holds, in order; [] for a matrix that is one thing, or of unknown order."""
    output = linear.output
    while len(readers := output.consumers()) == 1 and readers[0].op_type == "Add":
        output = readers[0].outputs[0]  # a bias, or the sum with a slot
    if linear.kind == "qkv" and len(readers) == 1 and readers[0].op_type == "GroupQueryAttention":
        node = readers[0]
        if node.inputs[0] is not output or node.inputs[1] is not None:
            return []
        heads, kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        width = linear.num_out // (heads + 2 * kv_heads)
        return [("q", heads * width), ("k", kv_heads * width), ("v", kv_heads * width)]
    if linear.kind == "gate_up" and len(readers) == 1 and readers[0].op_type == "Split" and linear.num_out % 2 == 0:
        halves = readers[0].outputs
        activated = [any(node.op_type in _ACTIVATIONS for node in half.consumers()) for half in halves]
        rows = linear.num_out // 2
        if len(halves) == 2 and activated in ([True, False], [False, True]):
            return [("gate", rows), ("up", rows)] if activated[0] else [("up", rows), ("gate", rows)]
    return []


def add_slots(graph: ir.Graph, parts: Sequence[Site]) -> None:
    """Adds x A B to what a linear or a table gives, with its bias; A and B are inputs with a default of rank 0.

    Args:
        graph: the main graph.
        parts: all sites of one holder in their order; each gets a slot by its target's name, which must be new.
    """
    if isinstance(parts[0].holder, Embedding):
        _add_to_table(graph, parts[0], parts[0].holder)
        return
    linear = parts[0].linear
    end, dtype = _end(linear.output, linear.bias), float_type(linear)
    nodes: list[ir.Node] = []
    pieces = [_product(graph, nodes, part, linear.source, "MatMul", dtype, end) for part in parts]
    if len(pieces) > 1:
        name = f"{linear.name}/lora"
        joined = ir.Node("", "Concat", pieces, [ir.AttrInt64("axis", -1)], name=name)
        _describe(joined.outputs[0], name, dtype, end, linear.num_out)
        nodes.append(joined)
        pieces = [joined.outputs[0]]
    _sum(graph, nodes, end, pieces[0], dtype, f"{linear.name}/lora_sum")


def note_slots(model: ir.Model, added: Iterable[Site]) -> None:
    """Keeps the names that the linears of new slots have in the graph, for modules that roles do not tell."""
    paths = {site.target.name: site.target.paths for site in added}
    if paths:
        model.metadata_props[PATHS] = write_paths({**read_paths(model.metadata_props.get(PATHS)), **paths})


def find_slots(model: ir.Model) -> dict[str, Slot]:
    """The slots of a graph, by name."""
    paths = read_paths(model.metadata_props.get(PATHS))
    inputs = {value.name: value for value in model.graph.inputs if is_slot(value)}
    found = {}
    for name, value in inputs.items():
        match = SLOT.match(name or "")
        other = None if match is None or match.group(2) != "A" else inputs.get(f"{match.group(1)}.lora_B")
        if match is None or other is None or value.shape is None or other.shape is None or value.dtype is None:
            continue
        num_in, num_out = value.shape[0], other.shape[1]
        if isinstance(num_in, int) and isinstance(num_out, int):
            key = match.group(1)
            found[key] = Slot(key, num_in, num_out, value.dtype.numpy(), paths.get(key, ()))
    return found


def check_is_graph(graph: object) -> ir.Graph:
    """`graph`, which a node of the main graph has."""
    if not isinstance(graph, ir.Graph):
        raise PreconditionError("expected a node of the main graph, found one of a function or branch")
    return graph


def _add_to_table(graph: ir.Graph, site: Site, embedding: Embedding) -> None:
    ids, end = embedding.node.inputs[1], embedding.node.outputs[0]
    assert ids is not None
    tensor = embedding.table.const_value
    if embedding.node.op_type == "GatherBlockQuantized":
        scale = embedding.node.inputs[2]
        tensor = None if scale is None else scale.const_value
    assert tensor is not None
    nodes: list[ir.Node] = []
    delta = _product(graph, nodes, site, ids, "Gather", tensor.dtype, end)
    _sum(graph, nodes, end, delta, tensor.dtype, f"{site.target.name}/lora_sum")


def _product(
    graph: ir.Graph, nodes: list[ir.Node], site: Site, source: ir.Value, first: str, dtype: ir.DataType, end: ir.Value
) -> ir.Value:
    """Appends the two nodes of one slot, and gives their result."""
    rows, columns = site.target.shape
    name = site.target.name
    a = _input(graph, f"{name}.lora_A", (columns, 0), (columns, f"{name}.rank"), dtype)
    b = _input(graph, f"{name}.lora_B", (0, rows), (f"{name}.rank", rows), dtype)
    operands = [a, source] if first == "Gather" else [source, a]
    attributes = [ir.AttrInt64("axis", 0)] if first == "Gather" else []
    narrow = ir.Node("", first, operands, attributes, name=f"{name}/lora_A")
    _describe(narrow.outputs[0], f"{name}/lora_narrow", dtype, end, f"{name}.rank")
    wide = ir.Node("", "MatMul", [narrow.outputs[0], b], name=f"{name}/lora_B")
    _describe(wide.outputs[0], f"{name}/lora_wide", dtype, end, rows)
    nodes += [narrow, wide]
    return wide.outputs[0]


def _input(
    graph: ir.Graph, name: str, sizes: tuple[int, int], shape: tuple[int | str, int | str], dtype: ir.DataType
) -> ir.Value:
    """An input with an empty default."""
    tensor = ir.Tensor(np.zeros(sizes, dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    graph.inputs.append(value)
    return value


def _sum(graph: ir.Graph, nodes: list[ir.Node], end: ir.Value, delta: ir.Value, dtype: ir.DataType, name: str) -> None:
    """Puts end + delta in the place of `end`, whose name the sum takes over where it is an output."""
    total = ir.Node("", "Add", [end, delta], name=name)
    result = total.outputs[0]
    maker = end.producer()
    assert maker is not None
    uses = list(end.uses())
    result.shape, result.type = end.shape, end.type or ir.TensorType(dtype)
    if end.is_graph_output():
        result.name, end.name = end.name, f"{end.name}/plain"
        for index, output in enumerate(graph.outputs):
            if output is end:
                graph.outputs[index] = result
    else:
        result.name = name
    check_is_graph(maker.graph).insert_after(maker, [*nodes, total])
    for node, index in uses:
        if node is not total:
            node.replace_input_with(index, result)


def _end(output: ir.Value, bias: ir.Value | None) -> ir.Value:
    """What a linear gives with the bias that a node of its own adds."""
    readers = output.consumers()
    if bias is not None and len(readers) == 1 and readers[0].op_type == "Add" and bias in readers[0].inputs:
        return readers[0].outputs[0]
    return output


def _describe(value: ir.Value, name: str, dtype: ir.DataType, like: ir.Value, width: int | str) -> None:
    value.name, value.type = name, ir.TensorType(dtype)
    if like.shape is not None:
        value.shape = ir.Shape([*list(like.shape)[:-1], width])
