"""Stores weights and computes activations in float16; positions, norms and masks keep the precision they need.

`dtype="bfloat16"` does the same with float32's range and eight bits of precision; ONNX Runtime has such kernels on CUDA
alone. What is said of float16 here holds for it, with its own range.

A float32 value is one of three kinds, told apart by where it comes from:

* activations: what graph inputs of type float, embedding rows and products with weights flow into. They become float16,
  and with them every Cast to float32 that an exporter wrote around norms and softmax.
* position data: float values computed from integers alone (rotary angles, masks). Angles of position 30,000 have no
  meaning in float16, so these nodes stay in float32, and one Cast follows where an activation meets them; what lies
  beyond float16's range (the -3.4e38 of a mask) is clipped there, not turned into an infinity.
* statistics of an unfused norm (Pow, ReduceMean, Sqrt and what combines them): a square overflows at 256, so the norm
  is computed in float32 between two Casts. Fused norms do so inside their kernels.

Some models have activations beyond 65,504, the end of float16's range. Where there is calibration text it is streamed
through the float32 graph first, and nodes that make or read a value beyond `margin` of that range stay in float32, as
islands between Casts, weights included. bfloat16 has float32's range and needs no such search.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnxpress.compiler.errors import PreconditionError
from onnxpress.compiler.linears import unique_name
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report, subgraphs
from onnxpress.passes.quantization import _islands

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
LARGEST = {HALF: 65504.0, BFLOAT: float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
_SAMPLE = 1 << 16  # weights per tensor on which the rounding error is measured

_STATISTICS = ("Pow", "ReduceMean", "ReduceSumSquare", "ReduceL2", "Sqrt", "Reciprocal", "Exp", "Log")
_ELEMENTWISE = (*_STATISTICS, "Add", "Sum", "Sub", "Mul", "Div", "Neg")
# Operators whose inputs must be float32 whatever the rest is, and single inputs (by index) of which that holds.
_FLOAT32_ONLY = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "Multinomial")
_FLOAT32_INPUTS: dict[str, tuple[int, ...]] = {"Resize": (1, 2), "GroupQueryAttention": (12, 13)}
_FLOAT32_OUTPUTS = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
# The input that decides the type of the first output, where it is not the first one.
_TYPE_FROM = {"Where": 1, "GatherBlockQuantized": 2, "DequantizeLinear": 1}
_INTEGER_OUTPUTS = ("Shape", "Size", "ArgMax", "ArgMin", "NonZero")
_TRUTH_OUTPUTS = ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And", "Or", "Not", "Xor", "IsNaN")
_VIEWS = ("Transpose", "Reshape", "Identity", "Slice", "Split", "Unsqueeze", "Squeeze", "Cast")
# What hands on a mask that was added to it, up to the Softmax.
_CARRIES_MASK = ("Add", "Sum", "Sub", "Where", "Min", "Max", "Concat", "Expand", *_VIEWS)
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulNBits")


def to_half(array: npt.NDArray[Any], dtype: ir.DataType = HALF) -> npt.NDArray[Any]:
    """`dtype` (float16 or bfloat16) with finite values beyond its range set to its limits; infinities and NaN stay.

    Laws: exact for every value of `dtype`; never makes a finite value infinite; monotone.
    """
    finite = np.isfinite(array)
    clipped = np.clip(array, -LARGEST[dtype], LARGEST[dtype])
    return (clipped if finite.all() else np.where(finite, clipped, array)).astype(dtype.numpy())


@dataclass(frozen=True, kw_only=True)
class CastFloat16(Pass):
    """Turns a float32 graph into float16: weights, activations, caches, float inputs and outputs.

    For the target cuda, whose attention kernels know no float32. On the CPU such a file runs, slowly. The rounding
    error of the weights is reported as `weight_error`; weights beyond float16's range are saturated and named.

    Nodes that stay in float32 are skips of the report, with a note for each value that is too large. Where the target
    has no float32 kernel for such a node, the report says so; what such a node reads is saturated.
    """

    promise: ClassVar[Promise] = Promise.LOSSY

    dtype: Literal["float16", "bfloat16"] = "float16"  # bfloat16: for large activations; runs on CUDA alone
    margin: float = 0.5  # share of float16's range; nodes around larger values on calibration text stay in float32
    keep: tuple[str, ...] = ()  # patterns of linears or nodes that stay in float32 too: "*.down", "head"
    tokens: int = 512  # of calibration text; 0: activations are not searched for large values
    length: int = 256  # tokens of a window

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 < self.margin <= 1, "margin", "above 0 and at most 1", "0.5 leaves other text a factor of two")
        self.check(self.tokens >= 0, "tokens", "0 or more", "512 shows which values are large")
        self.check(self.length >= 1, "length", "positive", "256 suits most models")

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        graph = model.graph
        if any(subgraphs(node) for node in graph):
            raise PreconditionError(
                "cast_float16: expected a graph without If, Loop and Scan", hint="export a single, unconditional graph"
            )
        types = _types(graph)
        half = HALF if self.dtype == "float16" else BFLOAT
        kept = _islands.named(model, self.keep)
        if not _has_work(graph, types, half):
            report.skip("graph", "it has no weights or activations in float32")
            return report
        if any(node.op_type == "Constant" for node in graph):
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            types = _types(graph)
        caster = _Caster(graph, types, _roles(graph, types, half), report, half)
        large = self._large(model, caster, context, report)
        islands = caster.keep_islands(kept, large, context.target.provider)
        caster.run(islands, large)
        graph.sort()
        if report.modified:
            for node in islands:
                node.metadata_props[_islands.MARK] = "1"
        return report

    def _large(self, model: ir.Model, caster: _Caster, context: Context, report: Report) -> dict[int, float]:
        """Magnitudes of activations that float16 does not hold with a margin, by id."""
        if self.dtype != "float16" or not self.tokens:
            return {}
        found = _islands.magnitudes(model, caster.to_measure(), context, report, self.tokens, self.length)
        if found:
            report.metrics["largest_activation"] = max(found.values())
        return {key: size for key, size in found.items() if size > self.margin * LARGEST[HALF]}


@dataclass
class _Roles:
    """Nodes by id: those that compute in float16, and those of them that are statistics and stay in float32."""

    activations: set[int]
    statistics: set[int]

    def is_half(self, node: ir.Node) -> bool:
        return id(node) in self.activations and id(node) not in self.statistics


def _types(graph: ir.Graph) -> dict[int, ir.DataType | None]:
    """Element type of every value by id; what the graph does not declare follows from the operator."""
    types: dict[int, ir.DataType | None] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        types[id(value)] = value.const_value.dtype if value.const_value is not None else value.dtype
    for node in graph:
        source = node.inputs[_TYPE_FROM.get(node.op_type, 0)] if node.inputs else None
        inferred = types.get(id(source)) if source is not None else None
        if node.op_type == "Cast":
            inferred = ir.DataType(node.attributes["to"].as_int())
        elif node.op_type in _INTEGER_OUTPUTS:
            inferred = ir.DataType.INT64
        elif node.op_type in _TRUTH_OUTPUTS:
            inferred = ir.DataType.BOOL
        elif node.op_type in _FLOAT32_OUTPUTS:
            inferred = FLOAT
        elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
            inferred = node.attributes["value"].as_tensor().dtype
        elif node.op_type == "ConstantOfShape":
            inferred = FLOAT
        for value in node.outputs:
            types[id(value)] = value.dtype if value.dtype is not None else inferred
    return types


def _has_work(graph: ir.Graph, types: dict[int, ir.DataType | None], half: ir.DataType) -> bool:
    """Whether a float32 input, weight matrix or embedding is left; what this pass leaves in float32 does not count."""
    roles = _roles(graph, types, half)
    if any(types[id(value)] == FLOAT for value in graph.inputs if value.const_value is None):
        return True
    return any(
        types.get(id(value)) == FLOAT and _is_constant(value) and index not in _FLOAT32_INPUTS.get(node.op_type, ())
        for node in graph
        if roles.is_half(node) and node.op_type != "Cast"
        for index, value in enumerate(node.inputs)
        if value is not None
    )


def _roles(graph: ir.Graph, types: dict[int, ir.DataType | None], half: ir.DataType) -> _Roles:
    opset = graph.opset_imports.get("", 18)
    flowing = {id(value) for value in graph.inputs if _is_float(types[id(value)]) and value.const_value is None}
    activations: set[int] = set()
    statistics: set[int] = set()
    reduced: set[int] = set()  # values that a statistic made and nothing has joined with its operand again
    for node in graph:
        fed = any(value is not None and id(value) in flowing for value in node.inputs)
        if not (fed or _starts(node, types)):
            continue
        outputs = [value for value in node.outputs if _is_float(types.get(id(value)))]
        if not outputs and node.op_type not in _FLOAT32_ONLY:
            if any(value is not None and id(value) in flowing for value in node.inputs):
                activations.add(id(node))  # compares or counts activations
            continue
        activations.add(id(node))
        flowing.update(id(value) for value in outputs)
        derived = [value for value in node.inputs if value is not None and id(value) in reduced]
        if node.op_type in _STATISTICS or (derived and node.op_type in _ELEMENTWISE):
            statistics.add(id(node))
            joined = any(
                value is not None and id(value) in flowing and id(value) not in reduced for value in node.inputs
            )
            if not (joined and derived):
                reduced.update(id(value) for value in outputs)
        elif derived and node.op_type == "Cast":
            reduced.update(id(value) for value in outputs)
            statistics.add(id(node))
        elif node.op_type in _FLOAT32_ONLY or not _takes(node.domain, node.op_type, opset, half):
            statistics.add(id(node))
        if _islands.MARK in node.metadata_props:
            statistics.add(id(node))
    return _Roles(activations, statistics)


@functools.cache
def _takes(domain: str, op_type: str, opset: int, half: ir.DataType) -> bool:
    """Whether the opset lets the operator compute in `half`: Conv knows bfloat16 from 22 on, TopK from 24."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return True  # not ONNX's own: ONNX Runtime says so when it has no such kernel
    return any(f"tensor({half.name.lower()})" in one.types for one in (*schema.inputs, *schema.outputs))


