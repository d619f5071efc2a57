"""Cuts a region out of a graph, runs it, and compares it with what is to replace it.

A fusion proposes: "the nodes between these inputs and these outputs compute the same as those new nodes". Whether that
is so is decided by execution: both forms run in ONNX Runtime (optimizations off, one thread) on random inputs. Equal
regions of other layers are recognised by their signature and not run again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

# Weights above this many bytes do not belong into a region: its inputs were chosen too far up.
_LARGEST_CONSTANT = 64 << 20
_FAR = 4000  # nodes of a region


class NotCuttable(Exception):  # noqa: N818  (a finding, reported as the reason of a skip)
    """The region reaches something it must not contain; the message says what."""


class Region:
    """The nodes that compute `outputs` from `inputs`, the graph's own inputs and constants.

    Attributes:
        nodes: in topological order.
        leaves: the values a run must be fed with: `inputs`, graph inputs that are reached, and activations of which
            only the shape is read.
    """

    def __init__(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> None:
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.nodes: list[ir.Node] = []
        self.leaves: list[ir.Value] = list(dict.fromkeys(inputs))
        self.constants: list[ir.Value] = []
        self._collect()

    def _collect(self) -> None:
        stops = {id(value) for value in self.inputs}
        seen: set[int] = set()
        order: list[ir.Node] = []
        known = set(stops)

        def add_leaf(value: ir.Value) -> None:
            if id(value) not in known:
                known.add(id(value))
                self.leaves.append(value)

        # Depth first with an explicit stack: graphs of some thousand nodes overflow Python's own.
        stack: list[tuple[ir.Node, bool]] = []

        def visit(value: ir.Value | None, reader: ir.Node | None) -> None:
            if value is None or id(value) in stops:
                return
            node = value.producer()
            if node is None:
                if value.const_value is None:
                    add_leaf(value)
                elif id(value) not in known:
                    known.add(id(value))
                    if value.const_value.nbytes > _LARGEST_CONSTANT:
                        raise NotCuttable(f"reaches the weight {value.name}")
                    self.constants.append(value)
                return
            if reader is not None and reader.op_type == "Shape" and _is_activation(value):
                add_leaf(value)
                return
            if id(node) not in seen:
                stack.append((node, False))

        for value in self.outputs:
            visit(value, None)
            while stack:
                node, done = stack.pop()
                if done:
                    order.append(node)
                    continue
                if id(node) in seen:
                    continue
                seen.add(id(node))
                if len(seen) > _FAR:
                    raise NotCuttable("reaches too far up")
                stack.append((node, True))
                for value_in in node.inputs:
                    visit(value_in, node)
        self.nodes = order

    def signature(self, apart: Collection[ir.Value] = ()) -> str:
        """Equal for regions that compute the same function of equally shaped inputs.

        Args:
            apart: weights of which only type and shape count.
        """
        ignored = {id(value) for value in apart}
        number = {id(value): index for index, value in enumerate(self.leaves)}
        digest = hashlib.sha256()
        for node in self.nodes:
            digest.update(f"{node.domain}:{node.op_type}".encode())
            for name in sorted(node.attributes):
                attribute = node.attributes[name]
                is_tensor = attribute.type == ir.AttributeType.TENSOR
                digest.update(f"{name}={attribute.value.tobytes() if is_tensor else attribute.value}".encode())
            for value in node.inputs:
                if value is None:
                    digest.update(b"-")
                elif id(value) in number:
                    digest.update(str(number[id(value)]).encode())
                elif value.const_value is not None:
                    tensor = value.const_value
                    digest.update(f"{tensor.dtype}{tensor.shape}".encode())
                    if tensor.size <= 64 or id(value) not in ignored:
                        digest.update(tensor.tobytes())
            for value in node.outputs:
                number[id(value)] = len(number)
        for value in self.outputs:
            digest.update(f">{number.get(id(value))}".encode())
        for leaf in self.leaves:
            digest.update(f"{leaf.dtype}{_rank_and_width(leaf)}".encode())
        return digest.hexdigest()

    def model(self) -> ir.Model:
        """The region as a model of its own; leaves become inputs."""
        return build_model(self.nodes, self.leaves, self.outputs, self.constants)

    def depends_on(self, value: ir.Value) -> bool:
        """Whether `value` is among the leaves."""
        return any(leaf is value for leaf in self.leaves)


def build_model(
    nodes: Iterable[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    constants: Sequence[ir.Value] = (),
    opset: int = 18,
    dtypes: Mapping[int, ir.DataType] = MappingProxyType({}),
) -> ir.Model:
    """A model of copies of `nodes`; inputs are called i0, i1, ..., outputs o0, o1, ... in the order given.

    Args:
        nodes: in topological order.
        inputs: what they read; of a weight the input gets type and shape, of any other value type and rank.
        outputs: made by the nodes, or inputs.
        constants: what else is read.
        opset: of `ai.onnx`.
        dtypes: of inputs, by id; where nothing is known an input is float.
    """
    nodes = list(nodes)
    copies: dict[int, ir.Value] = {}
    graph_inputs = []
    for index, value in enumerate(inputs):
        weight = value.const_value
        dtype = dtypes.get(id(value)) or (value.dtype if weight is None else weight.dtype) or ir.DataType.FLOAT
        copy = ir.Value(name=f"i{index}", type=ir.TensorType(dtype))
        if weight is not None:
            copy.shape = ir.Shape(weight.shape.numpy())
        elif value.shape is not None:
            copy.shape = ir.Shape([None] * len(value.shape))
        copies[id(value)] = copy
        graph_inputs.append(copy)
    initializers = []
    for index, value in enumerate(_constants_of(nodes, copies, constants)):
        tensor = value.const_value
        assert tensor is not None
        # In memory: a model that is loaded from bytes may not point to external files.
        inline = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=f"c{index}")
        copy = ir.Value(name=f"c{index}", shape=inline.shape, type=ir.TensorType(inline.dtype), const_value=inline)
        copies[id(value)] = copy
        initializers.append(copy)
    new_nodes: list[ir.Node] = []
    for node in nodes:
        operands = [None if value is None else copies[id(value)] for value in node.inputs]
        new = ir.Node(
            node.domain, node.op_type, operands, list(node.attributes.values()), num_outputs=len(node.outputs)
        )
        for index, (old, fresh) in enumerate(zip(node.outputs, new.outputs, strict=True)):
            fresh.name = "" if old.name == "" else f"v{len(new_nodes)}_{index}"
            copies[id(old)] = fresh
        new_nodes.append(new)
    graph_outputs = []
    for index, value in enumerate(outputs):
        copy = copies[id(value)]
        if copy.producer() is None:  # an input handed through
            identity = ir.Node("", "Identity", [copy])
            new_nodes.append(identity)
            copy = identity.outputs[0]
        copy.name = f"o{index}"
        graph_outputs.append(copy)
    graph = ir.Graph(
        graph_inputs,
        graph_outputs,
        nodes=new_nodes,
        initializers=initializers,
        opset_imports={"": opset, "com.microsoft": 1},
        name="region",
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, feeds: Sequence[Array]) -> list[Array]:
    """Runs a small model on the CPU, optimizations off, one thread; `feeds` in the order of its inputs."""
    return session(model)(feeds)


def session(model: ir.Model) -> Callable[[Sequence[Array]], list[Array]]:
    """A function that runs `model` on arrays given in the order of its inputs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    running = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in running.get_inputs()]
    wanted = set(names)

    def call(feeds: Sequence[Array]) -> list[Array]:
        fed = {f"i{index}": array for index, array in enumerate(feeds) if f"i{index}" in wanted}
        return list(running.run(None, fed))

    return call


