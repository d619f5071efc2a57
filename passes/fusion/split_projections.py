"""Takes projections apart that were stored as one matrix: queries, keys and values, or gate and up.

Checkpoints pack them in many ways: one below the other (Phi, GPT-2), or the queries, keys and values of each head side
by side (GPT-NeoX, Bloom, Falcon). The graph then cuts, gathers and turns the product until each reader has its part.
Which columns a reader gets is found by execution: the moves run on numbers that name their own column. The matrix is
cut by these columns, so that each part is a product of its own, and the moves are gone. The same numbers, nothing
stored twice; `pack_qkv` and `pack_gate_up` join the parts again, in the order the kernels want.

Axes:    B batch, S sequence, N columns of the packed product, W columns of a part, H heads, D width of a head
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import projections
from onnxpress.compiler.fusing import Fuser, constant
from onnxpress.compiler.linears import derived
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.projections import Projection
from onnxpress.compiler.region import Array, NotCuttable, Region, build_model, first_line, random_feed, session
from onnxpress.passes.fusion._attention import ends_in

Columns = npt.NDArray[np.int64]

_MOVES = ("Reshape", "Transpose", "Slice", "Split", "Gather", "GatherND", "Squeeze", "Unsqueeze", "Identity")
_DIGIT = 256  # the largest base whose digits are exact in bfloat16
_SIZES = ((2, 3), (1, 41))  # (B, S) tried
_LEAST_WIDTH = 8  # a part narrower than that is no projection: a single column of a router, say


@dataclass
class Part:
    """What one reader gets of a packed product.

    Attributes:
        columns: [W] or [H, D], in the order of the part.
        is_turned: whether the part is [B, H, S, D] rather than [B, S, H, D].
    """

    columns: Columns
    is_turned: bool = False


def read_part(places_BSN: Array, part: Array) -> Part | None:
    """Which columns a part of the product consists of.

    Args:
        places_BSN: each element names its own place, row-major.
        part: what the moves made of it.

    Returns:
        None when the part is not [B, S, W], [B, S, H, D] or [B, H, S, D], or rows are mixed or treated differently.
    """
    batch, sequence, width = places_BSN.shape
    own = np.arange(batch * sequence).reshape(batch, sequence)
    turns = (False, True) if part.ndim == 4 else (False,)
    for is_turned in turns if part.ndim in (3, 4) else ():
        rows, columns = np.divmod(part.swapaxes(1, 2) if is_turned else part, width)
        if rows.shape[:2] != own.shape or not (rows == own.reshape(own.shape + (1,) * (part.ndim - 2))).all():
            continue
        return Part(columns[0, 0], is_turned) if (columns == columns[0, 0]).all() else None
    return None


@dataclass(frozen=True, kw_only=True)
class SplitProjections(Pass):
    """A product for each reader of a packed one; the moves between them are folded into the weight."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            packed = _packed(node)
            if packed is None:
                continue
            moves, parts = _below(packed.output)
            if not parts or (len(parts) == 1 and parts[0] is packed.output):
                continue
            site = node.name or node.outputs[0].name or "projection"
            try:
                _split(fuser, site, packed, moves, parts)
            except NotCuttable as reason:
                report.skip(site, str(reason))
        fuser.finish()
        return report


def _packed(node: ir.Node) -> Projection | None:
    """The projection that begins with `node`, its bias included; None when it is none with a float matrix."""
    if node.op_type != "MatMul" or len(node.outputs[0].uses()) == 0:
        return None
    readers = node.outputs[0].consumers()
    if len(readers) == 1 and readers[0].op_type == "Add":
        with_bias = projections.read_projection(readers[0].outputs[0])
        if with_bias is not None and with_bias.node is node:
            return with_bias
    return projections.read_projection(node.outputs[0])


