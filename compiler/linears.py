"""One view of "a weight that multiplies an activation", whatever node holds it.

    y[..., N] = x[..., K] @ w_NK^T        N out features, K in features

The weight is always seen as `w_NK` (PyTorch's layout), be it the second input of a MatMul (stored K x N), a Gemm with
or without transB, a MatMul behind a Transpose, the blocks of a MatMulNBits, or the product of two small factors. Passes
read `w_NK()`, compute, and hand the result back through `set_weight` or by building a node of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler import formats, packing
from onnxpress.compiler.blocks import Block, find_blocks
from onnxpress.compiler.lora_targets import SLOT
from onnxpress.compiler.roles import assign_roles

MICROSOFT = "com.microsoft"
Float2D = npt.NDArray[np.float32]


@dataclass
class Linear:
    """A constant matrix multiplied with an activation.

    Attributes:
        name: unique and stable: "block3.gate", "head"; the node's own name when the role is unknown.
        node: the operator that multiplies (MatMul, Gemm, MatMulNBits; the second product of a low-rank pair).
        holder: "MatMul", "Gemm", "Transpose+MatMul", "MatMulNBits", a format of `formats`, or "pair".
        activation: the value x, shape [..., K].
        output: the value that x @ w^T becomes, before a separate bias Add.
        weight: the initializer that holds the matrix (codes for MatMulNBits, the first factor of a pair).
        bias: initializer of shape [N] added to the output, None when there is none.
        block: index of the block it belongs to, None outside of all blocks (head).
        kind: one of `roles.KINDS`.
        num_out, num_in: N and K.
        factors: the two linears of a pair, in the order in which they run.
        pivots: how the factors of a pair make its matrix, rank R:
            "": w = B A, A [R, K] and B [N, R].
            "outputs": A [R, K] are the last R rows of w, and B [N - R, R] makes the others of them: w = [B A; A].
            "inputs": B [N, R] are the first R columns of w, and A [R, K - R] makes the others: w = [B, B A].
    """

    name: str
    node: ir.Node
    holder: str
    activation: ir.Value
    output: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    num_out: int
    num_in: int
    block: int | None = None
    kind: str = "linear"
    factors: tuple[Linear, Linear] | None = field(default=None, repr=False)
    pivots: Literal["", "outputs", "inputs"] = ""
    is_side: bool = False  # a product that is added to what another linear gives: `compensate`

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.num_out, self.num_in

    @property
    def num_sums(self) -> int:
        """How many of the columns hold offsets of blocks, and read sums of the activation's blocks (`extends`)."""
        table = _table_behind(self.activation)
        return 0 if table is None else _dims(table)[1]

    @property
    def source(self) -> ir.Value:
        """The activation without the sums of its blocks."""
        joined = self.activation.producer() if self.num_sums else None
        plain = None if joined is None else joined.inputs[0]
        return self.activation if plain is None else plain

    @property
    def bits(self) -> float:
        """Bits per weight of the stored form, scales and zero points included."""
        return 8 * self.nbytes / (self.num_out * (self.num_in - self.num_sums))

    @property
    def nbytes(self) -> int:
        """Bytes of everything that stores the matrix: codes, scales and zero points, or both factors."""
        if self.factors is not None:
            return sum(factor.nbytes for factor in self.factors)
        return sum(_tensor(value).nbytes for value in self.weights)

    @property
    def weights(self) -> list[ir.Value]:
        """The initializers that store the matrix, `weight` first: codes, scales, zero points; of a pair the first."""
        if self.holder == "MatMulNBits":
            return [value for value in self.node.inputs[1:4] if value is not None]
        stored = formats.stored(self.node) if self.is_quantized else None
        return [self.weight] if stored is None else list(stored.weights)

    @property
    def is_quantized(self) -> bool:
        """Whether the matrix is stored in fewer bits than a float type for activations has."""
        return self.holder in ("MatMulNBits", formats.QDQ, *formats.OPERATORS)

    def w_NK(self) -> Float2D:  # noqa: N802
        """The matrix as float32 [N, K], dequantized or multiplied out where it is not stored so; a fresh array or a
        read-only view of the stored one: do not write into it."""
        if self.factors is not None:
            first, second = (factor.w_NK() for factor in self.factors)
            product = second @ first
            if self.pivots == "outputs":
                return np.concatenate([product, first])
            return np.concatenate([second, product], axis=1) if self.pivots else np.ascontiguousarray(product)
        if self.holder == "MatMulNBits":
            return packing.dequantize_node(self.node)
        if self.is_quantized:
            return formats.matrix(self.node)
        stored = _tensor(self.weight).numpy()
        if self.is_turned():
            stored = stored.T
        return np.asarray(stored, dtype=np.float32)

    def stored_form(self, w_NK: Float2D) -> npt.NDArray[Any]:
        """`w_NK` in the layout and type of `weight`: what the node would have to be fed with.

        Args:
            w_NK: float32 [N, K].

        Raises:
            TypeError: the holder has no float matrix of its own.
        """
        if self.holder not in ("MatMul", "Gemm", "Transpose+MatMul"):
            raise TypeError(f"{self.name}: a {self.holder} holds no float matrix of its own")
        matrix = w_NK.T if self.is_turned() else w_NK
        return np.ascontiguousarray(matrix).astype(_tensor(self.weight).dtype.numpy(), copy=False)

    @property
    def is_shared(self) -> bool:
        """Whether something else reads the matrix, or the Transpose in front of it, or a caller may replace it."""
        values = [self.weight, *([self.node.inputs[1]] if self.holder == "Transpose+MatMul" else [])]
        return any(
            one is not None and (len(one.uses()) > 1 or one.is_graph_output() or one.is_graph_input()) for one in values
        )

    def is_turned(self) -> bool:
        """Whether the matrix is stored as [K, N]."""
        return self.holder == "MatMul" or (self.holder == "Gemm" and not _int(self.node, "transB"))

    def set_weight(self, make_w_NK: Callable[[], Float2D], name: str, shape: tuple[int, int] | None = None) -> None:
        """Replaces the stored float matrix, lazily: `make_w_NK` runs when the model is saved.

        Args:
            make_w_NK: returns the new matrix, float32 [N, K]; holds no large array itself.
            name: of the new initializer; must not exist yet.
            shape: (N, K) of the new matrix, the present one by default.
        """
        if self.holder not in ("MatMul", "Gemm", "Transpose+MatMul"):
            raise TypeError(f"{self.name}: a {self.holder} holds no float matrix of its own")
        rows, columns = shape or self.shape
        transposed = self.is_turned()
        dims = (columns, rows) if transposed else (rows, columns)
        dtype = _tensor(self.weight).dtype

        def stored() -> ir.Tensor[Any]:
            matrix = make_w_NK()
            array = np.ascontiguousarray(matrix.T if transposed else matrix)
            return ir.Tensor(array.astype(dtype.numpy(), copy=False), dtype=dtype, name=name)

        graph = self.node.graph
        assert isinstance(graph, ir.Graph)
        new = ir.Value(
            name=name,
            shape=ir.Shape(dims),
            type=ir.TensorType(dtype),
            const_value=ir.LazyTensor(stored, dtype=dtype, shape=ir.Shape(dims), name=name),
        )
        graph.register_initializer(new)
        old = self.weight
        consumer = self.node if self.holder != "Transpose+MatMul" else _producer(self.node.inputs[1])
        for index, value in enumerate(consumer.inputs):
            if value is old:
                consumer.replace_input_with(index, new)
        self.weight, self.num_out, self.num_in = new, rows, columns
        drop_unused(graph, old)