class Sample(list[Array]):
    """One set of inputs; `carry` says which of them (by place) are the previous sample's outputs (by index).

    Each of two compared models carries its own outputs over, as a cache is.
    """

    def __init__(self, arrays: Sequence[Array], carry: Mapping[int, int]) -> None:
        super().__init__(arrays)
        self.carry = dict(carry)

    def after(self, outputs: Sequence[Array]) -> list[Array]:
        """The inputs once `outputs` of the previous sample are known."""
        return [outputs[self.carry[place]] if place in self.carry else one for place, one in enumerate(self)]


def disagreement(
    old: ir.Model,
    new: ir.Model,
    feeds: Iterable[Sequence[Array]],
    tolerance: float,
    valid: Callable[..., Any] | None = None,
) -> str | None:
    """None when both models give the same outputs on all `feeds`, else what differs first.

    Args:
        old, new: models with inputs and outputs in the same order.
        feeds: lists of arrays.
        tolerance: largest difference allowed, relative to the largest output.
        valid: `valid(feed, index, array)` masks out what may differ (rows of padding tokens).
    """
    try:
        run_old, run_new = session(old), session(new)
    except Exception as error:  # ORT has one exception type per C++ code; all mean "this form does not load"
        return f"does not load: {first_line(error)}"
    want: list[Array] = []
    got: list[Array] = []
    for number, feed in enumerate(feeds):
        feed_old, feed_new = (feed.after(want), feed.after(got)) if isinstance(feed, Sample) else (feed, feed)
        try:
            want = run_old(feed_old)
        except Exception as error:
            return f"the original does not run on sample {number}: {first_line(error)}"
        try:
            got = run_new(feed_new)
        except Exception as error:
            return f"the fused form does not run on sample {number}: {first_line(error)}"
        for index, (one, two) in enumerate(zip(want, got, strict=True)):
            if one.shape != two.shape:
                return f"output {index} of sample {number}: shape {one.shape} became {two.shape}"
            if valid is not None:
                one, two = valid(feed, index, one), valid(feed, index, two)
            scale = max(float(np.abs(one).max(initial=0.0)), 1e-6)
            worst = float(np.abs(one.astype(np.float64) - two).max(initial=0.0)) / scale
            if not worst <= tolerance:
                return f"output {index} of sample {number}: differs by {worst:.1e} of its largest value"
    return None


