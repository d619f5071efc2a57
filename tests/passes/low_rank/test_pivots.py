"""Pivoted pairs: the same product of fewer numbers, whatever lies around the matrices, and known again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from decoders import decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.lora_graph import refuse_transformed
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.low_rank import _whitened
from onnxpress.passes.low_rank._pivots import _is_same, choose_order, pivoted_inputs, pivoted_outputs

Array = np.ndarray
few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Array, Array]:
    """Factors [K, R] and [R, N] that may not be of full rank."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    rank = draw(st.integers(1, 12))
    columns, rows = draw(st.integers(rank, 30)), draw(st.integers(rank, 30))
    first, second = rng.standard_normal((columns, rank)), rng.standard_normal((rank, rows))
    if draw(st.booleans()):
        first[:, -1], second[-1] = 0, 0
    return first, second


@few
@given(pairs())
def test_law_the_product_stays_with_fewer_numbers(pair: tuple[Array, Array]) -> None:
    first, second = pair
    rank, rows, columns = first.shape[1], second.shape[1], first.shape[0]
    second = second[:, choose_order(rows, second, None)]
    first = first[choose_order(columns, None, first.T)]
    want = first @ second
    a, b = pivoted_outputs(first, second)
    np.testing.assert_allclose(np.concatenate([a @ b, a], axis=1), want, atol=1e-11 * np.abs(want).max())
    c, d = pivoted_inputs(first, second)
    np.testing.assert_allclose(np.concatenate([d, c @ d]), want, atol=1e-11 * np.abs(want).max())
    assert a.size + b.size == c.size + d.size == rank * (rows + columns - rank)


@few
@given(st.integers(0, 2**31 - 1), st.integers(4, 24), st.data())
def test_law_an_order_has_the_pivots_at_its_ends(seed: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    ranks = [data.draw(st.integers(1, width)) for _ in range(2)]
    up, down = (rng.standard_normal((rank, width)) for rank in ranks)
    order = choose_order(width, up, down)
    assert sorted(order) == list(range(width))
    assert np.linalg.matrix_rank(up[:, order[-ranks[0] :]]) == ranks[0]
    assert np.linalg.matrix_rank(down[:, order[: ranks[1]]]) == ranks[1]


def test_pivots_are_those_that_the_others_are_small_multiples_of() -> None:
    """In the order as it is some would be made from two that are nearly the same."""
    rng = np.random.default_rng(0)
    second = rng.standard_normal((16, 64)) * np.geomspace(1, 1e-3, 16)[:, None]
    second[:, -2] = second[:, -1] * (1 + 1e-6 * rng.standard_normal(16))
    first = rng.standard_normal((32, 16))
    assert np.abs(pivoted_outputs(first, second)[1]).max() > 1e3
    assert np.abs(pivoted_outputs(first, second[:, choose_order(64, second, None)])[1]).max() < 4


def run(model: ir.Model, passes: str, config: dict[str, Any] | None = None) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), config=config or {})
    return pipeline.run(model, pipeline.parse(passes), made)[-1][1]


