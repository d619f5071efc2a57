"""Kquant: the laws of weighted least squares on blocks, and the pass with and without text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_laws import Form, check_stored, forms, on_grids, restored, weight_blocks

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError, UnsupportedModelError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization._rounding import Rounded, round_blocks
from onnxpress.passes.quantization.kquant import Kquant, kquant

Array = npt.NDArray[Any]
few = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Array, Array]:
    """Weights float64 [G, b, N] with what hurts (outliers, constant, zero, one-sided, tiny), importance [G, b]."""
    w = draw(weight_blocks(groups=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    importance = rng.gamma(0.3, size=w.shape[:2]) * 10.0 ** draw(st.integers(-6, 6))
    importance[0] = 0
    importance[1, ::3] = 0
    return w, importance


def fit(w: Array, importance: Array | None, form: Form) -> Rounded:
    bits, symmetric, dtype = form
    return kquant(w, importance, bits=bits, symmetric=symmetric, scale_dtype=np.dtype(dtype))


def counted(w: Array, importance: Array | None) -> Array:
    """How much each weight counts, written down anew."""
    if importance is None:
        return np.sqrt((w * w).mean(axis=1, keepdims=True)) + np.abs(w)
    h = np.where((importance > 0).any(axis=1, keepdims=True), importance, 1)[:, :, None] * np.ones_like(w)
    mean = (w * w * (h > 0)).sum(axis=1, keepdims=True) / (h > 0).sum(axis=1, keepdims=True)
    return h * np.sqrt(2 * mean + w * w)


def loss(found: Rounded, bits: int, w: Array, u: Array) -> Array:
    return (u * (w - restored(found, bits)) ** 2).sum(axis=1)


@few
@given(blocks(), forms, st.booleans())
def test_law_never_worse_than_rounding_by_what_counts(drawn: tuple[Array, Array], form: Form, with_data: bool) -> None:
    w, importance = drawn[0], drawn[1] if with_data else None
    bits, symmetric, dtype = form
    u = counted(w, importance)
    live = w * (u > 0)
    plain = round_blocks(live, bits=bits, symmetric=symmetric, scales="mse", scale_dtype=np.dtype(dtype))
    residue = 1e-28 * (u * w * w).sum(axis=1)
    assert (loss(fit(w, importance, form), bits, w, u) <= loss(plain, bits, w, u) * (1 + 1e-9) + residue).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_gains_over_rounding_by_what_counts(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    w, importance = rng.standard_normal((8, 32, 256)), rng.gamma(0.3, size=(8, 32))
    plain = round_blocks(w, bits=bits, symmetric=symmetric, scales="mse", scale_dtype=np.dtype("float32"))
    for h, gain in ((importance, 0.8), (None, 0.995)):
        u = counted(w, h)
        assert loss(fit(w, h, (bits, symmetric, "float32")), bits, w, u).sum() <= gain * loss(plain, bits, w, u).sum()


@few
@given(blocks(), forms)
def test_law_codes_and_losses_are_what_is_stored(drawn: tuple[Array, Array], form: Form) -> None:
    w, importance = drawn
    check_stored(fit(w, importance, form), w, form)


@few
@given(blocks(), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([2.0**-9, 4.0, 2.0**12]), st.booleans())
def test_law_twice_the_weights_have_the_same_codes(
    drawn: tuple[Array, Array], bits: int, symmetric: bool, factor: float, with_data: bool
) -> None:
    w, importance = drawn[0], drawn[1] if with_data else None
    # A block of zeros has the scale 1 at any factor.
    one, other = (
        fit(w, importance, (bits, symmetric, "float64")),
        fit(w * factor, importance, (bits, symmetric, "float64")),
    )
    np.testing.assert_array_equal(one.codes_GbN, other.codes_GbN)
    used = (w != 0).any(axis=1)
    if with_data:
        used &= (w * (counted(w, importance) > 0) != 0).any(axis=1)
    np.testing.assert_array_equal(one.scale_GN[used] * factor, other.scale_GN[used])


@few
@given(blocks(), forms)
def test_law_twice_the_importance_has_the_same_result(drawn: tuple[Array, Array], form: Form) -> None:
    w, importance = drawn
    one, other = fit(w, importance, form), fit(w, importance * 2.0**20, form)
    np.testing.assert_array_equal(one.codes_GbN, other.codes_GbN)
    np.testing.assert_array_equal(one.scale_GN, other.scale_GN)


@few
@given(blocks(), forms, st.floats(-100, 100))
def test_law_a_column_of_importance_0_does_not_matter(drawn: tuple[Array, Array], form: Form, value: float) -> None:
    w, importance = drawn
    changed = w.copy()
    changed[1, ::3] = value
    one, other = fit(w, importance, form), fit(changed, importance, form)
    np.testing.assert_array_equal(one.scale_GN, other.scale_GN)
    rest = np.arange(w.shape[1]) % 3 > 0
    np.testing.assert_array_equal(one.codes_GbN[:, rest], other.codes_GbN[:, rest])
    # Its own code is the nearest there is.
    step, codes = np.abs(one.scale_GN.astype(float)), np.arange(2.0 ** form[0])
    zero = 2.0 ** (form[0] - 1) if one.zero_GN is None else one.zero_GN.astype(float)
    ladder = (codes[:, None, None] - zero) * one.scale_GN.astype(float)
    nearest = np.abs(ladder[:, 1] - w[1, 0]).min(axis=0)
    assert (np.abs(restored(one, form[0])[1, 0] - w[1, 0]) <= nearest + 1e-9 * step[1]).all()


def test_law_the_same_importance_everywhere_is_the_weights_alone() -> None:
    w = np.random.default_rng(2).standard_normal((4, 32, 64))
    form = 4, False, "float64"
    one, other = fit(w, np.full((4, 32), 3.0), form), fit(w, np.full((4, 32), 0.25), form)
    np.testing.assert_array_equal(one.codes_GbN, other.codes_GbN)


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_law_a_grid_is_reproduced(bits: int, with_data: bool) -> None:
    rng = np.random.default_rng(bits)
    importance = rng.gamma(0.3, size=(3, 32)) if with_data else None
    for symmetric, w in zip((True, False), on_grids(rng, bits), strict=True):
        np.testing.assert_allclose(restored(fit(w, importance, (bits, symmetric, "float64")), bits), w, atol=1e-12)


def test_law_blocks_are_independent() -> None:
    rng = np.random.default_rng(3)
    w, importance = rng.standard_normal((6, 32, 9)), rng.gamma(0.3, size=(6, 32))
    form = 4, False, "float32"
    whole = fit(w, importance, form)
    for block in range(6):
        part = fit(w[block : block + 1], importance[block : block + 1], form)
        np.testing.assert_array_equal(part.codes_GbN[0], whole.codes_GbN[block])
        np.testing.assert_array_equal(part.scale_GN[0], whole.scale_GN[block])


@pytest.mark.parametrize("side", [-1, 1])
def test_the_range_is_cut_where_little_is_lost(side: int) -> None:
    """One large weight that hardly counts: the others get the steps."""
    w = np.linspace(-1, 1, 32)[None, :, None].copy()
    w[0, 0 if side < 0 else 31, 0] = 1.5 * side
    importance = np.where(np.abs(w[:, :, 0]) > 1, 1e-6, 1.0)
    found = fit(w, importance, (4, False, "float64"))
    assert 1.8 / 15 < abs(found.scale_GN[0, 0]) < 2.2 / 15


def network(num_in: int = 64) -> ir.Model:
    builder = graphs.Builder(num_in, 96, 0)
    table = builder.weight(96, num_in, name="table")
    x = builder.op("Gather", table, builder.ids, width=num_in, axis=0)
    for step in ("gated", "linear"):
        x = builder.step(step, x, x)
    return builder.finish(x, True, table)


@pytest.mark.parametrize("importance", ["weights", "activations"])
def test_every_matrix_is_coded_and_the_network_still_runs(importance: str) -> None:
    model, before = network(40), graphs.run(network(40))  # 40: the last block is not full
    context = Context(calibration=CalibrationText(vocab_size=96))
    text = ", tokens=256, length=32" if importance == "activations" else ""
    options = f"importance={importance!r}{text}, bits=8, block_size=16, exclude=('head',)"
    ((_, report),) = pipeline.run(model, pipeline.parse(f"kquant({options})"), context)
    assert {one.holder for one in find_linears(model) if one.kind != "head"} == {"MatMulNBits"}
    assert len(report.ledger) == len(report.changed) > 3
    assert bool(report.calibration) == (importance == "activations")
    got = graphs.run(model)
    np.testing.assert_allclose(got["logits"], before["logits"], atol=0.05 * np.abs(before["logits"]).max())


@pytest.fixture
def fused(tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    source = models.load(tiny_export("llama"), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    return source.model


def test_the_same_text_gives_the_same_bytes(fused: ir.Model) -> None:
    passes, found = "kquant(importance='activations', tokens=256, length=32)", []
    for _ in range(2):
        model = fused.clone()
        context = Context(calibration=CalibrationText(vocab_size=200, seed=1))
        ((_, report),) = pipeline.run(model, pipeline.parse(passes), context)
        found.append(graphs.text(model))
    assert found[0] == found[1]
    assert report.calibration["windows"] == [8, 32]
    assert all(0 < row["output_error"] < 0.2 for row in report.ledger if row["kind"] != "embedding")


def test_an_activation_that_is_not_finite_is_a_reason(fused: ir.Model) -> None:
    linear = find_linears(fused)[-2]
    broken = linear.w_NK().copy()
    broken[0, 0] = np.nan
    linear.set_weight(lambda: broken, "broken")
    passes = "kquant(importance='activations', tokens=64, length=16)"
    ((_, report),) = pipeline.run(fused, pipeline.parse(passes), Context(calibration=CalibrationText(vocab_size=200)))
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons[linear.name] == "weights are not finite"
    assert reasons["head"] == "its activation is not finite on the calibration text"


def test_bfloat16_cannot_be_streamed() -> None:
    model = network()
    context = Context(target=TARGETS["cuda-bf16"], calibration=CalibrationText(vocab_size=96))
    pipeline.run(model, pipeline.parse("cast_float16(dtype='bfloat16')"), context)
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        Kquant(importance="activations", tokens=64, length=16).run(model, context)


def test_overrides_and_a_second_run() -> None:
    model = network()
    report = Kquant(overrides={"head": {"bits": 8}}).run(model, Context())
    assert {row["bits"] for row in report.ledger if row["kind"] == "head"} == {8}
    assert not Kquant(overrides={"head": {"bits": 8}}).run(model, Context()).modified


@pytest.mark.parametrize("option", ["tokens=0", "length=0", "tokens=64", "importance='hessian'", "bits=3"])
def test_options_out_of_range(option: str) -> None:
    with pytest.raises(OptionError, match=option.partition("=")[0]):
        pipeline.parse(f"kquant({option})")
