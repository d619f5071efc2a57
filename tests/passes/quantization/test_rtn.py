"""Rtn: the laws of rounding on the numbers, the layout against ONNX Runtime's kernel, and the shapes of graphs."""

from __future__ import annotations

import functools
from typing import Any, Literal

import check
import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_laws import on_grids, weight_blocks

from onnxpress.compiler import packing, pipeline
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.nbits import CodedMatrix, run_matmul
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization._rounding import round_blocks, round_matrix
from onnxpress.passes.quantization._weight_only import fitting_block
from onnxpress.passes.quantization.rtn import Rtn

Array = npt.NDArray[Any]
Scales = Literal["max", "mse"]
few = settings(max_examples=30, deadline=None, derandomize=True)
_STORED = ["float16", "float32", "float64", "multiples"]  # types of scales


blocks = weight_blocks(outlier=50, decades=(-6, 4), digits=None)


def rounded(w: Array, **options: Any) -> tuple[Array, Array, Array, Array]:
    """Result of `round_blocks` with float64 scales: restored weights, |step|, signed steps, loss."""
    settings = {"bits": 4, "symmetric": True, "scales": "max", "scale_dtype": np.dtype(np.float64)} | options
    codes, scale, zero, loss = round_blocks(w, **settings)
    steps = codes.astype(np.float64) - (2 ** (settings["bits"] - 1) if zero is None else zero.astype(float)[:, None])
    return steps * scale.astype(np.float64)[:, None], np.abs(scale.astype(np.float64)), steps, loss


@few
@given(blocks, st.sampled_from([2, 4, 8]))
def test_law_error_is_at_most_half_a_step(w: Array, bits: int) -> None:
    restored, step, steps, _ = rounded(w, bits=bits, symmetric=True)
    # The end opposite to the largest weight has no level of its own: there the error may reach one step.
    bound = np.where(steps == 2 ** (bits - 1) - 1, 1.0, 0.5) * step[:, None]
    assert (np.abs(w - restored) <= bound * (1 + 1e-9)).all()
    restored, step, _, _ = rounded(w, bits=bits, symmetric=False)
    # The zero point is rounded too, which can move both ends by half a step.
    assert (np.abs(w - restored) <= step[:, None] * (1 + 1e-9)).all()


@few
@given(blocks, st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from(_STORED))
def test_law_least_squares_is_never_worse_than_the_range(w: Array, bits: int, symmetric: bool, dtype: str) -> None:
    scale_dtype = np.dtype("float32" if dtype == "multiples" else dtype)
    common: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype}
    common["scale_bits"] = 8 if dtype == "multiples" else 32
    *_, plain = rounded(w, scales="max", **common)
    restored, *_, best = rounded(w, scales="mse", **common)
    residue = 1e-28 * (w * w).sum(axis=1)  # of a block that both hit exactly: the last bits of the scale, squared
    assert (best <= plain * (1 + 1e-9) + residue).all()
    assert np.allclose(((w - restored) ** 2).sum(axis=1), best, rtol=1e-6, atol=1e-12)


@few
@given(st.integers(0, 2**31 - 1), st.sampled_from([2, 4, 8]), st.sampled_from(["max", "mse"]))
def test_law_a_grid_is_reproduced(seed: int, bits: int, scales: Scales) -> None:
    rng = np.random.default_rng(seed)
    for symmetric, w in zip((True, False), on_grids(rng, bits), strict=True):
        assert np.allclose(rounded(w, bits=bits, symmetric=symmetric, scales=scales)[0], w, atol=1e-12)


def test_least_squares_gains_on_normal_weights() -> None:
    w = np.random.default_rng(0).standard_normal((8, 32, 512))
    for bits, gain in ((2, 0.85), (4, 0.92), (8, 1.0)):
        for symmetric in (True, False):
            plain = rounded(w, bits=bits, symmetric=symmetric)[3].sum()
            assert rounded(w, bits=bits, symmetric=symmetric, scales="mse")[3].sum() <= gain * plain


def test_law_rows_are_independent() -> None:
    w = np.random.default_rng(1).standard_normal((70, 100)).astype(np.float32)
    common: dict[str, Any] = {"bits": 4, "block_size": 32, "symmetric": False, "scales": "mse"}
    whole, loss, norm = round_matrix(w, scale_dtype=np.dtype(np.float32), **common)
    parts = [round_matrix(w[rows], scale_dtype=np.dtype(np.float32), **common) for rows in (slice(0, 9), slice(9, 70))]
    assert np.array_equal(whole.codes, np.concatenate([part[0].codes for part in parts]))
    assert np.array_equal(whole.scale, np.concatenate([part[0].scale for part in parts]))
    assert np.isclose(loss, sum(part[1] for part in parts))
    assert np.isclose(norm, float((w.astype(np.float64) ** 2).sum()), rtol=1e-5)
    assert np.isclose(loss, float(((whole.w_NK() - w.astype(np.float64)) ** 2).sum()), rtol=1e-3)


