"""What passes that split a weight into two thin factors share: which matrices, and the nodes they become.

Axes: N out features, K in features, R rank
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.fusing import constant
from onnxpress.compiler.linears import Linear, drop_unused, find_embeddings, find_linears
from onnxpress.compiler.nbits import add_initializer, replace
from onnxpress.compiler.pass_ import Report

Floats = npt.NDArray[Any]
Form = Literal["", "outputs", "inputs"]  # `Linear.pivots`


def break_even(rows: int, columns: int) -> float:
    """The rank at which two factors have as many parameters as the matrix."""
    return rows * columns / (rows + columns)


def rank_step(rank: float) -> int:
    """What ranks of this size are a multiple of: blocks of a later quantization then run without padding."""
    return 32 if rank >= 128 else 8


def matrices(
    model: ir.Model, report: Report, label: str, *, kinds: Sequence[str], exclude: Sequence[str]
) -> tuple[list[list[Linear]], list[Linear]]:
    """The float matrices that may be split, each with the linears that multiply with it, and the pairs there are.

    All others go to the report, and pairs too.

    Raises:
        OptionError: a kind or a pattern means nothing in this model.
    """
    linears = find_linears(model)
    tables = {id(one.head) for one in find_embeddings(model, linears) if one.head is not None}
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(linear.name, pattern) for linear in linears):
            names = [one.name for one in linears[:3]]
            raise OptionError(f"{label}: exclude={pattern!r} matches no linear", hint=f"names are like {names}")
    for kind in kinds:
        if all(linear.kind != kind for linear in linears):
            known = ", ".join(sorted({linear.kind for linear in linears}))
            raise OptionError(f"{label}: this model has no linear of kind {kind!r}", hint=f"it has: {known}")
    sites: dict[tuple[int, bool], list[Linear]] = {}
    pairs = []
    for linear in linears:
        if kinds and linear.kind not in kinds:
            report.skip(linear.name, "not among the kinds asked for")
        elif any(fnmatch.fnmatchcase(linear.name, pattern) for pattern in exclude):
            report.skip(linear.name, "excluded")
        elif linear.factors is not None:
            report.skip(linear.name, "already a pair of low rank")
            pairs.append(linear)
        elif linear.is_quantized:
            report.skip(linear.name, "quantized; decompose before quantizing")
        elif id(linear) in tables:
            report.skip(linear.name, "shares its bytes with the embedding")
        else:
            sites.setdefault((id(linear.weight), linear.is_turned()), []).append(linear)
    return list(sites.values()), pairs


def put_pair(
    graph: ir.Graph, linears: Sequence[Linear], first_KR: Floats, second_RN: Floats, pivots: Form = ""
) -> None:
    """Puts two MatMuls (and what else their form takes, see `Linear.pivots`) in the place of each of `linears`.

    Args:
        graph: holds them.
        linears: share a matrix; their `node` and `weight` are those of the second factor afterwards.
        first_KR, second_RN: in the type of the matrix; [K, R] and [R, N - R] where outputs are pivots, [K - R, R] and
            [R, N] where inputs are.
        pivots: the form.
    """
    first, second = (
        add_initializer(graph, f"{linears[0].name}.{end}", array) for end, array in (("A", first_KR), ("B", second_RN))
    )
    for linear in linears:
        node, old_weight = linear.node, linear.weight
        name = node.name or str(linear.output.name)
        made = _product(graph, linear, first, second, pivots, name)
        leading = None if linear.output.shape is None else list(linear.output.shape)[:-1]
        for one, widths in made:
            for value, width in zip(one.outputs, widths, strict=True):
                value.name = f"{linear.output.name}/{(one.name or '').removeprefix(name).strip('/')}{width}"
                value.type = linear.output.type
                value.shape = None if leading is None else ir.Shape([*leading, width])
        nodes = [one for one, _ in made]
        wide = next(one for one in nodes if one.op_type == "MatMul" and one.inputs[1] is second)
        if linear.holder == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], node.inputs[2]], name=f"{name}/bias"))
        old = [node]
        if linear.holder == "Transpose+MatMul":
            turned = node.inputs[1].producer()  # type: ignore[union-attr]
            if turned is not None and len(turned.outputs[0].uses()) == 1 and not turned.outputs[0].is_graph_output():
                old.insert(0, turned)
        replace(graph, node, old, nodes, [node.outputs[0]], [nodes[-1].outputs[0]])
        linear.node, linear.weight = wide, second
        drop_unused(graph, old_weight)


def _product(
    graph: ir.Graph, linear: Linear, first: ir.Value, second: ir.Value, pivots: Form, name: str
) -> list[tuple[ir.Node, tuple[int, ...]]]:
    """The nodes that make x W^T of two factors, with the widths of their outputs; the last gives the output."""
    x = linear.node.inputs[0]
    assert x is not None
    shapes = [one.const_value.shape.numpy() for one in (first, second) if one.const_value is not None]
    (rows, rank), (_, columns) = shapes
    if pivots == "inputs":
        sizes = constant(graph, np.array([rank, rows], np.int64), f"split/{rank}x{rows}")
        cut = ir.Node("", "Split", [x, sizes], [ir.AttrInt64("axis", -1)], num_outputs=2, name=f"{name}/pivots")
        narrow = ir.Node("", "MatMul", [cut.outputs[1], first], name=f"{name}/A")
        middle = ir.Node("", "Add", [cut.outputs[0], narrow.outputs[0]], name=f"{name}/sum")
        wide = ir.Node("", "MatMul", [middle.outputs[0], second], name=name)  # the pair keeps the name of the linear
        return [(cut, (rank, rows)), (narrow, (rank,)), (middle, (rank,)), (wide, (columns,))]
    narrow = ir.Node("", "MatMul", [x, first], name=f"{name}/A")
    wide = ir.Node("", "MatMul", [narrow.outputs[0], second], name=name)
    found = [(narrow, (rank,)), (wide, (columns,))]
    if pivots:
        parts = [wide.outputs[0], narrow.outputs[0]]
        join = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", -1)], name=f"{name}/pivots")
        found.append((join, (columns + rank,)))
    return found  # type: ignore[return-value]
