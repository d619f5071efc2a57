"""DynamicInt8: the laws of rounding, ONNX Runtime's kernel against numpy, and the shapes of graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from decoders import write_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress import runtime
from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.formats import FP4, NF4, columns_matrix, matrix, stored
from onnxpress.compiler.inspect import summarize
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization._columns import fake_quantize, round_columns, spread
from onnxpress.passes.quantization.dynamic_int8 import DynamicInt8
from onnxpress.passes.quantization.rtn import Rtn

Array = npt.NDArray[Any]
few = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
ALL = DynamicInt8(tokens=0)


def initializer(array: Array, name: str) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def one_node(kind: str, w: Array, bias: Array | None, **attributes: int) -> ir.Model:
    """y = x w (+ bias), w as the operator stores it; the bias of a MatMul is an Add behind it."""
    x = ir.val("x", ir.DataType.FLOAT, ["n", None])
    weights = [initializer(w, "w")] + ([] if bias is None else [initializer(bias, "b")])
    if kind == "Gemm":
        nodes = [ir.node("Gemm", [x, *weights], attributes, name="gemm")]
    else:
        nodes = [ir.node("MatMul", [x, weights[0]], name="product")]
        nodes[0].outputs[0].name = "z"
        if bias is not None:
            nodes.append(ir.node("Add", [nodes[0].outputs[0], weights[1]], name="add"))
    y = nodes[-1].outputs[0]
    y.name, y.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=9)


def network(tied: bool, steps: tuple[str, ...] = ("gated", "biased", "transposed")) -> ir.Model:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for step in steps:
        x = builder.step(step, x, x)
    return builder.finish(x, tied, table)


def ops(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


@few
@given(seeds, st.integers(-12, 6))
def test_law_a_weight_is_off_by_half_a_scale_at_most(seed: int, decade: int) -> None:
    w = np.random.default_rng(seed).standard_normal((5, 40)).astype(np.float32) * np.float32(10.0**decade)
    w[1] = 0
    codes, scale = round_columns(w)
    assert (np.abs(columns_matrix(codes, scale, None) - w) <= scale[:, None] * 0.50001).all()
    assert np.abs(codes).max() == 127
    assert not codes[:, 1].any()
    assert np.array_equal(round_columns(2 * w)[0], codes)


@few
@given(seeds, st.floats(-3, 3))
def test_law_an_activation_is_off_by_a_step_at_most(seed: int, shift: float) -> None:
    """Half a step for its code, half for the zero point; 0 is exact, and the range is never wider than the values."""
    x = (np.random.default_rng(seed).standard_normal(200) + shift).astype(np.float32)
    x[0] = 0
    chosen = spread(float(x.min()), float(x.max()))
    rounded = fake_quantize(x, chosen)
    assert (np.abs(rounded - x) <= chosen.scale * 1.001).all()
    assert (np.abs(rounded - x) <= chosen.scale * 0.501).mean() > 0.9
    assert rounded[0] == 0
    assert chosen.scale <= (max(x.max(), 0) - min(x.min(), 0)) / 255 * 1.0001


@few
@given(seeds, st.sampled_from([(64, 24), (100, 7)]), st.booleans(), st.sampled_from(["MatMul", "Gemm", "Gemm^T"]))
def test_kernel_computes_what_numpy_does(seed: int, sizes: tuple[int, int], biased: bool, kind: str) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((sizes[1], sizes[0])).astype(np.float32)
    x = (rng.standard_normal((6, sizes[0])) + rng.uniform(-1, 1)).astype(np.float32)
    bias = rng.standard_normal(sizes[1]).astype(np.float32) if biased else None
    turned = kind == "Gemm^T"
    model = one_node(kind[:4] if kind != "MatMul" else kind, w if turned else w.T.copy(), bias, transB=int(turned))
    plain = graphs.run(model, {"x": x})["y"]
    ALL.run(model, Context())
    assert ops(model) == ["DynamicQuantizeMatMul"]  # the bias is its input
    (linear,) = find_linears(model)
    codes, scale = round_columns(w)
    q = columns_matrix(codes, scale, None)
    assert np.array_equal(linear.w_NK(), q)
    assert (linear.bias is not None) == biased
    got = graphs.run(model, {"x": x})["y"]
    chosen = spread(float(x.min()), float(x.max()))
    check.close(fake_quantize(x, chosen) @ q.T + (0 if bias is None else bias), got)
    # What each rounding may cost at most: a step of x on every weight, half a scale of w on every feature.
    bound = chosen.scale * np.abs(q).sum(axis=1) + np.outer(np.abs(x).sum(axis=1), scale / 2)
    assert (np.abs(got - plain) <= bound * 1.001 + 1e-5).all()


def test_every_linear_of_a_network_is_stored_and_seen() -> None:
    model, before = network(False), graphs.run(network(False))
    names = [(one.name, one.kind, one.shape) for one in find_linears(model)]
    float_bytes = sum(one.nbytes for one in find_linears(model))
    report = DynamicInt8().run(model, Context())
    linears = find_linears(model)
    assert [(one.name, one.kind, one.shape) for one in linears] == names
    assert {one.holder for one in linears} == {"DynamicQuantizeMatMul"}
    assert all(one.is_quantized and one.bits < 9 for one in linears)
    assert 3.5 < float_bytes / sum(one.nbytes for one in linears) < 4
    check.close(before["logits"], graphs.run(model)["logits"], tolerance=0.05)
    assert len(report.ledger) == len(report.changed) == len(names)
    for row in report.ledger:
        assert 0 < row["activation_error"] < row["output_error"] < 0.1
        assert 0 < row["weight_error"] < 0.02
    assert summarize(model).quantized == {"DynamicQuantizeMatMul, 8 bits per column": len(names)}
    assert report.reasons() == {"a table is looked up, not multiplied: rtn(bits=8) stores it in blocks": 1}
    again = DynamicInt8().run(model, Context())
    assert not again.modified
    stored_so = "already quantized: DynamicQuantizeMatMul, 8 bits per column"
    assert again.reasons()[f"{stored_so}; dynamic_int8(requantize=True) stores it anew"] == len(names)


def test_measured_errors_are_those_of_the_kernel() -> None:
    """With one window of one row, the error that is measured is that of the node on it."""
    rng = np.random.default_rng(0)
    table, w = rng.standard_normal((8, 64)).astype(np.float32), rng.standard_normal((64, 16)).astype(np.float32)
    ids = ir.val("input_ids", ir.DataType.INT64, ["b", "s"])
    weights = [initializer(table, "table"), initializer(w, "w")]
    look = ir.node("Gather", [weights[0], ids], {"axis": 0}, name="look")
    product = ir.node("MatMul", [look.outputs[0], weights[1]], name="product")
    look.outputs[0].name, product.outputs[0].name = "x", "y"
    product.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph(
        [ids], product.outputs, nodes=[look, product], initializers=weights, opset_imports={"": 18}, name="g"
    )
    model = ir.Model(graph, ir_version=9)
    feeds = {"input_ids": Context().calibration.windows(8, 8)[0]}
    before = graphs.run(model, feeds)["y"]
    (row,) = DynamicInt8(tokens=8, length=8).run(model, Context()).ledger
    error = np.linalg.norm(graphs.run(model, feeds)["y"] - before) / np.linalg.norm(before)
    assert row["output_error"] == pytest.approx(error, rel=1e-3)


def test_a_linear_that_loses_much_stays_in_float() -> None:
    """A feature a thousand times as large as the others takes all the steps."""
    model = network(False, ("linear",))
    table = find_embeddings(model)[0].table
    array = table.const_value.numpy().copy()  # type: ignore[union-attr]
    array[:, 3] *= 3000
    table.const_value = ir.tensor(array, name=table.name)
    first = find_linears(model)[0].node
    w = first.inputs[1]
    array = w.const_value.numpy().copy()  # type: ignore[union-attr]
    array[3] = 0  # the product does not read it, but the range of the activation does
    w.const_value = ir.tensor(array, name=w.name)  # type: ignore[union-attr]
    report = DynamicInt8().run(model, Context())
    names = [one.name for one in find_linears(model) if one.holder == "MatMul"]
    assert names == [first.name]
    assert report.reasons()["its output would lose more than max_error=0.1"] == 1
    assert report.notes[0].startswith(f"{names[0]} stays in float: its output would lose ")
    assert names[0] in DynamicInt8(max_error=1e6).run(model, Context()).changed


def test_a_tied_head_is_left_to_rtn() -> None:
    model = network(True)
    report = ALL.run(model, Context())
    assert report.reasons()["the embedding reads the same bytes: rtn(bits=8) stores both at once"] == 1
    Rtn(bits=8).run(model, Context())
    assert sorted({one.holder for one in find_linears(model)}) == ["DynamicQuantizeMatMul", "MatMulNBits"]
    assert "GatherBlockQuantized" in ops(model)
    graphs.run(model)


def test_rtn_reads_it_back_when_asked() -> None:
    model = network(False)
    ALL.run(model, Context())
    before = {one.name: one.w_NK() for one in find_linears(model)}
    assert "already quantized" in next(iter(Rtn(bits=8).run(model, Context()).reasons()))
    Rtn(bits=8, requantize=True).run(model, Context())
    assert "DynamicQuantizeMatMul" not in ops(model)
    assert ops(model).count("Add") == 1  # the bias
    for one in find_linears(model):
        check.close(before[one.name], one.w_NK(), tolerance=0.01)
    assert DynamicInt8(tokens=0, requantize=True).run(model, Context()).changed
    assert {one.holder for one in find_linears(model)} == {"DynamicQuantizeMatMul"}


def test_a_weight_that_two_linears_read_is_stored_once() -> None:
    model = network(False, ("linear", "linear"))
    first, second = find_linears(model)[:2]
    second.node.replace_input_with(1, first.weight)
    ALL.run(model, Context())
    first, second = find_linears(model)[:2]
    assert first.weight is second.weight
    assert first.node.inputs[2] is second.node.inputs[2]


def test_refusals() -> None:
    with pytest.raises(OptionError, match="on the CPU only, got target 'cuda'") as caught:
        DynamicInt8().run(network(False), Context(target=TARGETS["cuda"]))
    assert caught.value.hint == "use rtn(bits=8), which stores weights alone in 8 bits"
    with pytest.raises(OptionError, match="matches no linear"):
        DynamicInt8(exclude=("lm_hed",)).run(network(False), Context())
    for option in ("max_error=0.0", "tokens=-1", "length=0"):
        with pytest.raises(OptionError, match=option.partition("=")[0]):
            pipeline.parse(f"dynamic_int8({option})")
    model = one_node("MatMul", np.full((8, 4), np.nan, np.float32), None)
    assert ALL.run(model, Context()).reasons() == {"weights are not finite": 1}
    model = one_node("MatMul", np.ones((8, 4), np.float16), None)
    (reason,) = ALL.run(model, Context()).reasons()
    assert reason == "DynamicQuantizeMatMul has a kernel for float activations, not for float16"
    assert ops(model) == ["MatMul"]


def test_a_model_without_text_is_stored_and_says_that_nothing_was_measured() -> None:
    model = one_node("MatMul", np.eye(8, dtype=np.float32), None)
    report = DynamicInt8().run(model, Context())
    assert ops(model) == ["DynamicQuantizeMatMul"]
    assert "no linear was kept in float for its error" in report.notes[0]


def test_a_decoder_generates(tmp_path: Path) -> None:
    plain = write_decoder(tmp_path / "plain")
    made = optimize(plain, output=tmp_path / "small", passes="pack, dynamic_int8, rtn(bits=8)", verify=True)
    assert made.report["operators"]["com.microsoft.DynamicQuantizeMatMul"] >= 2 * 3
    assert made.report["quality"]["kl"] < 0.01
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    assert len(runtime.load(tmp_path / "small").generate("abc", **settings).tokens) > 0


@pytest.mark.parametrize("what", ["a stack", "a zero point that is computed"])
def test_products_of_others_that_hold_no_constant_matrix_are_no_linears(what: str) -> None:
    x, zero = ir.val("x", ir.DataType.FLOAT, [2, 3, 8]), ir.val("zero", ir.DataType.INT8, [4])
    is_stack = what == "a stack"
    weights = [initializer(np.ones((2, 8, 4) if is_stack else (8, 4), np.int8), "w")]
    weights += [initializer(np.ones(4, np.float32), "scale")]
    inputs = [x] if is_stack else [x, zero]
    node = ir.node("DynamicQuantizeMatMul", [x, *weights, *inputs[1:]], domain="com.microsoft", name="product")
    node.outputs[0].name = "y"
    opsets = {"": 18, "com.microsoft": 1}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=weights, opset_imports=opsets, name="g")
    assert find_linears(ir.Model(graph, ir_version=9)) == []


@pytest.mark.parametrize(("quant_type", "levels"), [(0, FP4), (1, NF4)])
def test_four_bits_of_a_table_read_as_the_kernel_does(quant_type: int, levels: Array) -> None:
    """MatMulBnb4 of others: identity activations give the matrix."""
    rng = np.random.default_rng(quant_type)
    rows, columns, block = 12, 64, 32
    x = ir.val("x", ir.DataType.FLOAT, ["n", columns])
    codes = initializer(rng.integers(0, 256, rows * columns // 2).astype(np.uint8), "codes")
    scale = initializer(rng.uniform(0.1, 3, rows * columns // block).astype(np.float32), "scale")
    attributes = {"N": rows, "K": columns, "block_size": block, "quant_type": quant_type}
    node = ir.node("MatMulBnb4", [x, codes, scale], attributes, domain="com.microsoft", name="product")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    opsets = {"": 18, "com.microsoft": 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[codes, scale], opset_imports=opsets, name="g")
    model = ir.Model(graph, ir_version=9)
    got = graphs.run(model, {"x": np.eye(columns, dtype=np.float32)})["y"]
    check.close(got.T, matrix(node))
    held = stored(node)
    assert held is not None
    assert held.description == f"MatMulBnb4, {('FP4', 'NF4')[quant_type]} in blocks of 32"
    assert np.abs(levels).max() == 1
    assert Rtn(bits=8, requantize=True).run(model, Context()).changed == ["head"]
    assert ops(model) == ["MatMulNBits"]
    check.close(got, graphs.run(model, {"x": np.eye(columns, dtype=np.float32)})["y"], tolerance=0.02)
