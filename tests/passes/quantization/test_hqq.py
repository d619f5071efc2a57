"""Hqq: the laws of half-quadratic splitting on blocks, and the pass on a small network."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_laws import Form, check_stored, forms, on_grids, restored, weight_blocks

from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization import hqq as module
from onnxpress.passes.quantization._rounding import Rounded, round_blocks
from onnxpress.passes.quantization.hqq import Hqq, hqq

Array = npt.NDArray[Any]
few = settings(max_examples=25, deadline=None, derandomize=True)


def fit(w: Array, form: Form, **options: Any) -> Rounded:
    bits, symmetric, dtype = form
    return hqq(w, bits=bits, symmetric=symmetric, scale_dtype=np.dtype(dtype), **options)


def loss(found: Rounded, bits: int, w: Array, p: float = 0.7) -> Array:
    return (np.abs(w - restored(found, bits)) ** p).sum(axis=1)


@few
@given(weight_blocks(), forms, st.sampled_from(["mse", "max"]), st.sampled_from([0.4, 0.7]))
def test_law_never_worse_than_rounding(w: Array, form: Form, scales: Any, p: float) -> None:
    bits, symmetric, dtype = form
    plain = round_blocks(w, bits=bits, symmetric=symmetric, scales=scales, scale_dtype=np.dtype(dtype))
    residue = 1e-9 * (np.abs(w) ** p).sum(axis=1)  # of a block that both hit: the last bits, to a small power
    assert (loss(fit(w, form, p=p), bits, w, p) <= loss(plain, bits, w, p) * (1 + 1e-9) + residue).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_splitting_gains_over_rounding(bits: int, symmetric: bool) -> None:
    w = np.random.default_rng(0).standard_t(5, (8, 32, 256))
    form = bits, symmetric, "float32"
    rounded = [
        round_blocks(w, bits=bits, symmetric=symmetric, scales=scales, scale_dtype=np.dtype("float32"))
        for scales in ("mse", "max")
    ]
    least = np.minimum(*(loss(one, bits, w) for one in rounded))
    found = loss(fit(w, form), bits, w)
    assert found.sum() < least.sum()
    assert (found < 0.999 * least).mean() > 0.02, "in some blocks neither rounding is the best"


@few
@given(weight_blocks(), forms)
def test_law_codes_and_losses_are_what_is_stored(w: Array, form: Form) -> None:
    check_stored(fit(w, form), w, form)


@few
@given(weight_blocks(), st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from([2.0**-9, 4.0, 2.0**12]))
def test_law_twice_the_weights_have_the_same_codes(w: Array, bits: int, symmetric: bool, factor: float) -> None:
    one, other = fit(w, (bits, symmetric, "float64")), fit(w * factor, (bits, symmetric, "float64"))
    np.testing.assert_array_equal(one.codes_GbN, other.codes_GbN)
    used = (w != 0).any(axis=1)  # a block of zeros has the scale 1
    np.testing.assert_array_equal(one.scale_GN[used] * factor, other.scale_GN[used])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_law_a_grid_is_reproduced(bits: int) -> None:
    for symmetric, w in zip((True, False), on_grids(np.random.default_rng(bits), bits), strict=True):
        np.testing.assert_allclose(restored(fit(w, (bits, symmetric, "float64")), bits), w, atol=1e-12)


def test_law_blocks_are_independent_and_runs_are_equal() -> None:
    w = np.random.default_rng(3).standard_normal((6, 32, 9))
    whole = fit(w, (4, False, "float32"))
    for block in range(6):
        part = fit(w[block : block + 1], (4, False, "float32"))
        np.testing.assert_array_equal(part.codes_GbN[0], whole.codes_GbN[block])
        np.testing.assert_array_equal(part.scale_GN[0], whole.scale_GN[block])


def test_law_shrinking_is_the_published_formula() -> None:
    error = np.array([[[-0.5], [-0.1], [0.0], [0.05], [0.3], [2.0]]])
    for beta, p in ((10.0, 0.7), (3.0, 0.4)):
        size = np.maximum(np.abs(error), 1e-6)
        want = np.sign(error) * np.maximum(size - size ** (p - 1) / beta, 0)
        np.testing.assert_allclose(module._shrunk(error, beta, p), want, rtol=1e-12, atol=1e-15)


def test_the_zero_point_is_where_a_plain_loop_ends() -> None:
    """One block, written down as published: codes, errors, shrinking, mean."""
    w = np.random.default_rng(4).standard_normal(32)
    scale = (w.max() - w.min()) / 15
    start = zero = np.rint(-w.min() / scale)
    beta = 10.0
    for _ in range(12):
        codes = np.clip(np.rint(w / scale + zero), 0, 15)
        error = (w - scale * (codes - zero)) / scale
        kept = np.sign(error) * np.maximum(np.abs(error) - np.abs(error) ** -0.3 / beta, 0)
        zero = np.mean(codes - (w / scale - kept))
        beta *= 1.01
    got = module._zero_point((w / scale)[None, :, None], np.array([[start]]), 4, 0.7, 12)
    np.testing.assert_allclose(got, [[zero]], rtol=1e-9)
    assert zero != start


def test_the_scale_is_where_a_plain_loop_ends() -> None:
    """Least squares on what shrinking leaves, with a whole zero point; plain least squares end elsewhere."""
    w = np.random.default_rng(5).standard_normal(32)
    x, zero = w / ((w.max() - w.min()) / 15), 7.0
    ends = []
    for is_plain in (False, True):
        scale, beta = 1.0, 10.0
        for _ in range(3):
            steps = np.clip(np.rint(x / scale), -zero, 15 - zero)
            error = x - scale * steps
            size = np.maximum(np.abs(error), 1e-6)
            kept = np.sign(error) * np.maximum(size - size**-0.3 / beta, 0)
            target = x if is_plain else x - kept
            scale = float(steps @ target / (steps @ steps))
            beta *= 1.01
        ends.append(scale)
    got = module._scale(x[None, :, None], np.array([[zero]]), 4, 0.7)
    np.testing.assert_allclose(got, [[ends[0]]], rtol=1e-9)
    assert abs(ends[0] - ends[1]) > 1e-4


def test_an_outlier_is_given_up() -> None:
    """With p < 1 weights that lie on a grid but for one are hit, and the one has all of the error."""
    w = np.arange(-8.0, 8.0).repeat(2)[None, :, None] * 0.25
    w[0, 31] *= 1.12
    error = np.abs(w - restored(fit(w, (4, False, "float64")), 4))
    assert (error < 0.02).sum() >= 31


def network(num_in: int) -> ir.Model:
    builder = graphs.Builder(num_in, 96, 0)
    table = builder.weight(96, num_in, name="table")
    x = builder.op("Gather", table, builder.ids, width=num_in, axis=0)
    for step in ("gated", "linear"):
        x = builder.step(step, x, x)
    return builder.finish(x, True, table)


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_matrix_is_coded_and_the_network_still_runs(symmetric: bool) -> None:
    model, before = network(40), graphs.run(network(40))  # 40: the last block is not full
    hqq_ = Hqq(bits=8, block_size=16, symmetric=symmetric, exclude=("head",))
    report = hqq_.run(model, Context())
    assert {one.holder for one in find_linears(model) if one.kind != "head"} == {"MatMulNBits"}
    assert len(report.ledger) == len(report.changed) > 3
    got = graphs.run(model)
    np.testing.assert_allclose(got["logits"], before["logits"], atol=0.05 * np.abs(before["logits"]).max())
    assert not hqq_.run(model, Context()).modified


@pytest.mark.parametrize("option", ["p=0.0", "p=1.0", "rounds=-1", "bits=3"])
def test_options_out_of_range(option: str) -> None:
    with pytest.raises(OptionError, match=option.partition("=")[0]):
        pipeline.parse(f"hqq({option})")
