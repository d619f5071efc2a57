"""Gives rows their two axes back: what lies between a Reshape to [B S, K] and one to [B, S, N] works on [B, S, ...].

GPT-2 folds batch and sequence before each projection and unfolds them afterwards, OPT around its whole feed-forward
part, residual included. The Reshapes, with the sizes they ask for, stand between all projections and whatever wants to
fuse with them. Everything between must treat rows one by one; a Gemm becomes MatMul and Add.

Axes:    B batch, S sequence, K in features, N out features
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, discard, vector
from onnxpress.compiler.linears import derived
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import Array, NotCuttable, Region, build_model, first_line, random_feed, session

_SIZES = ((2, 3), (5, 4))  # (B, S) tried: no size of one is a size of the other
_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")
_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Reciprocal", "Identity", "Cast"),
    *("Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "FastGelu", "QuickGelu", "Softplus"),
)


@dataclass(frozen=True, kw_only=True)
class Unflatten(Pass):
    """Products, norms and activations on three axes instead of two between Reshapes."""

    promise: ClassVar[Promise] = Promise.CLOSE

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            if node.op_type != "Reshape" or _rank(node.inputs[0]) != 3 or node.outputs[0].is_graph_output():
                continue
            rows = _rows(node)
            if not any(member.op_type == "Gemm" for member in rows.members):
                continue  # other Reshapes, those of heads for one
            site = node.name or node.outputs[0].name or "Reshape"
            try:
                if rows.reason is not None:
                    raise NotCuttable(rows.reason)
                _check(fuser, rows)
                nodes, news = _unfolded(model.graph, rows)
            except NotCuttable as reason:
                report.skip(site, str(reason))
                continue
            fuser.replace(site, [exit_.outputs[0] for exit_ in rows.exits], news, nodes)
        fuser.finish()
        return report


@dataclass
class _Rows:
    """What is computed from folded rows: `members` in order, `exits` that unfold; `reason` why it must stay."""

    fold: ir.Node
    members: list[ir.Node] = field(default_factory=list)
    exits: list[ir.Node] = field(default_factory=list)
    reason: str | None = None


def _rows(fold: ir.Node) -> _Rows:
    """Follows the rows from a Reshape to the Reshapes that unfold them."""
    found = _Rows(fold)
    inside = {id(fold.outputs[0])}
    waiting: list[ir.Node] = []
    queue = [fold.outputs[0]]
    while queue:
        value = queue.pop(0)
        for reader in value.consumers():
            if reader in found.members or reader in found.exits:
                continue
            if reader.op_type == "Reshape" and reader.inputs[0] is value and _rank(reader.outputs[0]) == 3:
                found.exits.append(reader)
            elif reader.op_type != "Gemm" and not _is_by_row(reader):
                found.reason = f"{reader.op_type} reads the folded rows"
            elif all(one is None or id(one) in inside or one.const_value is not None for one in reader.inputs):
                found.members.append(reader)
                inside.add(id(reader.outputs[0]))
                queue.append(reader.outputs[0])
            else:
                waiting.append(reader)
    left = [one for one in waiting if one not in found.members]
    if left:
        found.reason = f"{left[0].op_type} joins the folded rows with something else"
    given = [value for node in (*found.members, *found.exits) for value in node.outputs if value.is_graph_output()]
    if given:
        found.reason = f"{given[0].name} is an output of the graph"
    return found


def _is_by_row(node: ir.Node) -> bool:
    """Whether a node treats each row on its own, constants having at most one axis."""
    constants = [one.const_value for one in node.inputs if one is not None and one.const_value is not None]
    if len(node.outputs) > 1 and any(value.uses() for value in node.outputs[1:]):
        return False
    if any(len(tensor.shape) > 1 for tensor in constants):
        return False
    if node.op_type in _NORMS:
        axis = node.attributes.get("axis")
        return axis is None or axis.as_int() in (-1, 1)
    return node.op_type in _ELEMENTWISE


def _check(fuser: Fuser, rows: _Rows) -> None:
    """Runs the Reshapes: rows must come back where they were."""
    x, flat = rows.fold.inputs[0], rows.fold.outputs[0]
    ends = [exit_.inputs[0] for exit_ in rows.exits if exit_.inputs[0] is not None]
    if not ends or x is None:
        raise NotCuttable("the rows are never unfolded")
    region = Region([x, *ends], [flat, *(exit_.outputs[0] for exit_ in rows.exits)])
    opset = fuser.model.opset_imports.get("", 18)
    rng = np.random.default_rng(fuser.seed)
    same = []
    try:
        call = session(build_model(region.nodes, region.leaves, region.outputs, region.constants, opset))
        for batch, sequence in _SIZES:
            given = {id(end): _random_rows(end, batch * sequence, rng) for end in ends}
            feed = random_feed(region.leaves, {"batch": batch, "sequence": sequence}, rng, given)
            folded, *unfolded = call(feed)
            whole = feed[[id(leaf) for leaf in region.leaves].index(id(x))]
            same.append(np.array_equal(folded, whole.reshape(-1, whole.shape[-1])))
            for end, result in zip(ends, unfolded, strict=True):
                same.append(np.array_equal(result, given[id(end)].reshape(batch, sequence, -1)))
    except NotCuttable:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise NotCuttable(f"the Reshapes do not run by themselves: {first_line(error)}") from None
    if not all(same):
        raise NotCuttable("the Reshapes do more than fold batch and sequence")


def _random_rows(end: ir.Value, count: int, rng: np.random.Generator) -> Array:
    """Numbers for `count` rows of a value of known width."""
    width = None if end.shape is None or len(end.shape) != 2 else end.shape[1]
    if not isinstance(width, int):
        raise NotCuttable(f"the width of {end.name} is unknown")
    return rng.standard_normal((count, width)).astype((end.dtype or ir.DataType.FLOAT).numpy())


def _unfolded(graph: ir.Graph, rows: _Rows) -> tuple[list[ir.Node], list[ir.Value]]:
    """(the members anew on three axes, what takes the place of each exit)."""
    x = rows.fold.inputs[0]
    assert x is not None
    assert x.shape is not None
    anew: dict[int, ir.Value] = {id(rows.fold.outputs[0]): x}
    nodes: list[ir.Node] = []
    try:
        for member in rows.members:
            if member.op_type == "Gemm":
                made = _product(graph, member, anew)
            else:
                operands = [None if one is None else anew.get(id(one), one) for one in member.inputs]
                attributes = [one for one in member.attributes.values() if one.name != "axis"]
                if member.op_type in _NORMS:
                    attributes.append(ir.AttrInt64("axis", -1))
                name = f"{member.name or member.outputs[0].name}/unfolded"
                made = [ir.Node(member.domain, member.op_type, operands, attributes, name=name)]
            for node in made:
                old = member.outputs[0]
                width = None if old.shape is None else old.shape[-1]
                node.outputs[0].name = f"{node.name}.out"
                node.outputs[0].shape = ir.Shape([*list(x.shape)[:2], width])
                node.outputs[0].type = old.type
            nodes += made
            anew[id(member.outputs[0])] = made[-1].outputs[0]
    except NotCuttable:
        discard(nodes)
        raise
    return nodes, [anew[id(exit_.inputs[0])] for exit_ in rows.exits]


def _product(graph: ir.Graph, gemm: ir.Node, anew: dict[int, ir.Value]) -> list[ir.Node]:
    """MatMul and Add in the place of a Gemm."""
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    factors = [gemm.attributes[name].as_float() for name in ("alpha", "beta") if name in gemm.attributes]
    if gemm.inputs[0] is None or id(gemm.inputs[0]) not in anew or _is_set(gemm, "transA"):
        raise NotCuttable("the activation is transposed, or not the first operand")
    if any(factor != 1.0 for factor in factors):
        raise NotCuttable(f"the product or the bias is scaled: {factors}")
    if bias is not None and vector(bias) is None:
        raise NotCuttable("the bias is no constant vector")
    weight = gemm.inputs[1]
    if weight is None or weight.const_value is None:
        raise NotCuttable("the matrix is no constant")
    if _is_set(gemm, "transB"):
        sizes = weight.const_value.shape.numpy()[::-1]
        weight = derived(graph, weight.const_value, f"{weight.name}.T", sizes, np.transpose)
    base = gemm.name or gemm.outputs[0].name
    nodes = [ir.Node("", "MatMul", [anew[id(gemm.inputs[0])], weight], name=f"{base}/product")]
    if bias is not None:
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{base}/bias"))
    return nodes


def _is_set(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)
