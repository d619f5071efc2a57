"""Compensate: the tail law of the repair, what taking turns gains, the graph, one budget, and resuming."""

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
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.stats import Stats
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


def _weighed(pass_: Compensate, hessian_KK: Array) -> Array:
    choices = {"exact": hessian_KK, "diagonal": np.diag(hessian_KK.diagonal()), "none": np.eye(len(hessian_KK))}
    return choices[pass_.weigh]


@pytest.mark.parametrize("bits", [2, 4])
def test_law_repairs_gain_more_with_every_turn_more_rank_and_all_moments(bits: int) -> None:
    w_NK, hessian_KK = problem(96, 96)
    moments = Moments(hessian_KK, 0.01)
    steps_KN, grid = solve(w_NK.T.copy(), Format(bits, 32, True), FLOAT, moments, rounds=2)
    plain = least_squares.quadratic(steps_KN * grid.spread(grid.scale_GN, 96) - w_NK.T, moments.plain_KK)
    exact = repaired(w_NK, hessian_KK, bits=bits, rank=16)
    assert exact < 0.75 * plain
    assert exact <= repaired(w_NK, hessian_KK, bits=bits, rank=16, turns=1)
    assert repaired(w_NK, hessian_KK, bits=bits, rank=32) < 0.8 * exact
    sizes = repaired(w_NK, hessian_KK, bits=bits, rank=16, weigh="diagonal")
    assert exact < 0.9 * sizes
    assert exact < 0.9 * repaired(w_NK, hessian_KK, bits=bits, rank=16, weigh="none")


def test_errors_are_weighed_by_what_was_asked_for() -> None:
    stats = Stats(6)
    stats.update(np.random.default_rng(0).standard_normal((50, 6)))
    np.testing.assert_array_equal(Compensate(weigh="exact")._weights(stats), stats.hessian_KK)
    np.testing.assert_array_equal(Compensate(weigh="diagonal")._weights(stats), np.diag(stats.hessian_KK.diagonal()))
    np.testing.assert_array_equal(Compensate(weigh="none")._weights(stats), np.eye(6))


@pytest.fixture(params=["llama", "gpt2"])
def fused(request: pytest.FixtureRequest, tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    source = models.load(tiny_export(request.param), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    return source.model


def run(model: ir.Model, passes: str, **context: Any) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), **context)
    return pipeline.run(model, pipeline.parse(passes), made)[-1][1]


def logits(model: ir.Model) -> Array:
    inputs = feeds(model.graph, np.random.default_rng(9).integers(3, 200, (4, 48)))
    session = graphs.session(model)
    return np.concatenate([session.run(["logits"], window)[0] for window in inputs])


def squared_error(model: ir.Model, passes: str, want: Array) -> float:
    run(model, passes)
    return float(((logits(model) - want) ** 2).mean())


TEXT = "tokens=2048, length=64, exclude=('head', 'embedding')"


def test_outputs_are_nearer_than_those_of_gptq(fused: ir.Model) -> None:
    want = logits(fused)
    options = f"bits=2, block_size=32, {TEXT}"
    plain = squared_error(fused.clone(), f"gptq({options})", want)
    assert squared_error(fused.clone(), f"compensate({options}, rank=16)", want) < 0.8 * plain


def test_the_graph_computes_with_what_was_found(fused: ir.Model) -> None:
    reference = fused.clone()
    report = run(fused, f"compensate(rank=16, bits=4, accuracy_level=0, {TEXT})")
    rows = {row["site"]: row for row in report.ledger}
    assert any(row.get("rank") == 16 for row in rows.values())
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
    want, got = logits(reference), logits(fused)
    assert np.abs(want - got).max() < 0.02 * np.abs(want).max()  # activations of 8-bit products are rounded
    again = run(fused, f"compensate(rank=16, bits=4, accuracy_level=0, {TEXT})")
    assert not again.modified


def test_a_budget_goes_to_those_that_gain_most(fused: ir.Model) -> None:
    whole = run(fused.clone(), f"compensate(rank=16, {TEXT})")
    everything = [row["site"] for row in whole.ledger if "rank" in row]
    report = run(fused, f"compensate(rank=16, size='12kB', probe=64, {TEXT})")
    some = [row["site"] for row in report.ledger if row.get("rank")]
    assert 0 < len(some) < len(everything)
    assert f"{len(some)} of {len(everything)} matrices that can be repaired are, within 12kB" in report.notes
    none = run(fused, f"compensate(rank=16, size='1kB', probe=64, requantize=True, {TEXT})")
    assert not any(row.get("rank") for row in none.ledger)


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    fused: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, fits, real = "compensate(rank=16, tokens=256, length=32)", [], Compensate._fit

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