def _starts(node: ir.Node, types: dict[int, ir.DataType | None]) -> bool:
    """Whether activations begin at this node: rows or a view of a weight matrix, or a product with one."""
    if node.op_type == "GatherBlockQuantized":
        return True
    if node.op_type == "Gather" or node.op_type in _VIEWS:
        return _is_matrix(node.inputs[0], types)
    return node.op_type in _PRODUCTS and any(_is_matrix(value, types) for value in node.inputs[:3])


def _is_matrix(value: ir.Value | None, types: dict[int, ir.DataType | None]) -> bool:
    """Whether the value is a float constant with at least two sizes above one (a rotary frequency vector is not)."""
    if value is None or not _is_constant(value) or not _is_float(types.get(id(value))):
        return False
    assert value.const_value is not None
    return sum(int(size) > 1 for size in value.const_value.shape.numpy()) >= 2


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.producer() is None


def _is_float(dtype: ir.DataType | None) -> bool:
    return dtype in (FLOAT, HALF, BFLOAT)


class _Caster:
    """One run over a graph."""

    def __init__(
        self,
        graph: ir.Graph,
        types: dict[int, ir.DataType | None],
        roles: _Roles,
        report: Report,
        half: ir.DataType,
    ) -> None:
        self.graph, self.types, self.roles, self.report, self.half = graph, types, roles, report, half
        self.largest = LARGEST[half]
        self.made: dict[tuple[int, ir.DataType], ir.Value] = {}
        self.squared_error = self.squared_norm = 0.0

    def to_measure(self) -> list[ir.Value]:
        """Activations that are to become float16, and those in float32 that become it where they are read.

        Masks and what they were added to are saturated, so their size does not matter.
        """
        masked = self._far_reaching(list(self.graph))
        found = []
        for node in self.graph:
            if id(node) not in self.roles.activations:
                continue
            if node.op_type in _CARRIES_MASK and any(one is not None and id(one) in masked for one in node.inputs):
                masked.update(id(value) for value in node.outputs)
            found += [
                value
                for value in node.outputs
                if self.types.get(id(value)) == FLOAT
                and id(value) not in masked
                and (_is_used(value) and any(self.roles.is_half(one) for one in (node, *value.consumers())))
            ]
        return found

    def keep_islands(self, kept: Iterable[ir.Node], large: dict[int, float], provider: str) -> list[ir.Node]:
        """Takes out of the float16 nodes those in `kept` and those around `large` values; reports and returns them."""
        nodes = [node for node in self.graph if id(node) in self.roles.activations]
        islands: dict[int, ir.Node] = {}
        stuck: set[int] = set()

        def add(node: ir.Node, reason: str) -> None:
            if _islands.is_half_only(node, provider):
                if id(node) not in stuck:
                    self.report.skip(_label(node), f"{node.op_type} has no float32 kernel on {provider}: may overflow")
                stuck.add(id(node))
            elif self.roles.is_half(node):
                islands[id(node)] = node
                self.roles.statistics.add(id(node))
                self.report.skip(_label(node), reason)

        for node in kept:
            add(node, "kept in float32, as asked for")
        for maker in nodes:
            for value in maker.outputs:
                if id(value) not in large:
                    continue
                self.report.notes.append(f"{value.name} of {_label(maker)}: up to {large[id(value)]:.3g} on the text")
                for node in (maker, *value.consumers()):
                    add(node, "kept in float32, since what it makes or reads is too large for float16")
        if islands:
            outputs = {id(value) for value in self.graph.outputs if id(value) not in large}
            for node in _islands.fewer_casts(nodes, self.roles.is_half, self._flows, outputs):
                add(node, "kept in float32, between others that are")
            self.report.metrics["float32_nodes"] = len(islands)
        return list(islands.values())

    def _flows(self, value: ir.Value) -> bool:
        return not _is_constant(value) and _is_float(self.types.get(id(value)))

    def run(self, islands: Iterable[ir.Node] = (), large: Iterable[int] = ()) -> None:
        """Converts inputs, nodes and constants, then ties float32 and float16 parts together with Casts.

        Args:
            islands: nodes that stay in float32; outputs of the graph that they make are converted.
            large: ids of activations beyond float16's range, which stay infinite nowhere.
        """
        nodes = list(self.graph)
        wide = self._far_reaching(nodes) | set(large)
        for value in self.graph.inputs:
            if self.types[id(value)] == FLOAT and value.const_value is None:
                self._retype(value)
                self.report.change(f"input {value.name}")
        for node in nodes:
            if self.roles.is_half(node):
                self._convert(node)
        self._convert_constants(nodes)
        for node in nodes:
            self._connect(node, wide)
        makers = {id(node) for node in islands}
        for index, value in enumerate(self.graph.outputs):
            maker = value.producer()
            is_cache = "present" in (value.name or "")  # the next step reads it as its past, which is float16
            if id(maker) in makers and self.types.get(id(value)) == FLOAT and (is_cache or id(value) not in wide):
                self._convert_output(index, value, wide=id(value) in wide)
        for value in self.graph.outputs:
            maker = value.producer()
            if maker is not None and id(maker) in self.roles.statistics and self.types.get(id(value)) == FLOAT:
                self.report.skip(f"output {value.name}", "computed in float32")
        if self.squared_norm:
            self.report.metrics["weight_error"] = float(np.sqrt(self.squared_error / self.squared_norm))

    def _far_reaching(self, nodes: Iterable[ir.Node]) -> set[int]:
        """Position values that a constant beyond float16's range flows into."""
        wide: set[int] = set()
        for value in self.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype == FLOAT and tensor.size <= 1 << 16:
                array = tensor.numpy()
                if _beyond(array, self.largest):
                    wide.add(id(value))
        for node in nodes:
            if id(node) in self.roles.activations:
                continue
            fill = node.attributes.get("value")
            is_wide = (
                node.op_type == "ConstantOfShape"
                and fill is not None
                and _beyond(fill.as_tensor().numpy(), self.largest)
            )
            if is_wide or any(value is not None and id(value) in wide for value in node.inputs):
                wide.update(id(value) for value in node.outputs)
        return wide

    def _retype(self, value: ir.Value) -> None:
        self.types[id(value)] = self.half
        value.type = ir.TensorType(self.half)

    def _convert(self, node: ir.Node) -> None:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self.half))
        for value in node.outputs:
            if self.types.get(id(value)) == FLOAT:
                self._retype(value)
                if value.is_graph_output():
                    self.report.change(f"output {value.name}")

    def _convert_output(self, index: int, value: ir.Value, *, wide: bool) -> None:
        """Puts a Cast behind an output of an island; the name goes with it."""
        name, value.name = value.name, f"{value.name}.float"
        cast = self._cast(value, self.half, wide)
        cast.name = name
        self.graph.outputs[index] = cast
        self.report.change(f"output {name}")

    def _convert_constants(self, nodes: Iterable[ir.Node]) -> None:
        """float32 constants that only float16 nodes read change in place; others get a float16 twin."""
        readers: dict[int, list[tuple[ir.Node, int]]] = {}
        constants: dict[int, ir.Value] = {}
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and _is_constant(value) and self.types.get(id(value)) == FLOAT:
                    constants[id(value)] = value
                    readers.setdefault(id(value), []).append((node, index))
        for key, value in constants.items():
            wanting = [(node, index) for node, index in readers[key] if self._wants(node, index) == self.half]
            if not wanting:
                continue
            tensor = value.const_value
            assert tensor is not None
            self._weigh(value.name or "constant", tensor)
            alone = len(wanting) == len(readers[key]) and not value.is_graph_output()
            name = (value.name or "") if alone else unique_name(self.graph, f"{value.name}.{self.half.name.lower()}")
            half = _lazy_half(tensor, name, self.half)
            if alone:
                value.const_value = half
                self._retype(value)
            else:
                twin = ir.Value(
                    name=name, shape=ir.Shape(half.shape.numpy()), type=ir.TensorType(self.half), const_value=half
                )
                self.graph.register_initializer(twin)
                self.types[id(twin)] = self.half
                for node, index in wanting:
                    node.replace_input_with(index, twin)
            self.report.change(f"weight {name}" if tensor.size > 1 else f"constant {name}")

    def _weigh(self, name: str, tensor: ir.TensorProtocol) -> None:
        """Adds to the rounding error, on a sample; names weights that float16 cannot hold."""
        if tensor.size <= 1:
            return
        array = tensor.numpy().reshape(-1)
        if not np.isfinite([array.min(), array.max()]).all() or max(-array.min(), array.max()) > self.largest:
            count = int((~(np.abs(array) <= self.largest)).sum())
            self.report.metrics["overflows"] = self.report.metrics.get("overflows", 0.0) + count
            self.report.skip(
                f"values of {name}", f"{count} lie beyond {self.half.name.lower()}'s range; finite ones were saturated"
            )
            return
        sample = array[:: max(1, array.size // _SAMPLE)].astype(np.float64)
        weight = array.size / sample.size
        self.squared_norm += weight * float(sample @ sample)
        error = to_half(sample, self.half) - sample
        self.squared_error += weight * float(error @ error)

    def _wants(self, node: ir.Node, index: int) -> ir.DataType | None:
        """The float type in which `node` takes input `index`."""
        if index in _FLOAT32_INPUTS.get(node.op_type, ()) or not self.roles.is_half(node):
            return FLOAT
        return self.half

    def _connect(self, node: ir.Node, wide: set[int]) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or not _is_float(self.types.get(id(value))) or node.op_type == "Cast":
                continue
            if id(node) not in self.roles.activations and not self._mixes(node):
                continue
            wanted = self._wants(node, index)
            if wanted is not None and self.types[id(value)] != wanted:
                node.replace_input_with(index, self._cast(value, wanted, id(value) in wide))

    def _mixes(self, node: ir.Node) -> bool:
        """Whether a node outside the activations reads a value that has become float16 (a float graph input)."""
        return any(value is not None and self.types.get(id(value)) == self.half for value in node.inputs)

    def _cast(self, value: ir.Value, dtype: ir.DataType, wide: bool) -> ir.Value:
        """`value` in another float type, made once."""
        if (id(value), dtype) not in self.made:
            source = value
            nodes = []
            if wide and dtype == self.half:
                bounds = [self._bound(-self.largest), self._bound(self.largest)]
                clip = ir.node("Clip", [value, *bounds], name=f"{value.name}/saturate")
                source = clip.outputs[0]
                source.name, source.shape, source.dtype = f"{value.name}/saturated", value.shape, FLOAT
                nodes.append(clip)
            cast = ir.node("Cast", [source], {"to": int(dtype)}, name=f"{value.name}/{dtype.name.lower()}")
            cast.outputs[0].name = f"{value.name}.{dtype.name.lower()}"
            cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, dtype
            self.types[id(cast.outputs[0])] = dtype
            self.graph.extend([*nodes, cast])
            self.made[id(value), dtype] = cast.outputs[0]
        return self.made[id(value), dtype]

    def _bound(self, number: float) -> ir.Value:
        name = f"{self.half.name.lower()}.{'largest' if number > 0 else 'smallest'}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(number, np.float32), name=name)
            value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(FLOAT), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _is_used(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


def _label(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _beyond(array: npt.NDArray[Any], largest: float) -> bool:
    return bool((np.isfinite(array) & (np.abs(array) > largest)).any())


def _lazy_half(tensor: ir.TensorProtocol, name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    """The tensor in `dtype`; large ones are converted when they are saved."""
    if tensor.size <= 1 << 12:
        return ir.Tensor(to_half(tensor.numpy(), dtype), dtype=dtype, name=name)

    def read() -> ir.Tensor[Any]:
        return ir.Tensor(to_half(tensor.numpy(), dtype), dtype=dtype, name=name)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
