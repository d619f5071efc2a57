"""Svd: the tail law, the ranks that the options mean, and the graphs."""

from __future__ import annotations

from typing import Any

import check
import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.low_rank.svd import Svd, choose_rank, factors, spectrum
from onnxpress.passes.quantization.rtn import Rtn

Array = npt.NDArray[Any]
few = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn) -> Array:
    """float64 [N, K], either way round, with a decaying spectrum, sometimes of low rank or with a zero row."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    rows, columns = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    w = rng.standard_normal((rows, columns)) @ np.diag(0.7 ** np.arange(columns))
    if draw(st.booleans()):
        w[0] = 0
    if draw(st.booleans()):
        w[:, -1] = w[:, 0]
    return w


@few
@given(matrices(), st.integers(1, 24))
def test_law_loss_is_the_dropped_energy(w: Array, rank: int) -> None:
    rank = min(rank, *w.shape)
    found = spectrum(w)
    first, second = factors(w, found, rank)
    assert first.shape == (w.shape[1], rank)
    assert second.shape == (rank, w.shape[0])
    loss = float(((first @ second - w.T) ** 2).sum())
    singular = np.linalg.svd(w, compute_uv=False)
    assert np.isclose(loss, float((singular[rank:] ** 2).sum()), rtol=1e-6, atol=1e-9 * float(singular[0] ** 2))
    assert np.isclose(loss, float(found.energy[rank:].sum()), rtol=1e-6, atol=1e-9 * float(singular[0] ** 2))


@few
@given(matrices())
def test_law_full_rank_reproduces_and_factors_are_balanced(w: Array) -> None:
    first, second = factors(w, spectrum(w), min(w.shape))
    assert np.allclose(first @ second, w.T, atol=1e-7 * np.abs(w).max())
    rank = np.linalg.matrix_rank(w)
    singular = np.linalg.svd(w, compute_uv=False)[:rank]
    strong = singular > 1e-5 * singular[0]
    assert np.allclose((first**2).sum(axis=0)[:rank][strong], singular[strong], rtol=1e-4)
    assert np.allclose((second**2).sum(axis=1)[:rank][strong], singular[strong], rtol=1e-4)


@few
@given(st.integers(16, 4096), st.integers(16, 4096), st.floats(0.01, 0.9))
def test_law_ratio_removes_at_least_that_share(rows: int, columns: int, ratio: float) -> None:
    found = spectrum(np.eye(2))
    rank = choose_rank(found, (rows, columns), rank=None, energy=None, ratio=ratio)
    assert rank * (rows + columns) <= (1 - ratio) * rows * columns * (1 + 1e-9)
    assert rank % 8 == 0 or rank < 8
    assert rank % 32 == 0 or rank < 128


def test_law_energy_is_kept() -> None:
    w = np.random.default_rng(0).standard_normal((96, 200)) * 0.97 ** np.arange(200)
    found = spectrum(w)
    for energy in (0.5, 0.9, 0.99):
        rank = choose_rank(found, w.shape, rank=None, energy=energy, ratio=None)
        assert found.energy[:rank].sum() >= energy * found.energy.sum() * (1 - 1e-9)
        assert rank % 8 == 0
        assert found.energy[: rank - 8].sum() < energy * found.energy.sum()


def network(tied: bool = False, steps: tuple[str, ...] = ("gated", "biased", "transposed")) -> ir.Model:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for step in steps:
        x = builder.step(step, x, x)
    return builder.finish(x, tied, table)


def test_a_matrix_of_low_rank_is_replaced_without_loss() -> None:
    model = network(steps=("linear",))
    linear = find_linears(model)[0]
    rng = np.random.default_rng(0)
    low = (rng.standard_normal((64, 8)) @ rng.standard_normal((8, 64))).astype(np.float32)
    linear.set_weight(lambda: low, "low")
    before = graphs.run(model)["logits"]
    report = Svd(rank=8, kinds=(linear.kind,), exclude=("head",)).run(model, Context())
    assert report.changed == [linear.name]
    assert report.ledger[0]["rank"] == 8
    assert report.metrics["weight_error"] < 1e-5
    check.close(before, graphs.run(model)["logits"], tolerance=1e-5)


@pytest.mark.parametrize("options", [{"ratio": 0.2}, {"rank": 16}, {"energy": 0.6}])
def test_linears_become_pairs_once(options: dict[str, Any]) -> None:
    model = network()
    reference = {one.name: one.w_NK().copy() for one in find_linears(model)}
    report = Svd(**options).run(model, Context())
    pairs = find_linears(model)
    assert len(report.changed) == len(pairs) == 6
    assert all(one.holder == "pair" for one in pairs)
    assert [one.name for one in pairs] == list(reference)
    for one, row in zip(pairs, report.ledger, strict=True):
        difference = np.linalg.norm(one.w_NK() - reference[one.name]) / np.linalg.norm(reference[one.name])
        assert difference == pytest.approx(row["weight_error"], abs=1e-4)
    assert report.metrics["parameters_after"] < report.metrics["parameters_before"]
    assert report.bytes_after < report.bytes_before
    assert not any(node.op_type == "Transpose" for node in model.graph)
    graphs.run(model)
    again = Svd(**options).run(model, Context())
    assert not again.modified
    assert again.reasons() == {"already a pair of low rank": 6}


def test_a_tied_head_and_quantized_weights_are_skipped() -> None:
    model = network(tied=True)
    report = Svd(ratio=0.3).run(model, Context())
    assert report.reasons() == {"shares its bytes with the embedding": 1}
    model = network(tied=True)
    Rtn(bits=8).run(model, Context())
    assert Svd(ratio=0.3).run(model, Context()).reasons() == {"quantized; decompose before quantizing": 6}


def test_gemm_keeps_its_bias() -> None:
    rng = np.random.default_rng(0)
    low = (rng.standard_normal((64, 4)) @ rng.standard_normal((4, 40))).astype(np.float32)
    tensors = [ir.tensor(low, name="w"), ir.tensor(rng.standard_normal(40).astype(np.float32), name="b")]
    values = [ir.Value(name=t.name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t) for t in tensors]
    x = ir.val("x", ir.DataType.FLOAT, ["n", 64])
    node = ir.node("Gemm", [x, *values], name="gemm")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape(["n", 40])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=9)
    feeds = {"x": rng.standard_normal((3, 64)).astype(np.float32)}
    before = graphs.run(model, feeds)["y"]
    Svd(rank=4).run(model, Context())
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul", "Add"]
    check.close(before, graphs.run(model, feeds)["y"], tolerance=1e-5)


def test_what_saves_nothing_is_refused() -> None:
    model = network()
    before = graphs.text(model)
    with pytest.raises(OptionError, match="no matrix gets smaller"):
        Svd(rank=60).run(model, Context())
    with pytest.raises(OptionError, match="no linear of kind 'down'"):
        Svd(rank=8, kinds=("down",)).run(network(steps=("linear",)), Context())
    with pytest.raises(OptionError, match="matches no linear"):
        Svd(rank=8, exclude=("nothing",)).run(model, Context())
    assert graphs.text(model) == before


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 4, "ratio": 0.1}, {"rank": 0}, {"ratio": 1.0}, {"energy": 0.0}, {"rank": 4, "kinds": ("x",)}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="svd: "):
        Svd(**options)


def test_text_round_trips() -> None:
    for pass_ in (Svd(ratio=0.3), Svd(rank=64, kinds=("q", "k"), exclude=("block0.*",))):
        assert pipeline.parse(str(pass_)).passes == (pass_,)