@dataclass
class Embedding:
    """A table [V, H] from which rows are gathered.

    Attributes:
        node: the Gather or GatherBlockQuantized.
        table: its initializer.
        num_rows, width: V and H.
        head: the linear that multiplies with the same bytes, None when untied.
    """

    node: ir.Node
    table: ir.Value
    num_rows: int
    width: int
    head: Linear | None = None

    def table_VH(self) -> Float2D:  # noqa: N802
        """The table as float32 [V, H]; do not write into it."""
        if self.node.op_type == "GatherBlockQuantized":
            return packing.dequantize_node(self.node)
        return np.asarray(_tensor(self.table).numpy(), dtype=np.float32)


def find_linears(model: ir.Model, *, blocks: list[Block] | None = None, expand_pairs: bool = False) -> list[Linear]:
    """All linears of the main graph in topological order, with block and kind.

    Args:
        model: any ONNX model; not changed.
        blocks: what `find_blocks(model)` returned, to spare a second search.
        expand_pairs: list the two factors of a low-rank pair instead of the pair; they have its kind.
    """
    blocks = find_blocks(model) if blocks is None else blocks
    found = _join_pairs(list(_singles(model.graph)))
    assign_roles(model.graph, found, blocks)
    if expand_pairs:
        return [one for linear in found for one in linear.factors or (linear,)]
    return found