@pytest.mark.parametrize("num_in", [256, 100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block_size"), [(b, s) for b in (2, 4, 8) for s in (16, 32, 64, 128, 256)])
def test_kernel_reads_back_the_planned_codes(bits: int, block_size: int, symmetric: bool, num_in: int) -> None:
    """Identity activations through MatMulNBits give (code - zero) scale exactly: packing, padding, signs, zeros."""
    w = np.random.default_rng(bits * block_size).standard_normal((24, num_in)).astype(np.float32)
    matrix, _, _ = round_matrix(
        w, bits=bits, block_size=block_size, symmetric=symmetric, scales="mse", scale_dtype=np.dtype(np.float32)
    )
    assert (matrix.scale < 0).any() == symmetric
    got = run_matmul(matrix, np.eye(num_in, dtype=np.float32))
    assert np.array_equal(got.T, matrix.w_NK())
    level4 = run_matmul(matrix, np.eye(num_in, dtype=np.float32), accuracy_level=4)
    check.close(matrix.w_NK(), level4.T, tolerance=1e-2)


def test_packing_round_trips() -> None:
    for bits in (2, 4, 8):
        codes = np.random.default_rng(0).integers(0, 2**bits, (5, 64)).astype(np.uint8)
        assert np.array_equal(packing.unpack(packing.pack(codes, bits), bits), codes)


def network(tied: bool, steps: tuple[str, ...] = ("gated", "biased", "linear")) -> ir.Model:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for step in steps:
        x = builder.step(step, x, x)
    return builder.finish(x, tied, table)


def ops(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 8, "symmetric": False}, {"bits": 4, "head_bits": 8}])
def test_result_computes_with_the_dequantized_weights(tied: bool, options: dict[str, Any]) -> None:
    model, reference = network(tied), network(tied)
    before = graphs.run(model)
    report = Rtn(**options).run(model, Context())
    linears = {one.name: one.w_NK() for one in find_linears(model)}
    for one in find_linears(reference):
        if not (tied and one.kind == "head"):
            one.set_weight(functools.partial(linears.__getitem__, one.name), f"{one.name}.new")
    (table,), (old_table,) = find_embeddings(model), find_embeddings(reference)
    old_table.table.const_value = ir.tensor(table.table_VH(), name=old_table.table.name)
    want, got = graphs.run(reference), graphs.run(model)
    assert "MatMul" not in ops(model)
    assert "Gather" not in ops(model)
    check.close(want["logits"], got["logits"], tolerance=3e-2)  # what int8 activations add
    error = float(np.abs(before["logits"] - got["logits"]).max() / np.abs(before["logits"]).max())
    assert error < (0.05 if options["bits"] == 8 else 0.4)
    assert report.bytes_after < report.bytes_before / 2
    assert 0 < report.metrics["weight_error"] < 0.12
    assert 0 < report.metrics["activation_error"] < 0.02
    assert len(report.ledger) == len(report.changed)


def test_tied_head_and_embedding_share_one_set_of_bytes() -> None:
    model = network(tied=True)
    Rtn(head_bits=8).run(model, Context())
    (embedding,) = find_embeddings(model)
    assert embedding.head is not None
    assert embedding.node.inputs[0].producer().inputs[0] is embedding.head.weight  # type: ignore[union-attr]
    assert embedding.node.inputs[2] is embedding.head.node.inputs[2]
    assert embedding.head.weight.is_initializer()  # or the kernel does not prepack it
    assert not any("table" in name for name in model.graph.initializers)
    assert "Transpose" not in ops(model)


def test_cuda_gets_explicit_zero_points_for_the_embedding() -> None:
    model = network(tied=True)
    Rtn(bits=4).run(model, Context(target=TARGETS["cuda"]))
    (embedding,) = find_embeddings(model)
    zero = embedding.node.inputs[3]
    assert zero is not None
    assert (zero.const_value.numpy() == 0x88).all()  # type: ignore[union-attr]
    assert len(embedding.head.node.inputs) == 3  # type: ignore[union-attr]
    want = packing.dequantize_node(embedding.node)
    assert np.array_equal(want, embedding.head.w_NK())  # type: ignore[union-attr]


