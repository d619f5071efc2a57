"""What passes that split a weight into two thin factors share: which matrices, and the nodes they become.

Axes: N out features, K in features, R rank
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import Linear, drop_unused, find_embeddings, find_linears
from onnxpress.compiler.nbits import add_initializer, replace
from onnxpress.compiler.pass_ import Report

Floats = npt.NDArray[Any]


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
            raise OptionError(f"{label}: exclude={pattern!r} matches no linear", hint="see their names with inspect")
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


def put_pair(graph: ir.Graph, linears: Sequence[Linear], first_KR: Floats, second_RN: Floats) -> None:
    """Puts two MatMuls (and the Add of a Gemm's bias) in the place of each of `linears`, which share a matrix.

    Args:
        graph: holds them.
        linears: their `node` and `weight` are those of the second factor afterwards.
        first_KR, second_RN: in the type of the matrix.
    """
    rank = first_KR.shape[1]
    first, second = (
        add_initializer(graph, f"{linears[0].name}.{end}", array) for end, array in (("A", first_KR), ("B", second_RN))
    )
    for linear in linears:
        node, old_weight = linear.node, linear.weight
        activation = node.inputs[0]
        assert activation is not None
        name = node.name or str(linear.output.name)
        narrow = ir.Node("", "MatMul", [activation, first], name=f"{name}/A")
        middle = narrow.outputs[0]
        middle.name, middle.type = f"{linear.output.name}/{rank}", linear.output.type
        if linear.output.shape is not None:
            middle.shape = ir.Shape([*list(linear.output.shape)[:-1], rank])
        wide = ir.Node("", "MatMul", [middle, second], name=name)  # the pair keeps the name of the linear
        nodes = [narrow, wide]
        if linear.holder == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            wide.outputs[0].name = f"{linear.output.name}/product"
            wide.outputs[0].shape, wide.outputs[0].type = linear.output.shape, linear.output.type
            nodes.append(ir.Node("", "Add", [wide.outputs[0], node.inputs[2]], name=f"{name}/bias"))
        old = [node]
        if linear.holder == "Transpose+MatMul":
            turned = node.inputs[1].producer()  # type: ignore[union-attr]
            if turned is not None and len(turned.outputs[0].uses()) == 1 and not turned.outputs[0].is_graph_output():
                old.insert(0, turned)
        replace(graph, node, old, nodes, [node.outputs[0]], [nodes[-1].outputs[0]])
        linear.node, linear.weight = wide, second
        drop_unused(graph, old_weight)