def find_embeddings(model: ir.Model, linears: list[Linear] | None = None) -> list[Embedding]:
    """Tables that are gathered by the model's integer inputs, each with the head that shares its bytes, if any."""
    linears = find_linears(model) if linears is None else linears
    found = []
    for node in model.graph:
        if node.op_type == "GatherBlockQuantized" and (_is_constant(node.inputs[0]) or _is_view(node.inputs[0])):
            rows, width = packing.gather_shape(node)
        elif node.op_type == "Gather" and _int(node, "axis") == 0 and _is_float_matrix(node.inputs[0]):
            table = node.inputs[0]
            assert table is not None
            rows, width = _dims(table)
            if rows < 2 or node.inputs[1] is None or not _comes_from_input(node.inputs[1], model.graph):
                continue
        else:
            continue
        table = node.inputs[0]
        assert table is not None
        head = next((one for one in linears if _same_bytes(one.weight, table)), None)
        found.append(Embedding(node=node, table=table, num_rows=rows, width=width, head=head))
    return found


def drop_unused(graph: ir.Graph, value: ir.Value | None) -> None:
    """Removes an initializer that nothing reads any more."""
    if (
        value is not None
        and value.name is not None
        and value.name in graph.initializers
        and not value.uses()
        and not value.is_graph_output()
    ):
        del graph.initializers[value.name]


def derived(
    graph: ir.Graph, tensor: ir.TensorProtocol, base: str, sizes: Sequence[int], make: Callable[[Any], Any]
) -> ir.Value:
    """A new initializer that is made of `tensor` when it is saved.

    Args:
        graph: gets it.
        tensor: a weight; `make` turns its array into one of `sizes` and the same type.
        base: of the name; made unique.
    """
    name = unique_name(graph, base)

    def read() -> ir.Tensor[Any]:
        return ir.Tensor(np.ascontiguousarray(make(tensor.numpy())), dtype=tensor.dtype, name=name)

    lazy = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(sizes), name=name)
    value = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(tensor.dtype), const_value=lazy)
    graph.register_initializer(value)
    return value


def unique_name(graph: ir.Graph, base: str) -> str:
    """`base`, or `base_1`, `base_2`, ... when an initializer of that name exists."""
    name, number = base, 0
    while name in graph.initializers:
        number += 1
        name = f"{base}_{number}"
    return name


def _singles(graph: ir.Graph) -> Iterator[Linear]:
    for node in graph:
        inputs = node.inputs
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
            rows, columns = _int(node, "N"), _int(node, "K")
            bias = inputs[5] if len(inputs) > 5 else None
            yield _linear(node, "MatMulNBits", inputs[1], rows, columns, bias)
        elif (held := formats.stored(node)) is not None:
            yield _linear(node, held.holder, held.weights[0], held.num_out, held.num_in, held.bias)
        elif node.op_type == "MatMul" and node.domain == "" and not _is_constant(inputs[0]) and not extends(node):
            if _is_float_matrix(inputs[1]):
                columns, rows = _dims(inputs[1])
                yield _linear(node, "MatMul", inputs[1], rows, columns, None)
            elif (source := _constant_transpose(inputs[1])) is not None:
                rows, columns = _dims(source)
                yield _linear(node, "Transpose+MatMul", source, rows, columns, None)
        elif node.op_type == "Gemm" and node.domain == "" and _is_float_matrix(inputs[1]):
            alpha, beta = (node.attributes.get(key) for key in ("alpha", "beta"))
            plain = all(one is None or one.as_float() == 1.0 for one in (alpha, beta)) and not _int(node, "transA")
            if plain and not _is_constant(inputs[0]):
                first, second = _dims(inputs[1])
                rows, columns = (first, second) if _int(node, "transB") else (second, first)
                bias = inputs[2] if len(inputs) > 2 else None
                yield _linear(node, "Gemm", inputs[1], rows, columns, bias)


