"""Random small networks for the contract tests: any earlier value may feed any later step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import strategies as st

from onnxpress.compiler.calibration_text import feeds

Array = npt.NDArray[Any]
STEPS = (
    "linear",
    "transposed",
    "biased",
    "norm",
    "silu",
    "gated",
    "residual",
    "double_transpose",
    "identity",
    "constant",
)


class Builder:
    """A graph under construction; every value on the stream has shape [batch, sequence, width]."""

    def __init__(self, width: int, vocabulary: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.width, self.vocabulary = width, vocabulary
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []
        self.ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])

    def weight(self, *shape: int, name: str = "w", scale: float = 0.3) -> ir.Value:
        array = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        return self.const(array, f"{name}{len(self.weights)}")

    def const(self, array: Array, name: str) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.weights.append(value)
        return value

    def op(self, kind: str, *inputs: ir.Value, width: int | None = None, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes or None, name=f"n{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        node.outputs[0].dtype = ir.DataType.FLOAT
        if width is not None:
            node.outputs[0].shape = ir.Shape(["batch", "sequence", width])
        self.nodes.append(node)
        return node.outputs[0]

    def scalar(self, number: float) -> ir.Value:
        return self.const(np.array(number, np.float32), f"s{len(self.weights)}")

    def axes(self, *numbers: int) -> ir.Value:
        return self.const(np.array(numbers, np.int64), f"a{len(self.weights)}")

    def norm(self, x: ir.Value, epsilon: float = 1e-5) -> ir.Value:
        square = self.op("Pow", x, self.scalar(2.0), width=self.width)
        mean = self.op("ReduceMean", square, self.axes(-1), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.scalar(epsilon)))
        unit = self.op("Mul", x, self.op("Reciprocal", root), width=self.width)
        return self.op("Mul", self.weight(self.width, scale=1.0), unit, width=self.width)

    def step(self, kind: str, x: ir.Value, y: ir.Value) -> ir.Value:
        w = self.width
        if kind == "linear":
            return self.op("MatMul", x, self.weight(w, w), width=w)
        if kind == "transposed":
            turned = self.op("Transpose", self.weight(w, w), perm=[1, 0])
            return self.op("MatMul", x, turned, width=w)
        if kind == "biased":
            return self.op("Add", self.op("MatMul", x, self.weight(w, w), width=w), self.weight(w), width=w)
        if kind == "norm":
            return self.norm(x)
        if kind == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x, width=w), width=w)
        if kind == "gated":
            gate = self.op("MatMul", x, self.weight(w, 2 * w), width=2 * w)
            up = self.op("MatMul", x, self.weight(w, 2 * w), width=2 * w)
            silu = self.op("Mul", gate, self.op("Sigmoid", gate, width=2 * w), width=2 * w)
            return self.op("MatMul", self.op("Mul", silu, up, width=2 * w), self.weight(2 * w, w), width=w)
        if kind == "residual":
            return self.op("Add", x, y, width=w)
        if kind == "double_transpose":
            return self.op("Transpose", self.op("Transpose", x, perm=[0, 2, 1]), perm=[0, 2, 1], width=w)
        if kind == "identity":
            return self.op("Identity", x, width=w)
        return self.op("Add", x, self.op("Mul", self.scalar(0.5), self.scalar(0.25)), width=w)

    def finish(self, last: ir.Value, tied: bool, table: ir.Value) -> ir.Model:
        if tied:
            head = self.op("Transpose", table, perm=[1, 0])
        else:
            head = self.weight(self.width, self.vocabulary)
        logits = self.op("MatMul", last, head, width=self.vocabulary)
        logits.name = "logits"
        graph = ir.Graph(
            [self.ids], [logits], nodes=self.nodes, initializers=self.weights, opset_imports={"": 18}, name="random"
        )
        return ir.Model(graph, ir_version=9)


@st.composite
def models(draw: st.DrawFn) -> ir.Model:
    """A network of an embedding, up to seven random steps, and a head that may be tied to the embedding."""
    width = draw(st.sampled_from([32, 64]))
    builder = Builder(width, 96, draw(st.integers(0, 2**31 - 1)))
    table = builder.weight(96, width, name="table", scale=1.0)
    values = [builder.op("Gather", table, builder.ids, width=width, axis=0)]
    kinds = draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=7))
    for kind in kinds:
        x = values[draw(st.integers(0, len(values) - 1))] if len(values) > 1 else values[0]
        values.append(builder.step(kind, x, values[-1]))
    return builder.finish(values[-1], draw(st.booleans()), table)


def session(model: ir.Model) -> ort.InferenceSession:
    """`model` in ONNX Runtime, graph optimizations off, one thread."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def run(model: ir.Model, feeds: dict[str, Array] | None = None) -> dict[str, Array]:
    """Outputs by name of one run of `model`."""
    running = session(model)
    given = {"input_ids": np.random.default_rng(0).integers(0, 96, (2, 5))} if feeds is None else feeds
    names = [one.name for one in running.get_outputs()]
    wanted = {one.name for one in running.get_inputs()}
    return dict(zip(names, running.run(names, {k: v for k, v in given.items() if k in wanted}), strict=True))


def logits(model: ir.Model, ids_WS: Array | None = None) -> Array:
    """Of a decoder on windows of tokens, random ones by default [W, S, V]."""
    inputs = feeds(model.graph, np.random.default_rng(9).integers(3, 200, (4, 48)) if ids_WS is None else ids_WS)
    running = session(model)
    return np.concatenate([running.run(["logits"], window)[0] for window in inputs])


def text(model: ir.Model) -> bytes:
    """The model serialized, weights included; equal bytes mean an unchanged model."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


_BRANCHING = """<ir_version: 7, opset_import: ["": 11]>
branching (float[?, ?] sound, float[?, 56] state, bool flag) => (float[n, 40] likely, float[n, 64] features) {
    kernel = Constant <value = float {0}> ()
    classes = Constant <value = float {0}> ()
    lifted = Unsqueeze <axes = [1]> (sound)
    waves = Conv <strides = [16]> (lifted, kernel)
    half_waves = Relu (waves)
    means = ReduceMean <axes = [-1], keepdims = 0> (half_waves)
    pooled = Concat <axis = -1> (means, state)
    chosen = If (flag) <
        then_branch = then () => (float[n, 64] turned) {
            inner_weight = Constant <value = float {0}> ()
            turned = MatMul (pooled, inner_weight)
        },
        else_branch = else () => (float[n, 64] same) { same = Identity (pooled) }
    >
    scores = MatMul (chosen, classes)
    likely = Softmax <axis = -1> (scores)
    features = Identity (pooled)
}"""


def branching() -> ir.Model:
    """A convolution, a branch with a product and one that hands on a value from around it, and a classifier; inputs and
    weights as old exporters write them: sizes without names, weights in Constant nodes and inside of the branches."""
    model, rng = ir.from_onnx_text(_BRANCHING), np.random.default_rng(0)
    shapes = {"kernel": (8, 1, 32), "classes": (64, 40), "inner_weight": (64, 64)}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant":
            array = (rng.standard_normal(shapes[node.outputs[0].name or ""]) * 0.2).astype(np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, name=node.outputs[0].name))
    return model
