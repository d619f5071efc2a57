"""Svd: Eckart and Young's law, the break-even check, and the pair that later passes see."""

from __future__ import annotations

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.low_rank.svd import Svd, aligned, factors, rank_of_energy, spectrum

SHAPES = [(24, 40), (40, 24), (32, 32)]


def matrix(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_law_loss_is_the_tail(shape: tuple[int, int], rank: int) -> None:
    w_NK = matrix(shape)
    found = spectrum(w_NK)
    b_Nr, a_rK = factors(w_NK, found, rank)
    assert b_Nr.shape == (shape[0], rank)
    assert a_rK.shape == (rank, shape[1])
    loss = np.sum((w_NK - b_Nr @ a_rK) ** 2)
    assert loss == pytest.approx(np.sum(np.linalg.svd(w_NK, compute_uv=False)[rank:] ** 2), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_law_full_rank_reproduces(shape: tuple[int, int]) -> None:
    w_NK = matrix(shape)
    b_Nr, a_rK = factors(w_NK, spectrum(w_NK), min(shape))
    assert np.allclose(b_Nr @ a_rK, w_NK, atol=1e-9)


def test_a_matrix_of_low_rank_is_found() -> None:
    w_NK = matrix((40, 3)) @ matrix((3, 24))
    assert rank_of_energy(spectrum(w_NK).sigma_k, 1 - 1e-9) == 3


def test_zero_matrix_gives_zero_factors() -> None:
    zero = np.zeros((16, 16))
    b_Nr, a_rK = factors(zero, spectrum(zero), 4)
    assert not (b_Nr @ a_rK).any()


def test_ranks_are_aligned() -> None:
    assert [aligned(n) for n in (1, 7, 8, 15, 63, 64, 250)] == [1, 7, 8, 8, 56, 64, 224]


def network(tied: bool = False) -> ir.Model:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    return builder.finish(builder.step("residual", builder.step("gated", x, x), x), tied, table)


def test_factors_run_and_are_seen_as_a_pair() -> None:
    model = network()
    before = {one.name: one.shape for one in find_linears(model)}
    report = Svd(ratio=0.3).run(model, Context())
    assert report.bytes_after < report.bytes_before
    assert report.metrics["parameters_after"] <= 0.7 * report.metrics["parameters_before"]
    after = find_linears(model)
    assert {one.name.removesuffix(".B"): one.shape for one in after}.keys() == before.keys() or len(after) == len(
        before
    )
    assert all(one.holder == "pair" for one in after)
    graphs.run(model)


def test_energy_of_nearly_one_keeps_the_outputs() -> None:
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    low = (builder.rng.standard_normal((64, 4)) @ builder.rng.standard_normal((4, 64))).astype(np.float32)
    model = builder.finish(builder.op("MatMul", x, builder.const(low, "low"), width=64), True, table)
    before = graphs.run(model)
    Svd(energy=0.999999).run(model, Context())
    check.close(before["logits"], graphs.run(model)["logits"], tolerance=2e-3)


def test_a_rank_that_does_not_pay_is_an_error_with_a_hint() -> None:
    with pytest.raises(OptionError, match="makes no matrix smaller"):
        Svd(rank=63).run(network(), Context())


def test_tied_head_stays() -> None:
    report = Svd(ratio=0.3).run(network(tied=True), Context())
    assert any("embedding" in skip.reason for skip in report.skipped)


@pytest.mark.parametrize("text", ["svd", "svd(rank=4, ratio=0.3)", "svd(ratio=1.5)", "svd(rank=0)"])
def test_wrong_options(text: str) -> None:
    with pytest.raises(OptionError):
        pipeline.parse(text)


def test_an_exclusion_without_effect_is_an_error() -> None:
    with pytest.raises(OptionError, match="matches no linear"):
        Svd(ratio=0.3, exclude=("blokc*",)).run(network(), Context())


def test_factors_can_be_quantized() -> None:
    model = network()
    pipeline.run(model, pipeline.parse("svd(ratio=0.3), rtn(bits=8, block_size=16)"), Context())
    assert all(one.is_quantized for one in find_linears(model, expand_pairs=True))
    graphs.run(model)