def extends(node: ir.Node) -> bool:
    """Whether a product puts sums of blocks behind what it reads, for offsets of weights: its table is no weight."""
    return table_of_blocks(node) is not None


def table_of_blocks(node: ir.Node) -> ir.Value | None:
    """The table [K, E] of a product that `extends`, 1 where a column belongs to a block; None for any other node."""
    readers = node.outputs[0].consumers()
    if node.op_type != "MatMul" or len(readers) != 1 or readers[0].op_type != "Concat" or len(node.inputs) != 2:
        return None
    if list(readers[0].inputs) != [node.inputs[0], node.outputs[0]] or _int(readers[0], "axis") != -1:
        return None
    value = node.inputs[1]
    cast = value.producer() if value is not None else None
    if cast is not None and cast.op_type == "Cast":
        value = cast.inputs[0]
    table = value.const_value if value is not None else None
    if table is None or len(table.shape) != 2:
        return None
    held = table.numpy()
    is_member = bool(((held == 0) | (held == 1)).all() and (held.sum(axis=1) == 1).all())
    return value if is_member else None


def _table_behind(value: ir.Value) -> ir.Value | None:
    """The table [K, E] of the product that puts sums of blocks behind `value`, None where none does."""
    joined = value.producer()
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2 or joined.inputs[1] is None:
        return None
    sums = joined.inputs[1].producer()
    return table_of_blocks(sums) if sums is not None else None


def _linear(
    node: ir.Node, holder: str, weight: ir.Value | None, rows: int, columns: int, bias: ir.Value | None
) -> Linear:
    activation, output = node.inputs[0], node.outputs[0]
    assert activation is not None
    assert weight is not None
    if bias is None:
        bias = _added_bias(output, rows)
    return Linear(
        name=node.name or output.name or "linear",
        node=node,
        holder=holder,
        activation=activation,
        output=output,
        weight=weight,
        bias=bias,
        num_out=rows,
        num_in=columns,
    )


def _added_bias(output: ir.Value, rows: int) -> ir.Value | None:
    """The [N] initializer that the only consumer of `output` adds, None when there is no such Add."""
    consumers = output.consumers()
    if len(consumers) == 1 and consumers[0].op_type == "Add" and not output.is_graph_output():
        for value in consumers[0].inputs:
            if _is_constant(value) and value is not None and _dims(value) == (rows,):
                return value
    return None


def _join_pairs(found: list[Linear]) -> list[Linear]:
    """Sees two products with a narrow middle, which nobody else reads, as one linear."""
    by_output = {id(one.output): one for one in found}
    joined: list[Linear] = []
    absorbed: set[int] = set()
    for one in found:
        pair = _plain_pair(one, by_output) or _pair_by_outputs(one, by_output) or _pair_by_inputs(one, by_output)
        if pair is not None and pair.factors is not None:
            absorbed.add(id(pair.factors[0]))
        joined.append(pair or one)
    return [one for one in joined if id(one) not in absorbed]


def _plain_pair(second: Linear, by_output: dict[int, Linear]) -> Linear | None:
    """y = (x A) B."""
    first = by_output.get(id(second.activation))
    if first is None or len(first.output.uses()) != 1:
        return None
    return _pair(first, second, "", first.activation, second.output, second.num_out, first.num_in)


