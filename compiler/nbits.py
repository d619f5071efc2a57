"""A matrix as integer codes, and the nodes that compute with it: MatMulNBits and GatherBlockQuantized.

Every quantization pass ends here: it hands over codes, scales and zero points, and gets nodes whose kernels are fast.
The combinations for which ONNX Runtime has no fused kernel (it then dequantizes the whole matrix on every call, about
two hundred times slower) are refused by `slow_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import packing
from onnxpress.compiler.formats import OPERATORS
from onnxpress.compiler.linears import MICROSOFT, Embedding, Linear, drop_unused, unique_name
from onnxpress.compiler.region import build_model, run
from onnxpress.compiler.scales import stored_nbytes

BITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix [N, K] in the layout in which ONNX Runtime reads it; G = ceil(K / block_size).

    Attributes:
        codes: uint8 [N, G, block_size bits / 8], low bits first.
        scale: [N, G], float type of the activations.
        zero: uint8 [N, ceil(G bits / 8)], packed like the codes; None for 2^(bits - 1) everywhere.
        num_in: K.
        bits, block_size: width of a code, columns per scale.
    """

    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[Any]
    zero: npt.NDArray[np.uint8] | None
    num_in: int
    bits: int
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points in a file."""
        return self.codes.nbytes + stored_nbytes(self.scale) + (0 if self.zero is None else self.zero.nbytes)

    def w_NK(self) -> npt.NDArray[np.float32]:  # noqa: N802
        """The matrix that the codes stand for, float32 [N, K]."""
        rows = self.codes.shape[0]
        codes = packing.unpack(self.codes.reshape(rows, -1), self.bits)[:, : self.num_in]
        zero = None if self.zero is None else packing.unpack(self.zero, self.bits)[:, : self.scale.shape[1]]
        return packing.dequantize(codes, self.scale, zero, bits=self.bits, block_size=self.block_size)


@dataclass(frozen=True)
class Stored:
    """The initializers of a `CodedMatrix`, shared by all nodes that read it."""

    matrix: CodedMatrix
    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None


def slow_kernel(bits: int, block_size: int, provider: str) -> str | None:
    """Why this provider has no fast kernel for such codes, None when it has one (at accuracy_level 4 on the CPU)."""
    if bits == 2 and not 32 <= block_size <= 128:
        return f"2 bits have a fast kernel for blocks of 32, 64 and 128, not of {block_size}"
    if provider == "cuda" and bits == 4 and block_size > 128:
        return f"4 bits on CUDA have a fused kernel for blocks of at most 128, not of {block_size}"
    return None


def store(graph: ir.Graph, name: str, matrix: CodedMatrix) -> Stored:
    """Adds the arrays of `matrix` to the graph as `name.codes`, `name.scale` and `name.zero`."""
    return Stored(
        matrix,
        add_initializer(graph, f"{name}.codes", matrix.codes),
        add_initializer(graph, f"{name}.scale", matrix.scale),
        None if matrix.zero is None else add_initializer(graph, f"{name}.zero", matrix.zero),
    )


def add_initializer(graph: ir.Graph, base: str, array: npt.NDArray[Any]) -> ir.Value:
    """A new initializer with a name of its own that begins with `base`."""
    name = unique_name(graph, base)
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace_linear(
    linear: Linear, stored: Stored, accuracy_level: int, side: tuple[Stored, Stored] | None = None
) -> ir.Node:
    """Puts a MatMulNBits in the place of the linear's node; a bias that the node adds becomes an Add behind it.

    The outputs of `side`, two matrices [R, K] and [N, R] one after the other, are added to its own.

    `linear` is updated to what it is afterwards, so that nothing keeps the old weight alive.
    """
    node, old_operands = linear.node, (linear.weight, *linear.node.inputs[1:])
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    # Not `linear.activation`: another replacement may have put a new value there.
    activation = node.inputs[0]
    assert activation is not None
    multiply = _matmul_node(activation, stored, accuracy_level, node.name)
    new_nodes = [multiply]
    if side is not None:
        name = node.name or linear.output.name
        levels = [accuracy_level if one.matrix.bits == 4 else 4 for one in side]  # 8 bits have no other quick kernel
        narrow = _matmul_node(activation, side[0], levels[0], f"{name}/A")
        wide = _matmul_node(narrow.outputs[0], side[1], levels[1], f"{name}/B")
        shape = None if linear.output.shape is None else [*linear.output.shape][:-1]
        for one, inner, width in ((narrow, "inner", side[0]), (wide, "repair", side[1])):
            _describe(one.outputs[0], linear.output, f"{linear.output.name}/{inner}")
            one.outputs[0].shape = None if shape is None else ir.Shape([*shape, width.matrix.codes.shape[0]])
        _describe(multiply.outputs[0], linear.output, f"{linear.output.name}/rounded")
        whole = ir.Node("", "Add", [multiply.outputs[0], wide.outputs[0]], name=f"{name}/repair")
        new_nodes += [narrow, wide, whole]
    slots = {"Gemm": 2, "MatMulNBits": 5, **{name: one.bias for name, one in OPERATORS.items()}}
    index = slots.get(linear.holder)
    bias = node.inputs[index] if index is not None and len(node.inputs) > index else None
    if bias is not None:
        product = new_nodes[-1].outputs[0]
        _describe(product, linear.output, f"{linear.output.name}/product")
        new_nodes.append(ir.Node("", "Add", [product, bias], name=f"{node.name}/bias"))
    old_nodes = [node]
    if linear.holder == "Transpose+MatMul":
        turned = node.inputs[1].producer()  # type: ignore[union-attr]
        if turned is not None and len(turned.outputs[0].uses()) == 1 and not turned.outputs[0].is_graph_output():
            old_nodes.insert(0, turned)
    replace(graph, node, old_nodes, new_nodes, [linear.output], [new_nodes[-1].outputs[0]])
    linear.node, linear.holder, linear.weight = multiply, "MatMulNBits", stored.codes
    linear.activation, linear.output = activation, multiply.outputs[0]
    for operand in old_operands:
        drop_unused(graph, operand)
    return multiply


def replace_embedding(embedding: Embedding, stored: Stored, *, shared: bool, explicit_zero: bool) -> ir.Node:
    """Puts a GatherBlockQuantized in the place of the Gather or of an earlier GatherBlockQuantized.

    Args:
        embedding: the table and its node; updated to what it is afterwards.
        stored: its codes; the width must be a multiple of the block size.
        shared: a MatMulNBits reads the same codes. It needs them as an initializer of rank 3, or it does not prepack
            them; the gather then reads them through a Reshape.
        explicit_zero: write zero points even if all are 2^(bits - 1): older CUDA kernels take 0 for granted.
    """
    node, matrix = embedding.node, stored.matrix
    old_operands = (node.inputs[0], *node.inputs[2:])
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    rows = matrix.codes.shape[0]
    codes = stored.codes
    if shared:
        sizes = add_initializer(graph, f"{codes.name}.shape", np.array([rows, -1], np.int64))
        view = ir.Node("", "Reshape", [codes, sizes], name=f"{codes.name}/view")
        view.outputs[0].name = f"{codes.name}/view"
        view.outputs[0].shape, view.outputs[0].dtype = ir.Shape([rows, matrix.codes[0].size]), ir.DataType.UINT8
        graph.insert_before(graph[0], view)
        codes = view.outputs[0]
    else:
        flat = ir.Tensor(matrix.codes.reshape(rows, -1), name=codes.name)
        codes.const_value, codes.shape = flat, flat.shape
    zero = stored.zero
    if zero is None and explicit_zero:
        middle = np.full((rows, matrix.scale.shape[1]), 2 ** (matrix.bits - 1), np.uint8)
        packed = packing.pack_zero_points(middle, matrix.bits)
        zero = add_initializer(graph, f"{stored.codes.name}.zero", packed)
    inputs = [codes, node.inputs[1], stored.scale] + ([] if zero is None else [zero])
    attributes = {"bits": matrix.bits, "block_size": matrix.block_size, "gather_axis": 0, "quantize_axis": 1}
    gather = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, name=node.name)
    replace(graph, node, [node], [gather], [node.outputs[0]], [gather.outputs[0]])
    embedding.node, embedding.table = gather, codes
    for operand in old_operands:
        reshape = None if operand is None else operand.producer()
        read = [operand]
        if reshape is not None and reshape.op_type == "Reshape" and not reshape.outputs[0].uses():
            read = list(reshape.inputs)  # the codes of a tied head
            graph.remove(reshape, safe=True)
        for value in read:
            drop_unused(graph, value)
    return gather


def activation_error(
    linears: Sequence[Linear], *, seed: int, num_tokens: int = 16, max_rows: int = 2048
) -> dict[str, float]:
    """Relative error that int8 activations (accuracy_level 4) add on the CPU, the codes being what they are.

    Each distinct (N, K, bits, block size) is measured once, with normal random activations and at most `max_rows` rows.

    Returns:
        ||y_level4 - y_level0|| / ||y_level0|| of every MatMulNBits at level 4 with float32 activations.
    """
    rng = np.random.default_rng(seed)
    measured: dict[tuple[Any, ...], float] = {}
    errors: dict[str, float] = {}
    for linear in linears:
        node = linear.node
        if linear.holder != "MatMulNBits" or _attribute(node, "accuracy_level") != 4:
            continue
        arrays = [value.const_value.numpy() for value in node.inputs[1:4] if value is not None and value.const_value]
        if arrays[1].dtype != np.float32:
            continue
        bits, block_size = _attribute(node, "bits"), _attribute(node, "block_size")
        key = (linear.shape, bits, block_size, len(arrays))
        if key not in measured:
            rows = min(linear.num_out, max_rows)
            part = [array[:rows] for array in arrays]
            matrix = CodedMatrix(part[0], part[1], part[2] if len(part) > 2 else None, linear.num_in, bits, block_size)
            x = rng.standard_normal((num_tokens, linear.num_in), np.float32)
            # Level 0 computes x w^T in float32; for 8 bits ONNX Runtime's own level 0 would take seconds.
            exact = x @ matrix.w_NK().T
            got = run_matmul(matrix, x, accuracy_level=4)
            norm = float(np.linalg.norm(exact))
            measured[key] = float(np.linalg.norm(got - exact)) / norm if norm else 0.0
        errors[linear.name] = measured[key]
    return errors


def run_matmul(matrix: CodedMatrix, x: npt.NDArray[Any], *, accuracy_level: int = 0) -> npt.NDArray[Any]:
    """x [T, K] times the coded matrix, [T, N], by ONNX Runtime's own kernel on the CPU."""
    scratch = ir.Graph([], [], nodes=[])
    dtype = ir.DataType.from_numpy(x.dtype)
    activation = ir.Value(name="x", shape=ir.Shape([None, matrix.num_in]), type=ir.TensorType(dtype))
    node = _matmul_node(activation, store(scratch, "w", matrix), accuracy_level, "product")
    node.outputs[0].dtype = dtype
    return run(build_model([node], [activation], node.outputs), [x])[0]


