"""Both views of the graph, on real exports of small random decoders, before and after fusion."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.blocks import _dominator_tree, find_blocks
from onnxpress.compiler.linears import find_embeddings, find_linears, unique_name
from onnxpress.compiler.pass_ import Context
from onnxpress.models.source import Source

Export = Callable[[str, str], Path]


def load(path: Path, work: Path) -> Source:
    return models.load(path, work_dir=work)


def uncast(value: ir.Value) -> ir.Value:
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Cast" else value  # type: ignore[return-value]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_blocks_are_the_layers(tiny_export: Export, tmp_path: Path, architecture: str, fused: bool) -> None:
    source = load(tiny_export(architecture, "optimum"), tmp_path)
    layers = source.config.get("num_hidden_layers") or source.config["n_layer"]
    if fused:
        pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    blocks = find_blocks(source.model)
    assert len(blocks) == layers
    assert [len(block.residuals) for block in blocks] == [2] * layers
    assert all(block.has_attention for block in blocks)
    for one, two in itertools.pairwise(blocks):
        assert one.stream_out is uncast(two.stream_in)
    covered = [id(node) for block in blocks for node in block.nodes]
    assert len(covered) == len(set(covered)), "a node belongs to two blocks"


def test_linears_of_an_export_know_their_roles(tiny_export: Export, tmp_path: Path) -> None:
    source = load(tiny_export("llama", "optimum"), tmp_path)
    layers = source.config["num_hidden_layers"]
    kinds = Counter(linear.kind for linear in find_linears(source.model))
    assert kinds == {**dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), layers), "head": 1}
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    assert Counter(linear.kind for linear in find_linears(source.model)) == kinds
    pipeline.run(source.model, pipeline.parse("pack"), Context(config=source.config))
    linears = find_linears(source.model)
    assert Counter(linear.kind for linear in linears) == {
        **dict.fromkeys(("qkv", "o", "gate_up", "down"), layers),
        "head": 1,
    }
    assert [linear.name for linear in linears][:3] == ["block0.qkv", "block0.o", "block0.gate_up"]
    assert len({linear.name for linear in linears}) == len(linears)


def test_the_view_is_the_same_before_and_after_quantization(tiny_export: Export, tmp_path: Path) -> None:
    source = load(tiny_export("llama", "optimum"), tmp_path)
    context = Context(config=source.config)
    pipeline.run(source.model, pipeline.parse("fuse"), context)
    before = {one.name: (one.kind, one.block, one.shape) for one in find_linears(source.model)}
    pipeline.run(source.model, pipeline.parse("rtn(bits=8, block_size=16)"), context)
    after = find_linears(source.model)
    assert {one.name: (one.kind, one.block, one.shape) for one in after} == before
    assert all(one.is_quantized for one in after)
    assert len(find_blocks(source.model)) == source.config["num_hidden_layers"]


HOLDERS = {
    "MatMul": "y = MatMul(x, w)",
    "Gemm": "y = Gemm(x, w)",
    "Gemm, transposed": "y = Gemm <transB = 1> (x, v)",
    "Transpose+MatMul": "t = Transpose <perm = [1, 0]> (v) y = MatMul(x, t)",
}


def holder(body: str) -> tuple[ir.Model, np.ndarray]:
    w_NK = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    model = ir.from_onnx_text(
        f'<ir_version: 9, opset_import: ["" : 18]> g (float[b, 4] x) => (float[b, 3] y) {{ {body} }}'
    )
    graph = model.graph
    for name, array in (("w", np.ascontiguousarray(w_NK.T)), ("v", w_NK)):
        value = next((v for node in graph for v in node.inputs if v is not None and v.name == name), None)
        if value is not None:
            value.const_value = ir.tensor(array, name=name)
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
            graph.register_initializer(value)
    return model, w_NK


@pytest.mark.parametrize("body", HOLDERS.values(), ids=HOLDERS.keys())
def test_every_holder_shows_the_same_matrix(body: str) -> None:
    model, w_NK = holder(body)
    (linear,) = find_linears(model)
    assert linear.shape == (3, 4)
    assert np.array_equal(linear.w_NK(), w_NK)


@pytest.mark.parametrize("body", HOLDERS.values(), ids=HOLDERS.keys())
def test_set_weight_is_what_runs(body: str) -> None:
    model, w_NK = holder(body)
    (linear,) = find_linears(model)
    linear.set_weight(lambda: 2 * w_NK, unique_name(model.graph, "new"))
    x = np.eye(4, dtype=np.float32)
    assert np.allclose(graphs.run(model, {"x": x})["y"], 2 * w_NK.T)
    assert list(model.graph.initializers) == ["new"], "the old weight must be gone"


@pytest.mark.parametrize(
    "body",
    ["y = Gemm <alpha = 2.0> (x, w)", "y = MatMul(x, x)"],
    ids=["scaled", "no weight"],
)
def test_what_is_no_linear(body: str) -> None:
    if "x, x" in body:
        model = ir.from_onnx_text(
            f'<ir_version: 9, opset_import: ["" : 18]> g (float[4, 4] x) => (float[4, 4] y) {{ {body} }}'
        )
    else:
        model, _ = holder(body)
    assert find_linears(model) == []


def test_a_narrow_pair_is_one_linear() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    first, second = builder.weight(32, 8), builder.weight(8, 32)
    low = builder.op("MatMul", x, first, width=8)
    model = builder.finish(builder.op("MatMul", low, second, width=32), False, table)
    pair = find_linears(model)[0]
    assert pair.holder == "pair"
    assert pair.shape == (32, 32)
    assert first.const_value is not None
    assert second.const_value is not None
    assert np.allclose(pair.w_NK(), (first.const_value.numpy() @ second.const_value.numpy()).T, atol=1e-6)
    assert [one.name for one in find_linears(model, expand_pairs=True)][:1] != [pair.name]


def test_tied_table_knows_its_head() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    (embedding,) = find_embeddings(builder.finish(builder.step("linear", x, x), True, table))
    assert (embedding.num_rows, embedding.width) == (96, 32)
    assert embedding.head is not None


@pytest.mark.parametrize("seed", range(20))
def test_law_a_parent_is_the_nearest_node_on_all_ways(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = ir.val("past", ir.DataType.FLOAT, [1])
    start = ir.val("x", ir.DataType.FLOAT, [1])
    nodes: list[ir.Node] = []
    for number in range(25):
        known = [start, *(node.outputs[0] for node in nodes)]
        recent = known[-5:]
        picked = rng.choice(len(recent), size=rng.integers(1, min(3, len(recent)) + 1), replace=False)
        nodes.append(ir.node("Sum", [recent[index] for index in picked], name=f"n{number}"))
    graph = ir.Graph([start, x], [nodes[-1].outputs[0]], nodes=nodes, opset_imports={"": 18})
    order, parents = _dominator_tree(graph)
    sources = {
        id(node): [id(value.producer()) if value.producer() else 0 for value in node.inputs if value is not None]
        for node in nodes
    }

    def is_reached(end: int, without: int) -> bool:
        return end == 0 or (end != without and any(is_reached(one, without) for one in sources[end]))

    for key in order:
        dominators = {one for one in order if one != key and not is_reached(key, one)}
        nearest = next((one for one in reversed(list(order)) if one in dominators), 0)
        assert parents[key] == nearest