def test_gather_kernel_takes_the_middle_for_granted() -> None:
    """The CPU file leaves the zero points of a symmetric table out; the kernel must read them as 2^(bits - 1)."""
    for bits in (2, 4, 8):
        model = network(tied=False)
        Rtn(bits=bits, block_size=32, exclude=("[!e]*",)).run(model, Context())
        (table,) = find_embeddings(model)
        node = table.node
        assert len(node.inputs) == 3
        node.outputs[0].name = "rows"
        model.graph.outputs[:] = [node.outputs[0]]
        got = graphs.run(model, {"input_ids": np.arange(96)[None]})["rows"]
        assert np.array_equal(got[0], table.table_VH())


def test_gemm_keeps_its_bias_in_an_add() -> None:
    rng = np.random.default_rng(0)
    for transposed in (0, 1):
        w = rng.standard_normal((40, 64) if transposed else (64, 40)).astype(np.float32)
        weight, bias = ir.tensor(w, name="w"), ir.tensor(rng.standard_normal(40).astype(np.float32), name="b")
        values = [
            ir.Value(name=t.name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t) for t in (weight, bias)
        ]
        x = ir.val("x", ir.DataType.FLOAT, ["n", 64])
        node = ir.node("Gemm", [x, *values], {"transB": transposed}, name="gemm")
        node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 18}, name="g")
        model = ir.Model(graph, ir_version=9)
        feeds = {"x": rng.standard_normal((3, 64)).astype(np.float32)}
        before = graphs.run(model, feeds)
        Rtn(bits=8, block_size=32).run(model, Context())
        assert ops(model) == ["Add", "MatMulNBits"]
        check.close(before["y"], graphs.run(model, feeds)["y"], tolerance=3e-2)


def test_low_rank_pairs_are_quantized_factor_by_factor() -> None:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    x = builder.op("MatMul", x, builder.weight(64, 16), width=16)
    x = builder.op("MatMul", x, builder.weight(16, 64), width=64)
    model = builder.finish(x, False, table)
    Rtn(bits=8).run(model, Context())
    assert ops(model) == ["GatherBlockQuantized", "MatMulNBits", "MatMulNBits", "MatMulNBits"]
    assert any(one.factors is not None for one in find_linears(model)) or len(find_linears(model)) == 3
    graphs.run(model)


def test_second_run_skips_with_a_reason() -> None:
    model = network(tied=True)
    Rtn().run(model, Context())
    report = Rtn().run(model, Context())
    assert not report.modified
    stored = "MatMulNBits, 4 bits in blocks of 32"
    assert report.reasons() == {f"already quantized: {stored}; rtn(requantize=True) rounds it anew": 6}


def test_overrides_by_role_and_by_name() -> None:
    """The last that fits counts; a role that the model lacks is no error."""
    overrides = {"head": {"bits": 8, "symmetric": True}, "qkv": {"bits": 8}, "h*d": {"block_size": 64}}
    rtn = Rtn(symmetric=False, overrides=overrides)
    model = network(tied=True)
    rtn.run(model, Context())
    formats = {
        one.name: (node.attributes["bits"].as_int(), node.attributes["block_size"].as_int(), len(node.inputs) == 3)
        for one in find_linears(model)
        for node in [one.node]
    }
    assert formats.pop("head") == (8, 64, True)
    assert set(formats.values()) == {(4, 32, False)}
    assert pipeline.parse(str(rtn)).passes == (rtn,)
    by_role = network(tied=True)
    report = Rtn(overrides={"linear": {"bits": 8}}).run(
        by_role, Context()
    )  # of a role, while the names are n1, n2, ...
    assert {row["bits"] for row in report.ledger if row["kind"] == "linear"} == {8}
    assert Rtn(overrides={"embedding": {"bits": 8}}).run(network(tied=True), Context()).ledger[-1]["bits"] == 8


def test_excluded_sites_stay_float() -> None:
    model = network(tied=True)
    report = Rtn(exclude=("embedding",)).run(model, Context())
    assert report.reasons() == {"excluded": 1}
    assert ops(model).count("MatMul") == 1
    assert "Gather" in ops(model)