def _below(output: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """The moves that a product goes through, and the values that something else reads at last."""
    moves: list[ir.Node] = []
    parts: list[ir.Value] = []
    queue = [output]
    while queue:
        value = queue.pop(0)
        is_part = value.is_graph_output()
        for reader, place in value.uses():
            if reader.op_type in _MOVES and place == 0 and not reader.domain:
                if reader not in moves:
                    moves.append(reader)
                    queue += [one for one in reader.outputs if one.uses() or one.is_graph_output()]
            elif reader.op_type != "Shape":
                is_part = True
        if is_part:
            parts.append(value)
    return moves, parts


def _split(fuser: Fuser, site: str, packed: Projection, moves: list[ir.Node], parts: list[ir.Value]) -> None:
    """Puts a product of its own in the place of each part; NotCuttable says why not."""
    weight = packed.weights[0]
    stored = [weight] if packed.bias is None else [weight, packed.bias]
    if packed.output in parts:
        return  # somebody wants the whole
    if not any(move.op_type in ("Slice", "Split", "Gather", "GatherND") for move in moves):
        return  # heads taken apart, nothing packed
    if any(len(value.uses()) != 1 or value.is_graph_output() for value in stored):
        raise NotCuttable("other nodes read the packed weight too")
    if any(part.is_graph_output() for part in parts):
        raise NotCuttable("a part is an output of the graph")
    values = [packed.output, *(value for move in moves for value in move.outputs)]
    asked = [node for value in values for node in value.consumers() if node.op_type == "Shape"]
    if not all(ends_in(node, moves) for node in asked):
        raise NotCuttable("somebody else asks for the size of the packed product")
    if packed.output.shape is None or len(packed.output.shape) != 3:
        raise NotCuttable("the packed product is not known to be [batch, sequence, columns]")
    read = _read(fuser, packed, parts)
    if any(one.columns.size < _LEAST_WIDTH for one in read):
        raise NotCuttable(f"a part has fewer than {_LEAST_WIDTH} columns")
    named = np.concatenate([one.columns.reshape(-1) for one in read])
    if len(np.unique(named)) != len(named):
        raise NotCuttable("parts share columns: apart, these would be stored twice")
    for number, (part, chosen) in enumerate(zip(parts, read, strict=True)):
        nodes = _product(fuser.model.graph, packed, part, chosen, f"{site}/part_{number}")
        fuser.replace(site if number == 0 else f"{site}/part_{number}", [part], [nodes[-1].outputs[0]], nodes)


def _read(fuser: Fuser, packed: Projection, parts: Sequence[ir.Value]) -> list[Part]:
    """What each part consists of, from running the moves on numbers that name their places."""
    region = Region([packed.output], parts)
    opset = fuser.model.opset_imports.get("", 18)
    model = build_model(region.nodes, region.leaves, region.outputs, region.constants, opset)
    dtype = (packed.output.dtype or ir.DataType.FLOAT).numpy()
    found: list[list[Part | None]] = []
    try:
        call = session(model)
        for batch, sequence in _SIZES:
            places_BSN = np.arange(batch * sequence * packed.width).reshape(batch, sequence, packed.width)
            num_digits = math.ceil(math.log(places_BSN.size, _DIGIT))
            sums: list[Array] = []
            for power in range(num_digits):
                digits = (places_BSN // _DIGIT**power % _DIGIT).astype(dtype)
                given = {id(packed.output): digits}
                sizes = {"batch": batch, "sequence": sequence}
                feed = random_feed(region.leaves, sizes, np.random.default_rng(fuser.seed), given)
                results = [one.astype(np.int64) * _DIGIT**power for one in call(feed)]
                sums = results if not sums else [one + two for one, two in zip(sums, results, strict=True)]
            found.append([read_part(places_BSN, one) for one in sums])
    except NotCuttable:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise NotCuttable(f"the moves do not run by themselves: {first_line(error)}") from None
    if any(one is None for read in found for one in read):
        raise NotCuttable("the moves do more than choose columns")
    small, large = ([one for one in read if one is not None] for read in found)
    for one, two in zip(small, large, strict=True):
        if one.is_turned != two.is_turned or not np.array_equal(one.columns, two.columns):
            raise NotCuttable("which columns are chosen depends on the length")
    return small


def _product(graph: ir.Graph, packed: Projection, part: ir.Value, chosen: Part, name: str) -> list[ir.Node]:
    """x W[:, columns] + b[columns], shaped as the part is."""
    columns = chosen.columns
    weight = _chosen(graph, packed.weights[0], columns.reshape(-1), f"{name}.weight")
    nodes = [ir.Node("", "MatMul", [packed.activation, weight], name=name)]
    if packed.bias is not None:
        bias = _chosen(graph, packed.bias, columns.reshape(-1), f"{name}.bias")
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{name}/bias"))
    leading = list(packed.output.shape or (None, None))[:2]
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
        node.outputs[0].shape = ir.Shape([*leading, columns.size])
        node.outputs[0].type = part.type
    if columns.ndim == 2:
        heads, width = columns.shape
        shape = constant(graph, np.array([0, 0, heads, width], np.int64), f"split_heads_{heads}_{width}")
        nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], shape], name=f"{name}/heads"))
        nodes[-1].outputs[0].name = f"{name}/heads.out"
        if chosen.is_turned:
            turn = [ir.AttrInt64s("perm", [0, 2, 1, 3])]
            nodes.append(ir.Node("", "Transpose", [nodes[-1].outputs[0]], turn, name=f"{name}/turn"))
    return nodes


def _chosen(graph: ir.Graph, value: ir.Value, columns: Columns, base: str) -> ir.Value:
    """An initializer that reads `columns` of the last axis of another when it is saved."""
    tensor = value.const_value
    assert tensor is not None
    first = int(columns[0])
    is_run = bool((columns == np.arange(first, first + len(columns))).all())
    place: Any = slice(first, first + len(columns)) if is_run else columns
    sizes = [*tensor.shape.numpy()[:-1], len(columns)]
    return derived(graph, tensor, base, sizes, lambda whole: whole[..., place])