@pytest.mark.parametrize("before", ["fuse", "fuse, pack"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_logits_are_those_of_plain_pairs_of_the_same_ranks(
    tiny_export: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    before: str,
) -> None:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse(before), Context(config=source.config))
    kinds = tuple({one.kind for one in find_linears(source.model)} & {"gate", "up", "gate_up", "down"})
    passes = f"svd_llm(pivot=True, ratio=0.3, allocation='uniform', tokens=512, length=32, kinds={kinds})"
    pivoted, plain = source.model.clone(), source.model
    report = run(pivoted, passes)
    with monkeypatch.context() as patched:
        patched.setattr(_whitened, "_pivot", lambda *_: 0)
        run(plain, passes)
    np.testing.assert_allclose(graphs.logits(pivoted), graphs.logits(plain), atol=1e-4)
    found = {one.name: one for one in find_linears(pivoted)}
    rows = [row for row in report.ledger if "pivots" in row]
    assert {row["pivots"] for row in rows} == {"outputs", "inputs"}
    for row in rows:
        pair = found[row["site"]]
        assert pair.pivots == row["pivots"]
        assert sum(one.num_in * one.num_out for one in pair.factors or ()) == row["parameters_after"]
    assert any("in another order" in note for note in report.notes)
    assert not run(pivoted, passes).modified


@pytest.mark.parametrize("kinds", ["('up',)", "('down',)", "('up', 'down')"])
def test_an_order_alone_changes_nothing(kinds: str) -> None:
    """With a rank that loses nothing, only the order is new; whole matrices and biases follow it."""
    model = decoder()
    for one in find_linears(model):  # of rank 8, which 8 pivots tell
        if one.kind in ("up", "down"):
            left, size, right = np.linalg.svd(one.w_NK(), full_matrices=False)
            one.set_weight(lambda w=(left[:, :8] * size[:8]) @ right[:8]: w, f"{one.name}.thin")  # type: ignore[misc]
    want = graphs.logits(model)
    report = run(
        model,
        f"svd_llm(pivot=True, ratio=0.6, allocation='uniform', teacher=False, tokens=256, length=32, kinds={kinds})",
    )
    assert {row["rank"] for row in report.ledger} == {8}
    assert all("pivots" in row for row in report.ledger)
    np.testing.assert_allclose(graphs.logits(model), want, atol=1e-5 * np.abs(want).max())


def test_a_quantizer_rounds_both_factors_and_the_pair_is_known_again() -> None:
    model = decoder()
    run(model, "svd_llm(pivot=True, ratio=0.3, allocation='uniform', tokens=256, length=32, kinds=('up', 'down'))")
    want = {one.name: one.w_NK() for one in find_linears(model) if one.pivots}
    assert want
    run(model, "rtn(bits=8, block_size=16)")
    found = {one.name: one for one in find_linears(model) if one.pivots}
    assert set(found) == set(want)
    for name, pair in found.items():
        assert all(half.holder == "MatMulNBits" for half in pair.factors or ())
        assert np.abs(pair.w_NK() - want[name]).max() < 0.05 * np.abs(want[name]).max()
    names = [one.name for one in find_linears(model, expand_pairs=True)]
    assert {"block0.up.A", "block0.up.B", "block0.down.A", "block0.down.B"} <= set(names)


def test_an_adapter_of_the_checkpoint_is_refused() -> None:
    model = decoder()
    refuse_transformed(model, [])
    run(model, "svd_llm(pivot=True, ratio=0.3, allocation='uniform', tokens=256, length=32, kinds=('up', 'down'))")
    with pytest.raises(UnsupportedModelError, match=r"features of block0.up in the order of its pivots") as caught:
        refuse_transformed(model, [])
    assert "pivot=True" in (caught.value.hint or "")
    plain = decoder()
    run(plain, "svd_llm(ratio=0.3, allocation='uniform', tokens=256, length=32, kinds=('up', 'down'))")
    refuse_transformed(plain, [])


def test_without_freedom_pairs_are_plain() -> None:
    """Somebody else reads the features: their order may not change."""
    model = decoder()
    features = next(node for node in model.graph if node.name == "l0.tanh").outputs[0]
    extra = ir.Node("", "ReduceSum", [features], name="probe")
    extra.outputs[0].name, extra.outputs[0].dtype = "probe", ir.DataType.FLOAT
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    report = run(
        model, "svd_llm(pivot=True, ratio=0.3, allocation='uniform', tokens=256, length=32, kinds=('up', 'down'))"
    )
    assert {row["site"]: row.get("pivots", "") for row in report.ledger} == {
        "block0.up": "",
        "block0.down": "",
        "block1.up": "outputs",
        "block1.down": "inputs",
    }


def test_where_pivots_would_lose_something_pairs_stay_plain() -> None:
    """Rows of gate and up in one matrix, of which those of up tell little: pivots are looked for among them alone."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((32, 16)), rng.standard_normal((16, 64))
    second[:, 32:] = rng.standard_normal((16, 4)) @ rng.standard_normal((4, 32))
    pivoted = pivoted_outputs(first, second)
    assert not _is_same(first, second, *pivoted, is_reader=False)
    fine = second[:, choose_order(64, second, None)]
    assert _is_same(first, fine, *pivoted_outputs(first, fine), is_reader=False)
    turned = first[choose_order(32, None, first.T)]
    assert _is_same(turned, second, *pivoted_inputs(turned, second), is_reader=True)