def test_weights_that_are_not_finite_are_skipped() -> None:
    model = network(tied=False)
    weight = next(one for one in find_linears(model) if one.kind != "head").weight
    weight.const_value = ir.tensor(np.full(weight.const_value.shape.numpy(), np.nan, np.float32))  # type: ignore[union-attr]
    report = Rtn().run(model, Context())
    assert report.reasons() == {"weights are not finite": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3},
        {"block_size": 48},
        {"bits": 2, "block_size": 16},
        {"head_bits": 2, "head_block_size": 256},
        {"bits": 8, "accuracy_level": 0},
        {"accuracy_level": 1},
        {"scales": "best"},
        {"overrides": {"head": {"bits": 3}}},
        {"overrides": {"head": {"blocks": 64}}},
        {"overrides": {"head": 64}},
    ],
)
def test_options_without_a_fast_kernel_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="rtn: "):
        Rtn(**options)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(OptionError, match="matches no linear"):
        Rtn(exclude=("lm_hed",)).run(network(tied=False), Context())
    with pytest.raises(OptionError, match="overrides='blok0"):
        Rtn(overrides={"blok0.*": {"bits": 8}}).run(network(tied=False), Context())
    with pytest.raises(OptionError, match="at most 128"):
        Rtn(block_size=256).run(network(tied=False), Context(target=TARGETS["cuda"]))


@pytest.mark.parametrize(
    "options",
    [
        {"overrides": {"head": {"bits": 2, "block_size": 256}}},
        {"head_bits": 2, "overrides": {"head": {"block_size": 256}}},
        {"overrides": {"head": {"bits": 2}, "h*": {"block_size": 256}}},
    ],
)
def test_a_slow_kernel_is_refused_for_what_is_stored(options: dict[str, Any]) -> None:
    builder = graphs.Builder(256, 96, 0)
    table = builder.weight(96, 256, name="table")
    model = builder.finish(builder.op("Gather", table, builder.ids, width=256, axis=0), False, table)
    with pytest.raises(OptionError, match="2 bits have a fast kernel"):
        Rtn(**options).run(model, Context())
    Rtn(bits=2, block_size=64, head_bits=4, overrides={"head": {"block_size": 256}}).run(model, Context())


def test_one_weight_has_one_format() -> None:
    builder = graphs.Builder(64, 96, 0)
    table, shared = builder.weight(96, 64), builder.weight(64, 64)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    x = builder.op("MatMul", builder.op("MatMul", x, shared, width=64), shared, width=64)
    with pytest.raises(OptionError, match="share a weight"):
        Rtn(overrides={"n2": {"bits": 8}}).run(builder.finish(x, False, table), Context())


def test_options_belong_to_the_pass() -> None:
    overrides: dict[str, dict[str, int | bool]] = {"head": {"bits": 8}}
    one = Rtn(overrides=overrides)
    overrides["head"]["bits"] = 4
    assert one == Rtn(overrides={"head": {"bits": 8}})
    assert hash(one) == hash(Rtn(overrides={"head": {"bits": 8}}))


def test_levels_by_bits() -> None:
    model = network(tied=True)
    Rtn(bits=4, head_bits=8, accuracy_level=0).run(model, Context())
    levels = {(n.attributes["bits"].as_int(), n.attributes["accuracy_level"].as_int()) for n in _products(model)}
    assert levels == {(4, 0), (8, 4)}


def test_coded_matrix_weighs_what_it_stores() -> None:
    w = np.ones((8, 64), np.float32)
    matrix: CodedMatrix = round_matrix(
        w, bits=4, block_size=32, symmetric=False, scales="max", scale_dtype=np.dtype(np.float16)
    )[0]
    assert matrix.nbytes == 8 * 32 + 8 * 2 * 2 + 8 * 1


def _products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize(
    ("width", "asked", "exact", "found"),
    [
        *(
            (2048, 128, False, 128),
            (576, 128, False, 64),
            (576, 64, False, 64),
            (100, 128, False, 16),
            (20, 128, False, 16),
        ),
        *(
            (1520, 128, False, 128),
            (1030, 128, False, 64),
            (576, 128, True, 64),
            (72, 32, True, None),
            (7, 32, False, 16),
        ),
    ],
)
def test_blocks_are_hardly_padded(width: int, asked: int, exact: bool, found: int | None) -> None:
    assert fitting_block(width, asked, 4, exact=exact) == found


def test_a_matrix_read_both_ways_is_stored_both_ways() -> None:
    builder = graphs.Builder(64, 200, 0)
    table = builder.weight(200, 64, name="table", scale=1.0)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    rows = builder.op("Reshape", x, builder.axes(-1, 64))
    square = builder.weight(64, 64)
    for turned in (0, 1):
        rows = builder.op("Gemm", rows, square, transB=turned)
    back = builder.op("Reshape", rows, builder.axes(1, -1, 64), width=64)
    model = builder.finish(back, False, table)
    ids = {"input_ids": np.arange(12)[None]}
    before = graphs.run(model, ids)["logits"]
    Rtn(bits=8, block_size=16).run(model, Context())
    assert sum(node.op_type == "MatMulNBits" for node in model.graph) == 3
    check.close(before, graphs.run(model, ids)["logits"], tolerance=0.05)
