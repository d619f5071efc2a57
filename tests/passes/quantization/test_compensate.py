"""Compensate: the tail law of the repair, what taking turns gains, the graph, one budget, targets, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration import Group
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.target import TARGETS
from onnxpress.compiler.whitening import Activation, output_directions
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._calibrated import solve
from onnxpress.passes.quantization._least_squares import Moments
from onnxpress.passes.quantization._weight_only import Coded, Format, Site
from onnxpress.passes.quantization.compensate import Compensate

Array = np.ndarray
FLOAT = np.dtype(np.float32)


def problem(rows: int = 48, columns: int = 96, *, seed: int = 0) -> tuple[Array, Array]:
    """Weights [N, K], and second moments of an activation whose features go together."""
    rng = np.random.default_rng(seed)
    x_TK = rng.standard_normal((2048, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    x_TK += 0.3 * rng.standard_normal((2048, columns))
    return rng.standard_t(5, (rows, columns)).astype(np.float32), x_TK.T @ x_TK / 2048


def loss(off_NK: Array, hessian_KK: Array) -> float:
    return float(np.einsum("nk,kl,nl->", off_NK, hessian_KK, off_NK))


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_law_what_the_repair_leaves_is_the_tail_of_the_error(shape: tuple[int, int]) -> None:
    w_NK, hessian_KK = problem(*shape)
    error = w_NK.astype(np.float64) - np.round(w_NK)
    singular = np.linalg.svd(error @ np.linalg.cholesky(hessian_KK), compute_uv=False)
    whole, before = loss(error, hessian_KK), np.inf
    for rank in (1, 8, 16, 32, min(shape)):
        first, second = output_directions(error, Activation(hessian_KK)).factors(error, rank)
        left = loss(error - (first @ second).T, hessian_KK)
        assert abs(left - float((singular[rank:] ** 2).sum())) <= 1e-8 * whole
        assert left <= before + 1e-8 * whole
        before = left
    assert before <= 1e-8 * whole


def repaired(w_NK: Array, hessian_KK: Array, *, bits: int, **options: Any) -> float:
    """The loss that codes and repair leave."""
    pass_ = Compensate(bits=bits, block_size=32, scale_bits=32, **options)
    site = Site("w", Format(bits, 32, True), lambda: w_NK, ir.DataType.FLOAT, w_NK.shape, rank=pass_.rank)
    moments = Moments(hessian_KK, pass_.damping)
    coded = pass_._repaired(w_NK, w_NK.T.copy(), site, moments, Activation(_weighed(pass_, hessian_KK)))
    return loss(coded.w_NK() - w_NK, hessian_KK)


def test_errors_are_weighed_by_what_was_asked_for() -> None:
    stats = Stats(6)
    stats.update(np.random.default_rng(0).standard_normal((50, 6)))
    np.testing.assert_array_equal(Compensate(weigh="exact")._weights(stats), stats.hessian_KK)
    np.testing.assert_array_equal(Compensate(weigh="diagonal")._weights(stats), np.diag(stats.hessian_KK.diagonal()))
    np.testing.assert_array_equal(Compensate(weigh="none")._weights(stats), np.eye(6))


def _weighed(pass_: Compensate, hessian_KK: Array) -> Array:
    choices = {"exact": hessian_KK, "diagonal": np.diag(hessian_KK.diagonal()), "none": np.eye(len(hessian_KK))}
    return choices[pass_.weigh]


@pytest.mark.parametrize("bits", [2, 4])
def test_law_repairs_gain_more_with_more_rank_and_all_moments(bits: int) -> None:
    w_NK, hessian_KK = problem(96, 96)
    moments = Moments(hessian_KK, 0.01)
    steps_KN, grid = solve(w_NK.T.copy(), Format(bits, 32, True), FLOAT, moments, rounds=2)
    plain = least_squares.quadratic(steps_KN * grid.spread(grid.scale_GN, 96) - w_NK.T, moments.plain_KK)
    exact = repaired(w_NK, hessian_KK, bits=bits, rank=16)
    assert exact < 0.75 * plain
    assert repaired(w_NK, hessian_KK, bits=bits, rank=32) < 0.8 * exact
    sizes = repaired(w_NK, hessian_KK, bits=bits, rank=16, weigh="diagonal")
    assert exact < 0.9 * sizes
    assert exact < 0.9 * repaired(w_NK, hessian_KK, bits=bits, rank=16, weigh="none")


def test_taking_turns_gains_on_average() -> None:
    problems = [problem(96, 96, seed=seed) for seed in range(5)]
    once, often = (sum(repaired(*one, bits=2, rank=16, turns=turns) for one in problems) for turns in (1, 4))
    assert often < 0.97 * once


@pytest.mark.parametrize("seed", range(4))
def test_law_never_worse_than_gptq(seed: int) -> None:
    """Errors without any direction, of which a repair takes little."""
    rng = np.random.default_rng(seed)
    w_NK = rng.standard_normal((96, 256)).astype(np.float32)
    hessian_KK = np.diag(rng.uniform(0.5, 2.0, 256))
    moments = Moments(hessian_KK, 0.01)
    steps_KN, grid = solve(w_NK.T.copy(), Format(4, 32, True), FLOAT, moments, rounds=2)
    plain = least_squares.quadratic(steps_KN * grid.spread(grid.scale_GN, 256) - w_NK.T, moments.plain_KK)
    assert repaired(w_NK, hessian_KK, bits=4, rank=16) <= plain * (1 + 1e-6)


def test_a_matrix_that_gains_nothing_is_what_gptq_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    w_NK, hessian_KK = problem()
    side = Compensate._side

    def useless(self: Compensate, left_KN: Array, *rest: Any) -> Any:
        return side(self, 3 * left_KN, *rest)  # three times what is off: worse than none

    monkeypatch.setattr(Compensate, "_side", useless)
    moments = Moments(hessian_KK, 0.01)
    steps_KN, grid = solve(w_NK.T.copy(), Format(2, 32, True), FLOAT, moments, rounds=2)
    pass_ = Compensate(rank=16, bits=2, block_size=32, scale_bits=32)
    site = Site("w", Format(2, 32, True), lambda: w_NK, ir.DataType.FLOAT, w_NK.shape, rank=16)
    coded = pass_._repaired(w_NK, w_NK.T.copy(), site, moments, Activation(hessian_KK))
    assert coded.side is None
    assert "rank" not in coded.facts
    assert np.array_equal(coded.w_NK(), (steps_KN * grid.spread(grid.scale_GN, 96)).T)


@pytest.fixture(params=["llama", "gpt2"])
def fused(request: pytest.FixtureRequest, tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    source = models.load(tiny_export(request.param), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    return source.model


def run(model: ir.Model, passes: str, **context: Any) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), **context)
    return pipeline.run(model, pipeline.parse(passes), made)[-1][1]


def squared_error(model: ir.Model, passes: str, want: Array) -> float:
    run(model, passes)
    return float(((graphs.logits(model) - want) ** 2).mean())


TEXT = "tokens=2048, length=64, exclude=('head', 'embedding')"


def test_outputs_are_nearer_than_those_of_gptq(fused: ir.Model) -> None:
    want = graphs.logits(fused)
    options = f"bits=2, block_size=32, {TEXT}"
    plain = squared_error(fused.clone(), f"gptq({options})", want)
    assert squared_error(fused.clone(), f"compensate({options}, rank=16)", want) < 0.8 * plain


def test_the_graph_computes_with_what_was_found(fused: ir.Model) -> None:
    reference = fused.clone()
    report = run(fused, f"compensate(rank=16, bits=4, accuracy_level=0, {TEXT})")
    rows = {row["site"]: row for row in report.ledger}
    repaired = [row for row in rows.values() if row.get("rank") == 16]
    assert repaired
    for row in repaired:
        (num_out, num_in), codes = row["shape"], row["shape"][0] * row["shape"][1] // 2
        assert row["bytes"] > codes + 16 * (num_out + num_in)  # thin matrices are counted
    stored = {value.name: value for value in fused.graph.initializers.values()}
    assert any(name.endswith(".A.codes") for name in stored)
    found = {one.name: one for one in find_linears(fused)}
    assert {name for name in found if not name.endswith(".side")} == {one.name for one in find_linears(reference)}
    for old in find_linears(reference):
        if old.name in rows:
            w_NK = found[old.name].w_NK()
            if f"{old.name}.side" in found:
                w_NK = w_NK + found[f"{old.name}.side"].w_NK()
            w_NK = np.array(w_NK)  # what it is read from goes
            old.set_weight(lambda w_NK=w_NK: w_NK, f"{old.name}.new")
    want, got = graphs.logits(reference), graphs.logits(fused)
    assert np.abs(want - got).max() < 0.02 * np.abs(want).max()  # activations of 8-bit products are rounded
    again = run(fused, f"compensate(rank=16, bits=4, accuracy_level=0, {TEXT})")
    assert not again.modified


def test_a_budget_goes_to_those_that_gain_most(fused: ir.Model) -> None:
    untouched = fused.clone()
    whole = run(fused.clone(), f"compensate(rank=16, {TEXT})")
    everything = [row["site"] for row in whole.ledger if "rank" in row]
    report = run(fused, f"compensate(rank=16, size='12kB', probe=64, {TEXT})")
    some = [row["site"] for row in report.ledger if row.get("rank")]
    assert 0 < len(some) < len(everything)
    told = f"{len(some)} of {len(everything)} matrices that can be repaired are, within 12kB: {len(some)} with rank 16"
    assert told in report.notes
    none = run(untouched, f"compensate(rank=16, size='1kB', probe=64, {TEXT})")
    assert none.ledger
    assert not any(row.get("rank") for row in none.ledger)
    assert any("within 1kB; a larger size repairs some" in note for note in none.notes)


def test_a_budget_is_kept_in_the_file(fused: ir.Model, tmp_path: Path) -> None:
    written = []
    few = "scale_bits=32, tokens=256, length=32, exclude=('head', 'embedding')"
    for number, passes in enumerate((f"gptq({few})", f"compensate(rank=16, size='30kB', probe=64, {few})")):
        model = fused.clone()
        run(model, passes)
        ir.save(model, tmp_path / f"{number}.onnx", external_data=f"{number}.data")
        written.append(sum(one.stat().st_size for one in tmp_path.glob(f"{number}.*")))
    assert 10_000 < written[1] - written[0] <= 30_000


def test_bytes_of_a_rank_are_those_of_its_matrices() -> None:
    w_NK, hessian_KK = problem(80, 160)
    sizes_of: dict[tuple[int, int], int] = {}
    for scale_bits in (8, 32):
        pass_ = Compensate(rank=32, size="1MB", scale_bits=scale_bits, block_size=32)
        site = Site("w", Format(4, 32, True), lambda: w_NK, ir.DataType.FLOAT, w_NK.shape)
        assert pass_._ranks(site) == [16, 32]
        assert Compensate(rank=32)._ranks(site) == [32]
        assert Compensate(rank=48)._ranks(site) == []
        for rank in (16, 32):
            side = pass_._side(w_NK.T.copy(), rank, Moments(hessian_KK, 0.01), Activation(hessian_KK), FLOAT)
            assert pass_._nbytes(site, rank) == side[0].nbytes + side[1].nbytes
            sizes_of[scale_bits, rank] = pass_._nbytes(site, rank)
    assert sizes_of[8, 16] < sizes_of[32, 16] < sizes_of[8, 32] < sizes_of[32, 32]


def test_on_cuda_all_is_float16(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("llama"), work_dir=tmp_path)
    cuda = {"target": TARGETS["cuda"], "config": source.config}
    pipeline.run(source.model, pipeline.parse("fuse"), Context(**cuda))
    run(source.model, f"cast_float16, compensate(rank=16, {TEXT})", **cuda)
    products = [node for node in source.model.graph if node.op_type == "MatMulNBits"]
    thin = [node for node in products if (node.name or "").endswith(("/A", "/B"))]
    assert thin
    for node in thin:
        assert node.inputs[2].dtype == ir.DataType.FLOAT16
        assert node.attributes["bits"].as_int() == 8
        assert node.outputs[0].dtype == ir.DataType.FLOAT16
    adds = [node for node in source.model.graph if (node.name or "").endswith("/repair")]
    assert 2 * len(adds) == len(thin)
    assert all(value.dtype == ir.DataType.FLOAT16 for node in adds for value in (*node.inputs, *node.outputs))


KEPT = "exclude=('head', 'embedding')"
LATER = ["pack", "simplify", f"rtn(requantize=True, bits=8, {KEPT})", f"gptq(tokens=64, length=32, {KEPT})"]


@pytest.mark.parametrize("later", LATER)
def test_later_passes_take_the_repair_for_what_it_is(fused: ir.Model, later: str) -> None:
    run(fused, f"compensate(rank=16, accuracy_level=0, tokens=256, length=32, {KEPT})")
    before = {one.name: np.array(one.w_NK()) for one in find_linears(fused)}
    assert any(name.endswith(".side") for name in before)
    want = graphs.logits(fused)
    run(fused, later)
    if later == "pack":
        assert np.abs(graphs.logits(fused) - want).max() < 1e-3 * np.abs(want).max()
        return
    after = {one.name: one.w_NK() for one in find_linears(fused)}
    assert before.keys() == after.keys()
    for name, w_NK in before.items():
        assert np.linalg.norm(after[name] - w_NK) <= 0.01 * np.linalg.norm(w_NK)
    if "bits=8" not in later:  # whose kernel rounds activations
        assert np.array_equal(graphs.logits(fused), want)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("size", ["", ", size='20kB', probe=32"])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    fused: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    passes, fits, real = f"compensate(rank=16, tokens=256, length=32{size})", [], Compensate._fit

    def fit(self: Compensate, group: Group, site_of: dict[int, Site]) -> list[Coded]:
        if len(fits) == 3 and not resumed:
            raise Killed
        fits.append(group)
        return real(self, group, site_of)

    monkeypatch.setattr(Compensate, "_fit", fit)
    want, broken, resumed = fused.clone(), fused.clone(), True
    plain = run(want, passes)
    fits, resumed = [], False
    with pytest.raises(Killed):
        run(broken, passes, journal=Journal(tmp_path / "journal"))
    resumed = True
    report = run(fused, passes, journal=Journal(tmp_path / "journal"))
    assert any("an earlier run was stopped: 3 of" in note for note in report.notes)
    assert graphs.text(fused) == graphs.text(want)
    assert report.ledger == plain.ledger


def test_matrices_that_are_too_small_are_told(fused: ir.Model) -> None:
    report = run(fused, f"compensate(rank=48, {TEXT})")
    assert "no float matrix is large enough to be repaired by a product of rank 48" in report.notes
    assert report.ledger
    assert not any("rank" in row for row in report.ledger)


def test_text_round_trip() -> None:
    text = "compensate(bits=2, block_size=64, rank=48, turns=1, weigh='diagonal', size='2MB')"
    assert str(pipeline.parse(text)) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rank=8", "rank must be a multiple of 16"),
        ("turns=0", "turns must be at least 1"),
        ("size='some'", "size must be a size such as '2MB'"),
        ("probe=1", "probe must be at least 16"),
        ("weigh='exactly'", "weigh must be exact or diagonal or none"),
    ],
)
def test_options_are_checked(options: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pipeline.parse(f"compensate({options})")