def replace(
    graph: ir.Graph,
    point: ir.Node,
    old_nodes: Sequence[ir.Node],
    new_nodes: Sequence[ir.Node],
    old_values: Sequence[ir.Value],
    new_values: Sequence[ir.Value],
) -> None:
    """Inserts the new nodes at `point` and lets the new values take over name, type and readers of the old ones."""
    for node in new_nodes:
        if node.domain:
            graph.opset_imports.setdefault(node.domain, 1)
    graph.insert_before(point, new_nodes)
    for old, new in zip(old_values, new_values, strict=True):
        name = old.name
        old.name = None
        _describe(new, old, name)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(list(old_nodes)[::-1], safe=True)


def _describe(new: ir.Value, old: ir.Value, name: str | None) -> None:
    new.name, new.shape, new.type = name, old.shape, old.type


def _matmul_node(activation: ir.Value, stored: Stored, accuracy_level: int, name: str | None) -> ir.Node:
    matrix = stored.matrix
    attributes = {
        "K": matrix.num_in,
        "N": matrix.codes.shape[0],
        "bits": matrix.bits,
        "block_size": matrix.block_size,
        "accuracy_level": accuracy_level,
    }
    inputs = [activation, stored.codes, stored.scale] + ([] if stored.zero is None else [stored.zero])
    return ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=name)


def _attribute(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()
