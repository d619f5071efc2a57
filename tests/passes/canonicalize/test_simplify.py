"""Simplify: transposes, tied weights, dead inputs."""

from __future__ import annotations

from collections import Counter

import check
import graphs
import numpy as np
import onnx_ir as ir

from onnxpress.compiler.blocks import find_blocks
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.canonicalize.simplify import IR_VERSION, Simplify
from onnxpress.passes.quantization.rtn import Rtn


def network(builder: graphs.Builder, copy_head: bool) -> ir.Model:
    table = builder.weight(128, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    x = builder.step("transposed", x, x)
    assert table.const_value is not None
    turned = np.ascontiguousarray(table.const_value.numpy().T)
    head = builder.const(turned, "head") if copy_head else builder.weight(64, 128)
    logits = builder.op("MatMul", x, head, width=128)
    logits.name = "logits"
    graph = ir.Graph([builder.ids], [logits], nodes=builder.nodes, initializers=builder.weights, opset_imports={"": 18})
    return ir.Model(graph, ir_version=8)


def test_a_transposed_weight_is_stored_transposed() -> None:
    model = network(graphs.Builder(64, 128, 0), copy_head=False)
    before = graphs.run(model)
    Simplify().run(model, Context())
    assert Counter(node.op_type for node in model.graph) == {"Gather": 1, "MatMul": 2}
    assert np.array_equal(before["logits"], graphs.run(model)["logits"])


def test_a_transposed_copy_of_the_table_is_tied_again() -> None:
    model = network(graphs.Builder(64, 128, 0), copy_head=True)
    before = graphs.run(model)
    report = Simplify().run(model, Context())
    assert report.bytes_after == report.bytes_before - 128 * 64 * 4
    (embedding,) = find_embeddings(model)
    assert embedding.head is not None
    assert np.array_equal(before["logits"], graphs.run(model)["logits"])


def test_a_table_is_stored_the_way_it_is_gathered() -> None:
    """onnxruntime-genai's builder keeps the weight of a tied head and gathers from its transpose."""
    builder = graphs.Builder(64, 128, 0)
    head = builder.weight(64, 128, name="head")
    table = builder.op("Transpose", head, perm=[1, 0])
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    x = builder.step("residual", builder.step("linear", x, x), x)
    logits = builder.op("MatMul", x, head, width=128)
    logits.name = "logits"
    graph = ir.Graph([builder.ids], [logits], nodes=builder.nodes, initializers=builder.weights, opset_imports={"": 18})
    model = ir.Model(graph, ir_version=8)
    assert [block.stream_in.name for block in find_blocks(model)] == [table.consumers()[0].outputs[0].name]
    assert [one.kind for one in find_linears(model)].count("head") == 1
    before = graphs.run(model)
    report = Simplify().run(model, Context())
    (embedding,) = find_embeddings(model)
    assert embedding.head is not None
    assert report.bytes_after == report.bytes_before
    assert np.array_equal(before["logits"], graphs.run(model)["logits"])
    assert not Simplify().run(model, Context()).modified


def test_overridable_initializers_become_constants() -> None:
    model = network(graphs.Builder(64, 128, 0), copy_head=False)
    weight = next(iter(model.graph.initializers.values()))
    model.graph.inputs.append(weight)
    Simplify().run(model, Context())
    assert [value.name for value in model.graph.inputs] == ["input_ids"]


def test_sets_a_version_that_the_runtime_loads() -> None:
    model = network(graphs.Builder(64, 128, 0), copy_head=False)
    Simplify().run(model, Context())
    assert model.ir_version == IR_VERSION


def test_two_weights_that_only_begin_alike_stay_two() -> None:
    builder = graphs.Builder(64, 128, 0)
    table = builder.weight(128, 64)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    one = builder.rng.standard_normal((64, 64)).astype(np.float32)
    two = one.copy()
    two[40:] += 1
    for array in (one, two):
        x = builder.op("MatMul", x, builder.const(array, f"w{len(builder.weights)}"), width=64)
    model = builder.finish(x, False, table)
    before = graphs.run(model)
    Simplify().run(model, Context())
    assert np.array_equal(before["logits"], graphs.run(model)["logits"])
    assert len(find_linears(model)) == 3


def test_a_branch_keeps_an_output_of_its_own() -> None:
    """It may hand on a value from around it, which is an output there already: neither may take the other's place."""
    model = graphs.branching()
    feeds = {
        "sound": np.ones((2, 64), np.float32),
        "state": np.ones((2, 56), np.float32),
        "flag": np.array(False),
    }
    before = graphs.run(model, feeds)
    Simplify().run(model, Context())
    after = graphs.run(model, feeds)
    assert list(before) == list(after)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_what_changes_inside_of_a_branch_is_reported() -> None:
    model = graphs.branching()
    Simplify().run(model, Context())
    assert not Simplify().run(model, Context()).modified
    (branches,) = [node for node in model.graph if node.op_type == "If"]
    inner = branches.attributes["then_branch"].as_graph()
    inner.append(ir.node("Neg", inner.outputs[:1]))  # that nobody reads
    assert Simplify().run(model, Context()).changed == ["graph"]


def test_shapes_are_known_behind_a_quantized_product() -> None:
    """ONNX's shape inference does not know MatMulNBits, and what others quantize says nothing of its output."""
    builder = graphs.Builder(64, 128, 0)
    table = builder.weight(128, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    model = builder.finish(builder.step("silu", builder.step("linear", x, x), x), False, table)
    Rtn(bits=8).run(model, Context())
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    (gather,) = [node for node in model.graph if node.op_type == "GatherBlockQuantized"]
    gather.outputs[0].shape = ir.Shape(["batch", "sequence", 64])
    before = graphs.run(model)
    operands = [(node.op_type, [value.name for value in node.inputs], dict(node.attributes)) for node in model.graph]
    Simplify().run(model, Context())
    assert all(len(node.outputs[0].shape) == 3 for node in model.graph)
    assert model.graph[-1].outputs[0].shape[-1] == 128
    kept = [(node.op_type, [value.name for value in node.inputs], dict(node.attributes)) for node in model.graph]
    assert kept == operands
    assert np.array_equal(before["logits"], graphs.run(model)["logits"])


def test_a_transpose_that_turns_nothing_leaves_a_tied_weight_as_it_is() -> None:
    model = ir.from_onnx_text("""<ir_version: 9, opset_import: ["" : 18]>
    g (int64[batch, seq] ids, float[40, 40] w) => (float[batch, seq, 40] y)
    { t = Transpose <perm = [0, 1]> (w) e = Gather(t, ids) y = MatMul(e, w) }""")
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32), name="w")
    model.graph.register_initializer(value)
    feeds = {"ids": np.array([[0, 3, 9]])}
    before = graphs.run(model, feeds)["y"]
    Simplify().run(model, Context())
    check.close(before, graphs.run(model, feeds)["y"])