def random_feed(
    leaves: Sequence[ir.Value], dims: Mapping[str, int], rng: np.random.Generator, given: Mapping[int, Array]
) -> list[Array]:
    """Arrays for `leaves`: those in `given` (by id), normal numbers for floats, zeros for other integers.

    An unknown size is the batch at axis 0, the sequence at axis 1 of rank 2 and 3, taken from `dims`.
    """
    feed: list[Array] = []
    for leaf in leaves:
        if id(leaf) in given:
            feed.append(given[id(leaf)])
            continue
        shape = leaf.shape
        if shape is None:
            raise NotCuttable("the shape of what it reads is unknown, so no samples can be made")
        sizes = [
            size if isinstance(size, int) else (dims["batch"] if axis == 0 else dims["sequence"])
            for axis, size in enumerate(shape)
        ]
        dtype = (leaf.dtype or ir.DataType.FLOAT).numpy()
        is_float = (leaf.dtype or ir.DataType.FLOAT).is_floating_point()
        feed.append(rng.standard_normal(sizes).astype(dtype) if is_float else np.zeros(sizes, dtype))
    return feed


# What lies between the size of an activation and a number that is computed from it.
SIZE_ARITHMETIC = (
    *("Sqrt", "Div", "Mul", "Pow", "Reciprocal", "Cast"),
    *("Gather", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Concat"),
)
# Unknown sizes are given such values in turn: one number for all of them does not depend on any.
_SMALL, _LARGE = (2, 3), 4099


def sized_number(value: ir.Value | None) -> float | None:
    """The number that `value` always holds because it is computed from known sizes and constants alone, else None."""
    asked: list[ir.Value] = []
    queue, seen = [value], set()
    while queue:
        node = None if (one := queue.pop()) is None else one.producer()
        if one is None or id(one) in seen:
            continue
        if one.const_value is not None and not one.is_graph_input() and (node is None or node.op_type == "Constant"):
            continue
        seen.add(id(one))
        if node is not None and node.op_type == "Shape" and node.inputs[0] is not None:
            asked.append(node.inputs[0])
        elif node is not None and node.op_type in SIZE_ARITHMETIC and len(seen) < 24:
            queue += node.inputs
        else:
            return None
    if value is None or value.producer() is None:
        return None
    try:
        region = Region(asked, [value])
        graph = region.nodes[0].graph
        opset = 18 if graph is None else graph.opset_imports.get("", 18)
        model = build_model(region.nodes, region.leaves, region.outputs, region.constants, opset)
        for leaf in model.graph.inputs:  # only asked for its size: of a type that numpy knows
            leaf.dtype = ir.DataType.FLOAT
        results = {_of_sizes(model, region.leaves, small) for small in _SMALL}
        axes = max((len(leaf.shape or ()) for leaf in region.leaves), default=0)
        results |= {_of_sizes(model, region.leaves, _SMALL[0], large) for large in range(axes)}
    except NotCuttable:
        return None
    number = results.pop() if len(results) == 1 else None
    return number if number is not None and math.isfinite(number) else None


def _of_sizes(model: ir.Model, leaves: Sequence[ir.Value], small: int, large_axis: int = -1) -> float | None:
    """The single number `model` gives for inputs of the leaves' shapes; None when it is more than one, or none.

    Unknown sizes are `small` plus their axis, and `_LARGE` at `large_axis`.
    """
    feeds = []
    for leaf in leaves:
        if leaf.shape is None:
            raise NotCuttable("the shape of what it reads is unknown, so no samples can be made")
        tried = [_LARGE if axis == large_axis else small + axis for axis in range(len(leaf.shape))]
        sizes = [size if isinstance(size, int) else one for size, one in zip(leaf.shape, tried, strict=True)]
        feeds.append(np.zeros(sizes, np.float32))
    try:
        (result,) = run(model, feeds)
    except Exception as error:  # ONNX Runtime's exceptions have no common type
        raise NotCuttable(f"does not run: {first_line(error)}") from None
    return float(result.reshape(-1)[0]) if result.size == 1 else None


def first_line(error: BaseException) -> str:
    """An exception's first line, at most 160 characters; of ONNX Runtime's what follows the name of the node."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split("Status Message: ")[-1][:160]


def _constants_of(
    nodes: Sequence[ir.Node], copies: Mapping[int, ir.Value], constants: Sequence[ir.Value]
) -> list[ir.Value]:
    found = {id(value): value for value in constants}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.producer() is None:
                found.setdefault(id(value), value)
    return [value for key, value in found.items() if key not in copies]


def _is_activation(value: ir.Value) -> bool:
    """A float value of rank 3: of the stream [batch, sequence, width] only batch and sequence can be asked for."""
    is_float = value.dtype is None or value.dtype.is_floating_point()
    if not is_float or value.shape is None or len(value.shape) != 3:
        return False
    # Where batch and heads were folded into one axis: keys [batch heads, width, total], and products of activations.
    are_keys = isinstance(value.shape[1], int) and not isinstance(value.shape[2], int)
    node = value.producer()
    factor = node.inputs[1] if node is not None and node.op_type == "MatMul" else None
    is_product = factor is not None and factor.shape is not None and len(factor.shape) > 2
    return not are_keys and not is_product


def _rank_and_width(value: ir.Value) -> str:
    if value.shape is None:
        return "?"
    return ",".join(str(size) if isinstance(size, int) else "_" for size in value.shape)
