"""Laws of the solvers behind gptq, and the pass on small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline, stats
from onnxpress.compiler.calibration import Group
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import CalibrationError, NumericalError, OptionError, StreamingError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._grids import fit_grid
from onnxpress.passes.quantization._least_squares import Grid, Moments
from onnxpress.passes.quantization._weight_only import Coded, Site
from onnxpress.passes.quantization.gptq import Gptq
from onnxpress.passes.quantization.rtn import Rtn

Array = np.ndarray


def problem(columns: int = 64, rows: int = 48, *, seed: int = 0, tokens: int = 2048) -> tuple[Array, Array]:
    """Weights [K, N] with heavy tails, and second moments of an activation whose features go together."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns // 4, columns))
    x_TK = rng.standard_normal((tokens, columns // 4)) @ mixing + 0.3 * rng.standard_normal((tokens, columns))
    x_TK[:, :: columns // 4] *= 5
    return rng.standard_t(5, (columns, rows)).astype(np.float32), x_TK.T @ x_TK / tokens


def grid_of(w_KN: Array, hessian_KK: Array, bits: int = 4, *, symmetric: bool = True, block_size: int = 16) -> Grid:
    return fit_grid(w_KN, hessian_KK.diagonal(), bits=bits, block_size=block_size, symmetric=symmetric)


def nearest(w_KN: Array, grid: Grid) -> Array:
    return np.stack([grid.step(row, column) for column, row in enumerate(w_KN)])


def loss(steps_KN: Array, w_KN: Array, hessian_KK: Array, grid: Grid) -> float:
    off_KN = steps_KN * grid.spread(grid.scale_GN, len(w_KN)) - w_KN
    return least_squares.quadratic(off_KN, hessian_KK.astype(np.float32))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_law_a_sweep_gains_much_on_features_that_go_together(bits: int, symmetric: bool) -> None:
    w_KN, hessian_KK = problem()
    grid = grid_of(w_KN, hessian_KK, bits, symmetric=symmetric)
    before = loss(nearest(w_KN, grid), w_KN, hessian_KK, grid)
    after = loss(least_squares.sweep(w_KN, Moments(hessian_KK, 0.01), grid), w_KN, hessian_KK, grid)
    assert after <= 0.35 * before


def test_law_features_apart_are_rounded_to_the_nearest() -> None:
    w_KN, hessian_KK = problem()
    apart_KK = np.diag(hessian_KK.diagonal())
    grid = grid_of(w_KN, apart_KK)
    np.testing.assert_array_equal(least_squares.sweep(w_KN, Moments(apart_KK, 0.01), grid), nearest(w_KN, grid))


@pytest.mark.parametrize("width", [1, 7, 64])
def test_law_the_internal_width_does_not_matter(width: int) -> None:
    w_KN, hessian_KK = problem(seed=1)
    grid = grid_of(w_KN, hessian_KK)
    swept = [least_squares.sweep(w_KN, Moments(hessian_KK, 0.01), grid, width=one) for one in (32, width)]
    np.testing.assert_array_equal(*swept)
    for steps, one in zip(swept, (32, width), strict=True):
        least_squares.descend(steps, w_KN, Moments(hessian_KK, 1e-9), grid, width=one)
    np.testing.assert_array_equal(*swept)


def test_law_a_sweep_is_gptq() -> None:
    """The form without an inverse gives the codes of the published one, column by column with chol(inv(H))."""
    w_KN, hessian_KK = problem(columns=32, rows=8)
    grid = grid_of(w_KN, hessian_KK)
    order = np.argsort(-hessian_KK.diagonal(), kind="stable")
    inverse = np.linalg.inv(stats.damped(hessian_KK, 0.01)[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    work, steps = w_KN[order].astype(np.float64), np.empty_like(w_KN)
    for j, column in enumerate(order):
        steps[column] = grid.step(work[j], int(column))
        error = (work[j] - steps[column] * grid.scale_GN[column // 16]) / upper[j, j]
        work[j + 1 :] -= upper[j, j + 1 :, None] * error
    np.testing.assert_array_equal(least_squares.sweep(w_KN, Moments(hessian_KK, 0.01), grid), steps)


def test_law_descent_never_loses_and_ends_where_no_code_alone_gains() -> None:
    w_KN, hessian_KK = problem(columns=32, rows=12, seed=2)
    grid = grid_of(w_KN, hessian_KK, symmetric=False)
    steps_KN = nearest(w_KN, grid)
    losses = [loss(steps_KN, w_KN, hessian_KK, grid)]
    while least_squares.descend(steps_KN, w_KN, Moments(hessian_KK, 1e-9), grid):
        losses.append(loss(steps_KN, w_KN, hessian_KK, grid))
        assert len(losses) < 100
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    for column in range(0, 32, 5):
        for move in (-1, 1):
            moved = steps_KN.copy()
            zero = grid.zero_GN[column // 16]
            moved[column] = np.clip(moved[column] + move, -zero, 15 - zero)
            assert loss(moved, w_KN, hessian_KK, grid) >= losses[-1] * (1 - 1e-5)


def test_law_refitted_scales_never_lose_and_are_stationary() -> None:
    w_KN, hessian_KK = problem(seed=3)
    grid = grid_of(w_KN, hessian_KK, bits=2, symmetric=False)
    steps_KN = least_squares.sweep(w_KN, Moments(hessian_KK, 0.01), grid)
    before = loss(steps_KN, w_KN, hessian_KK, grid)
    grid.scale_GN = least_squares.refit(steps_KN, w_KN, Moments(hessian_KK, 1e-9), grid)
    after = loss(steps_KN, w_KN, hessian_KK, grid)
    assert after < 0.99 * before
    for factor in (0.999, 1.001):
        other = Grid(grid.scale_GN * np.float32(factor), grid.zero_GN, 2, 16)
        assert loss(steps_KN, w_KN, hessian_KK, other) >= after


def test_refit_keeps_the_scale_of_a_block_without_steps() -> None:
    w_KN, hessian_KK = problem()
    grid = grid_of(w_KN, hessian_KK)
    steps_KN = nearest(w_KN, grid)
    steps_KN[16:32, 5] = 0
    scales = least_squares.refit(steps_KN, w_KN, Moments(hessian_KK, 1e-9), grid)
    assert scales[1, 5] == pytest.approx(grid.scale_GN[1, 5])
    assert np.isfinite(scales).all()


def test_law_the_teachers_target_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(4)
    x_TK = rng.standard_normal((400, 24))
    x0_TK = x_TK + 0.2 * rng.standard_normal((400, 24)) + 0.1 * x_TK[:, ::-1]
    w_KN = rng.standard_normal((24, 6)).astype(np.float32)
    hessian, drift = x_TK.T @ x_TK / 400, (x0_TK - x_TK).T @ x_TK / 400
    best, *_ = np.linalg.lstsq(x_TK, x0_TK @ w_KN, rcond=None)
    got = w_KN + stats.teacher_correction(hessian, drift, 1e-9) @ w_KN
    np.testing.assert_allclose(got, best, atol=1e-5)
    held = stats.teacher_correction(hessian, drift, 1e6) @ w_KN
    assert np.abs(held).max() < 1e-5


def test_dead_features_and_broken_moments() -> None:
    w_KN, hessian_KK = problem()
    hessian_KK[:, 3] = hessian_KK[3] = 0
    grid = grid_of(w_KN, hessian_KK)
    steps_KN = least_squares.sweep(w_KN, Moments(hessian_KK, 0.01), grid)
    np.testing.assert_array_equal(steps_KN[3], grid.step(w_KN[3], 3))
    with pytest.raises(NumericalError, match="not positive semidefinite"):
        least_squares.factor(-np.eye(4) * 1e6 + np.ones((4, 4)), 0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_law_a_grid_never_loses_to_the_plain_range(bits: int, symmetric: bool) -> None:
    w_KN, hessian_KK = problem(seed=5)
    importance = hessian_KK.diagonal()
    weighted, plain = grid_of(w_KN, hessian_KK, bits, symmetric=symmetric), grid_of(w_KN, np.eye(64), bits)
    assert (weighted.zero_GN == np.rint(weighted.zero_GN)).all()
    if symmetric:
        apart = np.diag(importance)
        assert loss(nearest(w_KN, weighted), w_KN, apart, weighted) <= loss(nearest(w_KN, plain), w_KN, apart, plain)
    largest = np.abs(w_KN - nearest(w_KN, weighted) * weighted.spread(weighted.scale_GN, 64)).max()
    assert largest < np.abs(w_KN).max()


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def fused(request: pytest.FixtureRequest, tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    source = models.load(tiny_export(request.param), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    return source.model


def squared_error(model: ir.Model, passes: str, want: Array) -> float:
    context = Context(calibration=CalibrationText(vocab_size=200, seed=1))
    pipeline.run(model, pipeline.parse(passes), context)
    return float(((graphs.logits(model) - want) ** 2).mean())


@pytest.mark.parametrize("fused", ["llama", "gpt2"], indirect=True)  # a router that flips hides what a fit gains
def test_outputs_on_other_tokens_are_nearer_than_those_of_rounding(fused: ir.Model) -> None:
    want, options = graphs.logits(fused), "bits=4, accuracy_level=0, exclude=('head', 'embedding')"
    rounded = squared_error(fused.clone(), f"rtn({options})", want)
    own_layer = squared_error(fused.clone(), f"gptq({options}, tokens=4096, length=64, teacher=False)", want)
    fitted = squared_error(fused.clone(), f"gptq({options}, tokens=4096, length=64)", want)
    assert own_layer < 0.8 * rounded
    assert fitted < 0.97 * own_layer, "the teacher's targets make up for errors of earlier layers"


def test_the_same_text_gives_the_same_bytes(fused: ir.Model) -> None:
    passes, found = "gptq(tokens=256, length=32)", []
    for _ in range(2):
        model = fused.clone()
        ((_, report),) = pipeline.run(
            model, pipeline.parse(passes), Context(calibration=CalibrationText(vocab_size=200))
        )
        found.append(graphs.text(model))
    assert found[0] == found[1]
    assert report.calibration["windows"] == [8, 32]
    assert all(0 < row["output_error"] < 0.2 for row in report.ledger if row["kind"] != "embedding")


def test_the_kernel_computes_with_the_codes_that_were_chosen(fused: ir.Model) -> None:
    reference = fused.clone()
    passes = "gptq(tokens=256, length=32, accuracy_level=0, symmetric=False, block_size=32)"
    pipeline.run(fused, pipeline.parse(passes), Context(calibration=CalibrationText(vocab_size=200)))
    chosen = {one.name: one.w_NK() for one in find_linears(fused)}
    for one in find_linears(reference):
        if one.holder != "MatMulNBits" and one.name in chosen:
            one.set_weight(lambda name=one.name: chosen[name], f"{one.name}.new")
    for old, new in zip(find_embeddings(reference), find_embeddings(fused), strict=True):
        old.table.const_value = ir.tensor(new.table_VH(), name=old.table.name)
    want, got = graphs.logits(reference), graphs.logits(fused)
    assert np.abs(want - got).max() < 1e-3 * np.abs(want).max()


def test_weights_that_are_not_finite_are_left(fused: ir.Model) -> None:
    linear = find_linears(fused)[-2]
    broken = linear.w_NK().copy()
    broken[0, 0] = np.nan
    linear.set_weight(lambda: broken, "broken")
    ((_, report),) = pipeline.run(fused, pipeline.parse("gptq(tokens=64, length=16)"), Context())
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons[linear.name] == "weights are not finite"
    assert reasons["head"] == "its activation is not finite on the calibration text"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 3, 6])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    fused: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    passes = pipeline.parse("gptq(tokens=256, length=32)")
    fits, real = [], Gptq._fit

    def context() -> Context:
        return Context(calibration=CalibrationText(vocab_size=200), journal=Journal(tmp_path / "journal"))

    def fit(self: Gptq, group: Group, site_of: dict[int, Site]) -> list[Coded]:
        if len(fits) == moment and not resumed:
            raise Killed
        fits.append([one.name for one in group.linears])
        return real(self, group, site_of)

    monkeypatch.setattr(Gptq, "_fit", fit)
    want, broken, resumed = fused.clone(), fused.clone(), True
    pipeline.run(want, passes, Context(calibration=CalibrationText(vocab_size=200)))
    everything, fits, resumed = list(fits), [], False
    with pytest.raises(Killed):
        pipeline.run(broken, passes, context())
    resumed = True
    report = pipeline.run(fused, passes, context())[-1][1]
    assert report.notes == [f"an earlier run was stopped: {moment} of {len(everything)} groups are its results"]
    assert fits == everything, "each unit is worked on once"
    assert graphs.text(fused) == graphs.text(want)


def test_other_weights_do_not_resume(fused: ir.Model, tmp_path: Path) -> None:
    passes = pipeline.parse("gptq(tokens=256, length=32)")
    context = Context(calibration=CalibrationText(vocab_size=200), journal=Journal(tmp_path / "journal"))
    other, want = fused.clone(), fused.clone()
    pipeline.run(other, passes, context)
    for model in (fused, want):
        linear = next(one for one in find_linears(model) if one.kind == "down")
        changed = linear.w_NK() * np.float32(1.5)
        linear.set_weight(lambda changed=changed: changed, "changed")
    pipeline.run(fused, passes, context)
    pipeline.run(want, passes, Context(calibration=CalibrationText(vocab_size=200)))
    assert graphs.text(fused) == graphs.text(want)


@pytest.mark.parametrize("option", ["tokens=0", "length=0", "damping=0.0", "ridge=0.0", "rounds=-1", "bits=3"])
def test_options_out_of_range(option: str) -> None:
    with pytest.raises(OptionError, match=option.partition("=")[0]):
        pipeline.parse(f"gptq({option})")


def test_what_no_text_reaches_is_rounded_only_if_asked_for() -> None:
    def network() -> ir.Model:
        builder = graphs.Builder(64, 200, 0)
        table = builder.weight(200, 64, name="table", scale=1.0)
        x = builder.op("Gather", table, builder.ids, width=64, axis=0)
        model = builder.finish(builder.step("gated", x, x), False, table)
        model.graph.inputs.append(ir.val("pixel_values", ir.DataType.FLOAT, ["batch", 3, "height", "width"]))
        return model

    with pytest.raises(StreamingError, match="pixel_values"):
        Gptq().run(network(), Context())
    fitted, rounded = network(), network()
    text = CalibrationText(vocab_size=200, own=lambda tokens, length: np.ones((1, 8), np.int64))
    report = Gptq(fallback=True).run(fitted, Context(calibration=text))
    Rtn().run(rounded, Context())
    assert graphs.text(fitted) == graphs.text(rounded)
    assert len(report.changed) == 5
    assert any("not fitted to text" in note and "pixel_values" in note for note in report.notes)


def test_text_that_is_too_short_is_an_error_all_the_same(tiny_export: Callable[..., Path], fused: ir.Model) -> None:
    tokenizer = tiny_export("llama") / "tokenizer.json"
    context = Context(calibration=CalibrationText(texts={"note.txt": "x"}, tokenizer=tokenizer, vocab_size=320))
    with pytest.raises(CalibrationError, match="expected text"):
        Gptq(fallback=True).run(fused.clone(), context)


def test_random_tokens_are_fitted_to_only_if_asked_for(fused: ir.Model) -> None:
    rounded = fused.clone()
    report = Gptq(fallback=True, tokens=64, length=16).run(fused, Context())
    assert report.notes == [
        "rounded to the nearest, not fitted to text, from here on: the model has no tokenizer.json, and random tokens "
        "are no text"
    ]
    Rtn().run(rounded, Context())
    assert graphs.text(fused) == graphs.text(rounded)
