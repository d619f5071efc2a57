"""Matrices in codes that lose rows or columns: rows keep their codes, columns are rounded anew in the same format.

Axes: N out features, K in features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.linears import Linear, drop_unused, unique_name
from onnxpress.compiler.nbits import CodedMatrix, replace, replace_linear, store
from onnxpress.compiler.requantize import coded, nearest

Floats = npt.NDArray[Any]
Index = npt.NDArray[np.integer]

FLOATS = ("MatMul", "Gemm", "Transpose+MatMul")


def is_coded(linear: Linear) -> bool:
    """Whether it is a MatMulNBits whose codes can be read."""
    return linear.holder == "MatMulNBits" and coded(linear.node) is not None


def obstacle(linears: Sequence[Linear]) -> str | None:
    """Why rows or columns cannot be taken out of matrices; None when they can."""
    for linear in linears:
        if linear.factors is not None:
            return f"{linear.name} is a pair of low rank: comes before svd_llm"
        if linear.num_sums:
            return f"{linear.name} holds offsets of blocks: comes before quantizers"
        if linear.holder not in FLOATS and not is_coded(linear):
            return f"{linear.name} is stored by {linear.holder}: comes before quantizers"
    return None


def _level(node: ir.Node) -> int:
    attribute = node.attributes.get("accuracy_level")
    return 0 if attribute is None else attribute.as_int()


@dataclass
class Codes:
    """What a MatMulNBits held before it became a MatMul.

    Attributes:
        matrix: codes, scales, zero points.
        level: its accuracy_level.
    """

    matrix: CodedMatrix
    level: int

    def nearest(self, new_NK: Floats) -> CodedMatrix:
        """A matrix of other columns in the same format."""
        old, columns = self.matrix, new_NK.shape[1]
        groups = -(-columns // old.block_size)
        zero = None if old.zero is None else old.zero[:, : -(-groups * old.bits // 8)]
        # Its grid is that of other columns: only the format of it counts.
        like = CodedMatrix(old.codes[:, :groups], old.scale[:, :groups], zero, columns, old.bits, old.block_size)
        return nearest(np.asarray(new_NK, np.float32), like)


def to_floats(linear: Linear) -> Codes:
    """Puts a MatMul in the place of a MatMulNBits, with a weight that is made of the codes whenever it is read."""
    node, old = linear.node, linear.weights
    graph, matrix = node.graph, coded(node)
    assert isinstance(graph, ir.Graph)
    assert matrix is not None
    found = Codes(matrix, _level(node))
    name, dtype = unique_name(graph, f"{linear.name}.floats"), ir.DataType.from_numpy(matrix.scale.dtype)
    shape = ir.Shape([linear.num_in, linear.num_out])

    def make() -> ir.Tensor[Any]:
        return ir.Tensor(np.ascontiguousarray(matrix.w_NK().T, dtype.numpy()), dtype=dtype, name=name)

    lazy = ir.LazyTensor(make, dtype=dtype, shape=shape, name=name)
    weight = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
    graph.register_initializer(weight)
    nodes = [ir.Node("", "MatMul", [node.inputs[0], weight], name=node.name)]
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    if bias is not None:
        nodes[0].outputs[0].name = f"{linear.output.name}/product"
        nodes[0].outputs[0].type, nodes[0].outputs[0].shape = linear.output.type, linear.output.shape
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias], name=f"{node.name}/bias"))
    replace(graph, node, [node], nodes, [linear.output], [nodes[-1].outputs[0]])
    linear.node, linear.holder, linear.weight, linear.output = nodes[0], "MatMul", weight, nodes[0].outputs[0]
    for value in old:
        drop_unused(graph, value)
    return found


def to_codes(linear: Linear, matrix: CodedMatrix, level: int) -> None:
    """Puts a MatMulNBits in the place of a MatMul."""
    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    replace_linear(linear, store(graph, f"{linear.name}.pruned", matrix), level)


def cut_rows(linear: Linear, rows: Index, new_NK: Floats | None) -> None:
    """Leaves these rows of a matrix.

    Args:
        linear: a float matrix, or a MatMulNBits; changed.
        rows: in their order.
        new_NK: what a float matrix is replaced by before that.
    """
    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    if linear.holder == "MatMulNBits":
        old = coded(linear.node)
        assert old is not None
        zero = None if old.zero is None else old.zero[rows]
        part = CodedMatrix(old.codes[rows], old.scale[rows], zero, old.num_in, old.bits, old.block_size)
        to_codes(linear, part, _level(linear.node))
        return
    tensor, is_turned = linear.weight.const_value, linear.is_turned()
    assert tensor is not None

    def make() -> npt.NDArray[np.float32]:
        if new_NK is not None:
            return np.asarray(new_NK[rows], np.float32)
        stored = tensor.numpy()
        return np.asarray((stored.T if is_turned else stored)[rows], np.float32)

    linear.set_weight(make, unique_name(graph, f"{linear.name}.pruned"), (len(rows), linear.num_in))


def set_matrix(linear: Linear, new_NK: Floats, what: str) -> None:
    """Replaces a float matrix, of which columns may be gone."""
    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    rows, columns = new_NK.shape

    def make() -> npt.NDArray[np.float32]:
        return np.asarray(new_NK, np.float32)

    linear.set_weight(make, unique_name(graph, f"{linear.name}.{what}"), (rows, columns))