def _pair_by_outputs(second: Linear, by_output: dict[int, Linear]) -> Linear | None:
    """y = [h B, h] with h = x A."""
    first = by_output.get(id(second.activation))
    readers = second.output.consumers()
    if first is None or len(readers) != 1 or readers[0].op_type != "Concat" or second.bias is not None:
        return None
    join = readers[0]
    if list(join.inputs) != [second.output, first.output] or _int(join, "axis") != -1:
        return None
    if {id(node) for node in first.output.consumers()} != {id(second.node), id(join)}:
        return None
    num_out = second.num_out + first.num_out
    return _pair(first, second, "outputs", first.activation, join.outputs[0], num_out, first.num_in)


def _pair_by_inputs(second: Linear, by_output: dict[int, Linear]) -> Linear | None:
    """y = (x1 + x2 A) B with x = [x1, x2]."""
    add = second.activation.producer()
    if add is None or add.op_type != "Add" or len(second.activation.uses()) != 1:
        return None
    for place, value in enumerate(add.inputs):
        first = by_output.get(id(value))
        cut = first.activation.producer() if first is not None else None
        if first is None or cut is None or cut.op_type != "Split" or _int(cut, "axis") != -1 or len(cut.outputs) != 2:
            continue
        is_whole = cut.outputs[0] is add.inputs[1 - place] and cut.outputs[1] is first.activation
        if not is_whole or any(len(one.uses()) != 1 for one in (*cut.outputs, first.output)):
            continue
        source = cut.inputs[0]
        if source is not None and first.num_out == second.num_in:
            return _pair(first, second, "inputs", source, second.output, second.num_out, first.num_in + first.num_out)
    return None


def _pair(
    first: Linear,
    second: Linear,
    pivots: Literal["", "outputs", "inputs"],
    activation: ir.Value,
    output: ir.Value,
    num_out: int,
    num_in: int,
) -> Linear | None:
    """The two as one linear, unless a bias lies between or the middle is no narrower than the ends."""
    if first.bias is not None or first.num_out >= min(num_in, num_out):
        return None
    return Linear(
        name=second.name,
        node=second.node,
        holder="pair",
        activation=activation,
        output=output,
        weight=first.weight,
        bias=_added_bias(output, num_out) if pivots == "outputs" else second.bias,
        num_out=num_out,
        num_in=num_in,
        factors=(first, second),
        pivots=pivots,
    )


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    return tuple(_tensor(value).shape.numpy())


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.const_value is not None and not is_slot(value)


def is_slot(value: ir.Value | None) -> bool:
    """Whether the value is one of the two inputs of a slot for adapters, which callers fill."""
    return value is not None and value.is_graph_input() and SLOT.match(value.name or "") is not None


def _is_float_matrix(value: ir.Value | None) -> bool:
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
    return _is_constant(value) and len(_tensor(value).shape) == 2 and _tensor(value).dtype in floats


def _producer(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None
    return node


def _constant_transpose(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose" and _is_float_matrix(node.inputs[0]):
        return node.inputs[0]
    return None


def _comes_from_input(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether the indices are a graph input, at most reshaped or cast."""
    current: ir.Value | None = value
    for _ in range(8):
        if current is None or current.is_graph_input():
            return current is not None
        node = current.producer()
        if node is None or node.op_type not in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity"):
            return False
        current = node.inputs[0]
    return False


def _same_bytes(left: ir.Value, right: ir.Value) -> bool:
    """Whether two values store the same bytes: one initializer, or one behind a Reshape or Transpose of it."""
    if left is right:
        return True
    one, two = left, right
    for _ in range(2):
        node = one.producer()
        if node is not None and node.op_type == "Reshape" and node.inputs[0] is two:
            return True
        one, two = two, one
    return False


def _is_view(value: ir.Value | None) -> bool:
    """Whether the value is an initializer behind a Reshape: how a tied embedding reads the bytes of the head."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Reshape" and _is_constant(node.inputs[0])


def _int(node: ir.Node, name: str) -> int:
    attribute: Any = node.attributes.get(name)
    return 0 if attribute is None else int(attribute.as_int())
