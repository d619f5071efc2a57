"""The matrices of a graph that an adapter can change, packed ones part by part; and the inputs that slots are.

Axes: N out features, K in features, R rank
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.compiler import formats
from onnxpress.compiler.artifact import PIPELINE_KEY
from onnxpress.compiler.errors import PreconditionError, UnsupportedModelError
from onnxpress.compiler.linears import Embedding, Linear, find_linears, is_slot
from onnxpress.compiler.lora_slots import PATHS, Slot, read_paths
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
        columns = linear.num_in - linear.num_sums
        paths = tuple(name for name in (linear.node.name, linear.weight.name) if name)
        parts = _parts(linear)
        if not parts:
            target = Target(linear.name, linear.kind, linear.block, (linear.num_out, columns), paths)
            found.append(Site(target, linear))
        start = 0
        for kind, rows in parts:
            name = kind if linear.block is None else f"block{linear.block}.{kind}"
            found.append(Site(Target(name, kind, linear.block, (rows, columns)), linear, start))
            start += rows
    by_size = sorted(embeddings, key=lambda one: -one.num_rows)  # positions and types have fewer rows than tokens
    for number, embedding in enumerate(by_size):
        name, kind = ("embedding", "embedding") if not number else (f"table.{number + 1}", "table")
        paths = tuple(one for one in (embedding.node.name, embedding.table.name) if one)
        target = Target(name, kind, None, (embedding.width, embedding.num_rows), paths)
        found.append(Site(target, embedding))
    return found


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
            hint="apply the adapter before svd_llm, or split with svd_llm(..., pivot=False)",
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
