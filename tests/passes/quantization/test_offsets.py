"""Blocks with offsets: levels are kept exactly, offsets nearly; and the graph computes with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import gguf
import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress import models
from onnxpress.compiler import packing, scales
from onnxpress.compiler.inspect.summary import summarize
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.nbits import CodedMatrix
from onnxpress.compiler.other_weights import find_other_weights
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.canonicalize.simplify import Simplify
from onnxpress.passes.quantization._offsets import (
    ON_NO_GRID,
    SIZE,
    even_steps,
    offset_columns,
    plain_matrix,
    recover_offsets,
)
from onnxpress.passes.quantization.cast_float16 import CastFloat16
from onnxpress.passes.quantization.keep_quantization import KeepQuantization
from onnxpress.passes.quantization.rtn import Rtn

Array = npt.NDArray[Any]
F32 = np.dtype(np.float32)
few = settings(max_examples=40, deadline=None, derandomize=True)


def recovered(w: Array, **options: Any) -> CodedMatrix:
    matrix = recover_offsets(w, F32, **options)
    assert isinstance(matrix, CodedMatrix), matrix
    return matrix


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Array, Array, Array, Array]:
    """(weights [N, K], codes [N, G, 32], steps and lowest weights [N, G]) with steps that float16 holds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    groups = draw(st.sampled_from([1, 2, 7, 9]))
    codes = rng.integers(0, 16, (6, groups, SIZE))
    codes[0] //= 3  # not the whole range
    codes[1] = 5 * (codes[1] // 5)  # a step five times as large
    codes[2, 0] = 7  # equal weights
    step = ((rng.random((6, groups)) + 0.5) * 2.0 ** draw(st.integers(-8, 3))).astype(np.float16).astype(np.float32)
    low = (step * (-15 * rng.random((6, groups)))).astype(np.float32)
    return (codes * step[..., None] + low[..., None]).astype(np.float32).reshape(6, -1), codes, step, low


@few
@given(blocks())
def test_law_levels_are_exact_and_offsets_nearly(case: tuple[Array, Array, Array, Array]) -> None:
    w, codes, _, _ = case
    matrix = recovered(w)
    columns = w.shape[1]
    kept = packing.unpack(matrix.codes.reshape(6, -1), 4)[:, :columns].reshape(codes.shape)
    for row in (3, 4, 5):  # the largest step with which they are levels: that of the file, unless codes have a divisor
        for group in range(codes.shape[1]):
            own = codes[row, group] - codes[row, group].min()
            assert np.array_equal(kept[row, group], own // np.gcd.reduce(own))
    # An offset is at most half a step, and one of 15 levels to either side of 0 in the row's widest.
    widest = np.abs(matrix.scale[:, : columns // SIZE]).max(axis=1, keepdims=True)
    assert (np.abs(plain_matrix(matrix, columns) - w) <= widest * (0.5 / 7 / 2 + 0.01)).all()


def test_offsets_that_are_multiples_are_exact() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (8, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    w = ((codes - 6) * np.float32(0.125)).astype(np.float32)
    np.testing.assert_array_equal(plain_matrix(recovered(w), 64), w)


@pytest.mark.parametrize("change", ["shifted up", "shifted down", "wide", "huge"])
@pytest.mark.parametrize("scale_bits", [8, 32])
def test_rows_whose_offsets_do_not_fit_one_step_are_left(change: str, scale_bits: int) -> None:
    w = as_type(np.random.default_rng(0).standard_normal((8, 256), np.float32) * np.float32(0.02), "Q4_1")
    recovered(w, scale_bits=scale_bits)
    w = w.copy()
    if change == "wide":
        w[:, :32] *= 200
    else:
        w[3, :32] += {"shifted up": 3, "shifted down": -3, "huge": 3e6}[change]
    reason = recover_offsets(w, F32, scale_bits=scale_bits)
    expected = ON_NO_GRID, "the blocks of a row differ too much for one step", "its steps are too large"
    assert isinstance(reason, str)
    assert reason.startswith(expected)


@pytest.mark.parametrize("scale_bits", [8, 32])
def test_zeros_do_not_coarsen_their_row(scale_bits: int) -> None:
    w = as_type(np.random.default_rng(0).standard_normal((8, 256), np.float32) * np.float32(0.02), "Q4_1")
    w[:, :32] = 0
    kept = plain_matrix(recovered(w, scale_bits=scale_bits), 256)
    assert distance(kept, w) < 0.012


def test_small_weights() -> None:
    w = np.random.default_rng(0).standard_normal((8, 256), np.float32)
    for size in (2e-4, 2e-5):  # steps are subnormal numbers of float16, as those of the file are
        small = as_type(w * np.float32(size), "Q4_1")
        assert distance(plain_matrix(recovered(small), 256), small) < 0.05


def test_equal_weights_and_zeros() -> None:
    w = np.zeros((4, 64), np.float32)
    w[1, :32], w[2], w[3, 32:] = 0.3, -0.7, 12.0
    np.testing.assert_allclose(plain_matrix(recovered(w), 64), w, rtol=1e-3)
    np.testing.assert_array_equal(plain_matrix(recovered(w[:1]), 64), w[:1])


def test_random_weights_are_on_no_grid() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 96), np.float32)
    assert recover_offsets(w, F32) == ON_NO_GRID
    kept = as_type(w, "Q4_1")
    kept[50] = w[50]  # behind the rows that are looked at first
    assert recover_offsets(kept, F32) == ON_NO_GRID
    kept[50, 3] = np.nan
    assert recover_offsets(kept, F32) == "weights are not finite"
    assert recover_offsets(w[:, :90], F32) == "width 90 is not a multiple of 32"
    assert recover_offsets(as_type(w, "Q4_1") * np.float32(2**20), F32) == "its steps are too large for float16"


def test_one_weight_between_two_levels_is_seen() -> None:
    w = as_type(np.random.default_rng(0).standard_normal((4, 32), np.float32), "Q4_1")
    assert even_steps(w[:, None]) is not None
    w[2, 5] += 0.1 * (np.unique(w[2])[1] - np.unique(w[2])[0])
    assert even_steps(w[:, None]) is None


def distance(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def as_type(w: Array, kind: str) -> Array:
    known = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(w), known), known)


def test_q4_k() -> None:
    rng = np.random.default_rng(3)
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_K]
    data = rng.integers(0, 256, (20, 2, nbytes), dtype=np.uint8)
    data[..., 4:8] |= 0xA0  # no scale is below 32 of 63: 0 is within 15 steps, as in files of real quantizers
    for place, largest in ((0, 0.002), (2, 0.004)):
        scale = ((rng.random((20, 2)) + 1) * largest / 2).astype(np.float16)
        data[..., place : place + 2] = scale[..., None].view(np.uint8)
    w = gguf.quants.dequantize(data.reshape(20, -1), gguf.GGMLQuantizationType.Q4_K).astype(np.float32)
    assert w.shape == (20, 2 * size)
    assert distance(plain_matrix(recovered(w), w.shape[1]), w) < 0.03


def test_short_steps_are_multiples() -> None:
    w = as_type(np.random.default_rng(0).standard_normal((40, 256), np.float32), "Q4_1")
    short, exact = (recovered(w, scale_bits=bits) for bits in (8, 32))
    split = scales.short_form(short.scale)
    assert split is not None
    assert split[0].dtype == np.int8
    assert short.nbytes < exact.nbytes
    np.testing.assert_array_equal(exact.scale.astype(np.float16).astype(np.float32), exact.scale)
    errors = [distance(plain_matrix(one, 256), w) for one in (short, exact)]
    assert errors[1] < errors[0] < 0.012
    # What rounding the steps has moved, on the average of a block, is in its offset.
    left = (plain_matrix(short, 256) - w).reshape(40, 8, SIZE).mean(axis=-1)
    widest = np.abs(short.scale).max(axis=1, keepdims=True)
    assert (np.abs(left) < widest * 0.05).all()


# --- the graph ----------------------------------------------------------------------------------------------------


def network() -> ir.Model:
    """q, k and v of one stream and a projection of another, all Q4_1; the table and the head are random."""
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    parts = [builder.step("biased", x, x) for _ in range(3)]
    y = builder.op("Add", builder.op("Mul", parts[0], parts[1], width=64), parts[2], width=64)
    y = builder.step("linear", y, y)
    model = builder.finish(builder.step("silu", y, y), False, table)  # or it were a pair of factors with the head
    for linear in find_linears(model)[:4]:
        w = as_type(linear.w_NK(), "Q4_1")
        linear.weight.const_value = ir.tensor(linear.stored_form(w), name=linear.weight.name)
    return model


@pytest.mark.parametrize("scale_bits", [8, 32])
def test_the_graph_computes_with_offsets(scale_bits: int) -> None:
    model = network()
    before = graphs.run(model)
    weights = {one.name: one.w_NK().copy() for one in find_linears(model)[:4]}
    report = KeepQuantization(accuracy_level=0, scale_bits=scale_bits).run(model, Context())
    assert sorted(report.changed) == sorted(weights)
    assert 0 < report.metrics["weight_error"] < 0.012
    for row in report.ledger:
        assert row["snr_db"] == pytest.approx(-20 * math.log10(row["weight_error"]))
    linears = {one.name: one for one in find_linears(model)}
    assert {one.num_in for name, one in linears.items() if name in weights} == {64 + offset_columns(64)}
    for name, w in weights.items():
        coded = linears[name].w_NK()
        node = linears[name].node
        assert coded.shape[1] == node.attributes["K"].as_int()
        assert distance(coded[:, :64] + np.repeat(coded[:, 64:66], 32, axis=1), w) < 0.012
    check.close(before["logits"], graphs.run(model)["logits"], tolerance=2e-2)
    # What the graph computes is what `plain_matrix` says, to the last bits.
    plain = network()
    for linear in find_linears(plain)[:4]:
        coded = linears[linear.name].w_NK()
        w = coded[:, :64] + np.repeat(coded[:, 64:66], 32, axis=1)
        linear.weight.const_value = ir.tensor(linear.stored_form(w), name=linear.weight.name)
    check.close(graphs.run(plain)["logits"], graphs.run(model)["logits"], tolerance=1e-5)


def test_readers_of_one_value_share_its_sums() -> None:
    model = network()
    KeepQuantization().run(model, Context())
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["Concat"] == 2, "one for q, k and v, one for the projection behind"
    assert sum(str(name).startswith("blocks_of_64") for name in model.graph.initializers) == 1


@pytest.mark.parametrize("simplified", [False, True])
def test_sums_are_no_weights(simplified: bool) -> None:
    model = network()
    KeepQuantization().run(model, Context())
    if simplified:  # which folds the cast of the table
        Simplify().run(model, Context())
    linears = find_linears(model)
    assert len(linears) == 5
    assert [one.num_sums for one in linears] == [*[offset_columns(64)] * 4, 0]
    assert [one.source.name for one in linears] == [one.source.name for one in find_linears(network())]
    assert linears[0].bits == 8 * linears[0].nbytes / (64 * 64)
    assert summarize(model).parameters == summarize(network()).parameters
    assert not find_other_weights(model, linears, find_embeddings(model, linears))
    assert Rtn(bits=8).run(model, Context()).changed == ["head", "embedding"]
    graphs.run(model)


@pytest.mark.parametrize("kind", ["gate", "up"])
def test_siblings_of_which_one_has_offsets_keep_their_names(
    tiny_export: Callable[[str, str], Path], tmp_path: Path, kind: str
) -> None:
    model = models.load(tiny_export("llama", "optimum"), work_dir=tmp_path).model
    linears = find_linears(model)
    one = next(linear for linear in linears if linear.kind == kind)
    one.weight.const_value = ir.tensor(one.stored_form(as_type(one.w_NK(), "Q4_1")), name=one.weight.name)
    assert KeepQuantization().run(model, Context()).changed == [one.name]
    assert [linear.name for linear in find_linears(model)] == [linear.name for linear in linears]


def test_a_product_beside_something_else_is_a_linear() -> None:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for first in (x, builder.op("Tanh", x, width=64)):  # not what it was computed from, or not alone behind it
        y = builder.op("MatMul", first, builder.weight(64, 24), width=24)
        x = builder.op("Concat", *((x, y) if first is not x else (y, x)), width=88, axis=-1)
        x = builder.op("MatMul", x, builder.weight(88, 64), width=64)
    model = builder.finish(builder.op("Tanh", x, width=64), False, table)
    assert len(find_linears(model, expand_pairs=True)) == 5


@pytest.mark.parametrize(("is_table", "axis"), [(True, -1), (False, -1), (True, 1)])
def test_only_the_table_of_blocks_is_no_weight(is_table: bool, axis: int) -> None:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    matrix = builder.weight(64, 24)
    if is_table:
        matrix.const_value = ir.tensor(np.eye(24, dtype=np.float32)[np.arange(64) // 32], name=matrix.name)
    both = builder.op("Concat", x, builder.op("MatMul", x, matrix, width=24), width=88, axis=axis)
    y = builder.op("MatMul", both, builder.weight(88, 64), width=64)
    model = builder.finish(builder.op("Tanh", y, width=64), False, table)
    linears = find_linears(model)
    assert len(linears) == 2 + (not is_table or axis != -1)
    assert not find_other_weights(model, linears, find_embeddings(model, linears))


def test_a_second_run_and_without_offsets() -> None:
    model = network()
    kept = KeepQuantization(offsets=False).run(model, Context())
    assert not kept.changed
    assert len(KeepQuantization().run(model, Context()).changed) == 4
    assert not KeepQuantization().run(model, Context()).changed


def test_cast_to_float16() -> None:
    model, context = network(), Context(target=TARGETS["cuda"])
    KeepQuantization().run(model, context)
    CastFloat16().run(model, context)
    plain = network()
    KeepQuantization().run(plain, context)
    for linear, want in zip(find_linears(model)[:4], find_linears(plain), strict=False):
        assert linear.num_in % 8 == 0
        check.close(want.w_NK(), linear.w_NK(), tolerance=1e-3)
    graphs.session(model)
