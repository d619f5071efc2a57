"""Svd_llm: the tail law, the best factors there are, one budget over all matrices, and what the text does for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
from onnxpress.compiler.artifact import write_graph
from onnxpress.compiler.calibration import Group
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import OptionError, UnsupportedModelError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.whitening import Activation, balanced, output_directions
from onnxpress.passes.low_rank.svd_llm import SvdLlm
from onnxpress.passes.quantization.gptq import Gptq

Array = np.ndarray
few = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array]:
    """Weights [N, K], and second moments of an activation that may have fewer directions than features."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    rows, columns = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    x_TK = rng.standard_normal((draw(st.integers(2, 60)), columns)) * 3.0 ** rng.integers(-3, 3, columns)
    if draw(st.booleans()):
        x_TK[:, 0] = 0
    return rng.standard_normal((rows, columns)), x_TK.T @ x_TK


def lost(w_NK: Array, v_NK: Array, hessian_KK: Array) -> float:
    off = v_NK - w_NK
    return float(np.einsum("nk,kl,nl->", off, hessian_KK, off))


@few
@given(problems(), st.integers(1, 24))
def test_law_the_loss_is_what_is_dropped_of_the_singular_values(problem: tuple[Array, Array], rank: int) -> None:
    w_NK, hessian_KK = problem
    rank = min(rank, *w_NK.shape)
    found = output_directions(w_NK, Activation(hessian_KK))
    first, second = found.factors(w_NK, rank)
    assert (first.shape, second.shape) == ((w_NK.shape[1], rank), (rank, w_NK.shape[0]))
    whole = lost(w_NK, 0 * w_NK, hessian_KK)
    # An independent root: that of the activation's own singular values.
    values, vectors = np.linalg.eigh(hessian_KK)
    singular = np.linalg.svd(w_NK @ (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T, compute_uv=False)
    loss = lost(w_NK, (first @ second).T, hessian_KK)
    assert abs(loss - float((singular[rank:] ** 2).sum())) <= 1e-8 * whole
    assert abs(found.dropped(rank) - loss) <= 1e-8 * whole


@few
@given(problems())
def test_law_more_rank_never_loses_more_and_full_rank_nothing(problem: tuple[Array, Array]) -> None:
    w_NK, hessian_KK = problem
    found = output_directions(w_NK, Activation(hessian_KK))
    pairs = [found.factors(w_NK, rank) for rank in range(1, min(w_NK.shape) + 1)]
    losses = [lost(w_NK, (first @ second).T, hessian_KK) for first, second in pairs]
    whole = lost(w_NK, 0 * w_NK, hessian_KK)
    assert all(later <= earlier + 1e-9 * whole for earlier, later in itertools.pairwise(losses))
    assert losses[-1] <= 1e-8 * whole


def test_law_the_cholesky_factor_gives_the_same() -> None:
    rng = np.random.default_rng(0)
    for rows, columns in ((20, 48), (48, 20)):
        w_NK, x_TK = (
            rng.standard_normal((rows, columns)),
            rng.standard_normal((200, columns)) @ np.diag(np.geomspace(1, 100, columns)),
        )
        hessian_KK = x_TK.T @ x_TK
        singular = np.linalg.svd(w_NK @ np.linalg.cholesky(hessian_KK), compute_uv=False)
        found = output_directions(w_NK, Activation(hessian_KK)).energy
        np.testing.assert_allclose(found, singular**2, rtol=1e-8, atol=1e-10 * singular[0] ** 2)


def test_law_balanced_factors_have_equal_norms_and_the_same_product() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((12, 5)) * 1e4, rng.standard_normal((5, 7)) * 1e-4
    first[:, 4], second[3] = 0, 0
    one, two = balanced(first, second)
    np.testing.assert_allclose(one @ two, first @ second, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((one**2).sum(axis=0)[:3], (two**2).sum(axis=1)[:3])
    assert np.isfinite(one).all()
    assert np.isfinite(two).all()


def test_law_the_target_and_its_best_low_rank_form_are_the_best_for_the_teachers_outputs() -> None:
    """No other second factor, for the first one that was found, is nearer to the teacher's outputs."""
    rng = np.random.default_rng(0)
    teacher_TK = rng.standard_normal((400, 24)) @ rng.standard_normal((24, 24))
    x_TK = teacher_TK + 0.5 * rng.standard_normal((400, 24)) @ rng.standard_normal((24, 24))
    stats = Stats(24)
    stats.update(x_TK, teacher_TK)
    w_NK = rng.standard_normal((40, 24))
    pass_ = SvdLlm(ratio=0.3, ridge=1e-12)
    target = pass_.target(w_NK, stats)
    first, second = output_directions(target, Activation(pass_.moments(stats))).factors(target, 8)
    want = teacher_TK.astype(np.float32) @ w_NK.T
    best = np.linalg.lstsq(x_TK @ first, want, rcond=None)[0]
    np.testing.assert_allclose(second, best, rtol=1e-3, atol=1e-3 * np.abs(best).max())
    plain = output_directions(w_NK, Activation(pass_.moments(stats))).factors(w_NK, 8)
    assert np.square(x_TK @ first @ second - want).sum() < np.square(x_TK @ plain[0] @ plain[1] - want).sum()


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


def parameters(linears: Sequence[Linear]) -> int:
    return sum(one.num_in * one.num_out for one in linears)


def test_text_targets_and_ranks_each_bring_the_outputs_nearer(fused: ir.Model) -> None:
    want, text = graphs.logits(fused), "tokens=2048, length=64, probe=64, exclude=('head',)"
    plain = squared_error(fused.clone(), "svd(ratio=0.3, exclude=('head',))", want)
    whitened = squared_error(fused.clone(), f"svd_llm(ratio=0.3, allocation='uniform', teacher=False, {text})", want)
    fitted = squared_error(fused.clone(), f"svd_llm(ratio=0.3, allocation='uniform', {text})", want)
    allocated = squared_error(fused.clone(), f"svd_llm(ratio=0.3, {text})", want)
    assert whitened < 0.95 * plain
    assert fitted < 0.95 * whitened
    assert allocated < 0.95 * fitted


@pytest.mark.parametrize("allocation", ["kl", "energy", "uniform"])
def test_the_ratio_is_that_of_all_matrices_together(fused: ir.Model, allocation: str) -> None:
    before = parameters([one for one in find_linears(fused) if one.kind != "head"])
    passes = f"svd_llm(ratio=0.25, allocation='{allocation}', exclude=('head',), tokens=512, length=32, probe=64)"
    report = run(fused, passes)
    after = parameters([one for one in find_linears(fused, expand_pairs=True) if one.kind != "head"])
    assert (report.metrics["parameters_before"], report.metrics["parameters_after"]) == (before, after)
    assert 0.6 * before <= after <= 0.75 * before
    again = run(fused, passes)
    assert not again.modified, "what is asked for is there"
    assert len(again.skipped) == len(find_linears(fused)), "each says why it stays"
    graphs.logits(fused)


def test_little_text_does_not_make_directions_free(fused: ir.Model) -> None:
    """Of 16 tokens most of 64 features are not seen apart: a rank of 16 loses nothing on them."""
    report = run(fused, "svd_llm(ratio=0.2, tokens=16, length=16, probe=16, exclude=('head',))")
    removed = 1 - report.metrics["parameters_after"] / report.metrics["parameters_before"]
    assert 0.2 <= removed < 0.3


def test_errors_in_the_ledger_are_those_of_the_outputs(fused: ir.Model) -> None:
    """Of the first matrix, of which both streams are the same."""
    reference = fused.clone()
    report = run(fused, "svd_llm(ratio=0.3, allocation='uniform', teacher=False, tokens=512, length=32, probe=64)")
    row = report.ledger[0]
    old = next(one for one in find_linears(reference) if one.name == row["site"])
    new = next(one for one in find_linears(fused) if one.name == row["site"])
    ids, _ = CalibrationText(vocab_size=200, seed=1).windows(512, 32)
    value = old.activation
    reference.graph.outputs.append(value)
    session = graphs.session(reference)
    x_TK = np.concatenate(
        [session.run([value.name], one)[0].reshape(-1, old.num_in) for one in feeds(reference.graph, ids)]
    )
    found = np.linalg.norm(x_TK @ (new.w_NK() - old.w_NK()).T) / np.linalg.norm(x_TK @ old.w_NK().T)
    assert found == pytest.approx(row["output_error"], rel=1e-3)
    assert new.factors is not None
    assert new.factors[0].num_out == row["rank"]


def test_matrices_that_stay_whole_make_up_for_the_others_if_asked(fused: ir.Model) -> None:
    reference = {one.name: one.w_NK().copy() for one in find_linears(fused)}
    ids_WS, _ = CalibrationText(vocab_size=200, seed=1).windows(2048, 64)
    want, errors = graphs.logits(fused, ids_WS), []
    for refit in (False, True):
        model = fused.clone()
        text = "tokens=2048, length=64, probe=64, exclude=('head',)"
        report = run(model, f"svd_llm(ratio=0.1, refit={refit}, {text})")
        errors.append(float(((graphs.logits(model, ids_WS) - want) ** 2).mean()))
        found = [one for one in find_linears(model) if one.kind != "head"]
        whole = [one.name for one in found if one.factors is None]
        changed = [
            one.name for one in found if one.name in whole and not np.array_equal(one.w_NK(), reference[one.name])
        ]
        names = [one.name for one in found]
        first = min(names.index(one.name) for one in found if one.factors is not None)
        assert bool(changed) == refit
        assert all(names.index(name) > first for name in changed)
        assert len(report.changed) == len(names) - len(whole) + len(changed)
    assert errors[1] < errors[0]


def test_a_size_is_met_by_what_is_written(fused: ir.Model, tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    write_graph(fused, tmp_path / "before", pipeline="", max_in_flight_bytes=1 << 20)
    nbytes = sum(one.stat().st_size for one in (tmp_path / "before").iterdir())
    size = f"{nbytes * 85 // 100 // 1000}kB"
    run(fused, f"svd_llm(size='{size}', tokens=512, length=32, probe=64)")
    write_graph(fused, tmp_path / "after", pipeline="", max_in_flight_bytes=1 << 20)
    got = sum(one.stat().st_size for one in (tmp_path / "after").iterdir())
    assert 0.8 * nbytes < got <= int(size[:-2]) * 1000


def test_a_smaller_loss_keeps_more(fused: ir.Model) -> None:
    text = "tokens=512, length=32, probe=64"
    reports = [run(fused.clone(), f"svd_llm(kl={kl}, {text})") for kl in (1e-2, 3e-2)]
    assert reports[1].metrics["parameters_after"] < reports[0].metrics["parameters_after"]
    assert 5e-3 < reports[0].metrics["expected_kl"] <= 1e-2
    rows = [row["expected_kl"] for row in reports[0].ledger if "rank" in row]
    assert sum(rows) == pytest.approx(reports[0].metrics["expected_kl"])
    with pytest.raises(OptionError, match="kl=1e-09 cannot be met, the least that anything costs is") as caught:
        run(fused, f"svd_llm(kl=1e-9, {text})")
    nearest = caught.value.hint.rpartition("=")[2]  # type: ignore[union-attr]
    assert run(fused, f"svd_llm(kl={nearest}, {text})").modified


def test_packed_matrices_share_their_first_factor(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("llama"), work_dir=tmp_path)
    text = "tokens=512, length=32, probe=64, kinds=('qkv', 'gate_up')"
    run(source.model, f"fuse, pack, svd_llm(ratio=0.3, {text})", config=source.config)
    pairs = [one for one in find_linears(source.model) if one.factors is not None]
    assert pairs
    assert {one.kind for one in pairs} <= {"qkv", "gate_up"}
    graphs.logits(source.model)


def test_both_factors_are_quantized_by_what_they_read(fused: ir.Model) -> None:
    run(fused, "svd_llm(ratio=0.3, allocation='uniform', tokens=512, length=32, probe=64)")
    before = graphs.logits(fused)
    report = Gptq(tokens=512, length=32, bits=8).run(fused, Context(calibration=CalibrationText(vocab_size=200)))
    halves = [half for one in find_linears(fused) for half in one.factors or ()]
    assert halves
    assert all(half.holder == "MatMulNBits" for half in halves)
    assert len(report.changed) >= len(halves)
    assert np.abs(graphs.logits(fused) - before).max() < 0.05 * np.abs(before).max()


def shared() -> ir.Model:
    """Two layers of which the matrix that goes up is the same."""
    model = decoder()
    nodes = {node.name: node for node in model.graph}
    nodes["l1.up"].replace_input_with(1, nodes["l0.up"].inputs[1])
    return model


def test_all_readers_of_a_shared_matrix_get_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = Group.replace

    def replace(self: Group, linear: Linear, w_NK: Array) -> None:
        seen.append(linear.name)
        real(self, linear, w_NK)

    monkeypatch.setattr(Group, "replace", replace)
    model = shared()
    report = run(model, "svd_llm(ratio=0.6, allocation='uniform', kinds=('up', 'down'), tokens=128, length=32)")
    assert {"block0.up", "block1.up"} <= set(seen)
    assert sum(row["site"].endswith(".up") for row in report.ledger) == 1
    first, second = (one for one in find_linears(model) if one.kind == "up")
    assert first.weight is second.weight


def test_a_shared_matrix_that_stays_whole_stays_one() -> None:
    model = shared()
    text = "kinds=('up', 'down'), tokens=128, length=32, probe=16"
    for ratio in (0.02, 0.1, 0.3):  # matrices refitted once are refitted again
        run(model, f"svd_llm(ratio={ratio}, {text})")
    ups = [one for one in find_linears(model) if one.kind == "up"]
    assert ups[0].weight is ups[1].weight
    graphs.session(model)


def test_costs_of_another_model_are_not_resumed(tmp_path: Path) -> None:
    """The head is changed, which no stage before it shows."""
    passes, journal = "svd_llm(kl=0.05, tokens=128, length=32, probe=16)", Journal(tmp_path / "journal")

    def changed() -> ir.Model:
        model = decoder()
        head = next(one for one in find_linears(model) if one.kind == "head")
        w_NK = head.w_NK() * np.float32(4)
        head.set_weight(lambda: w_NK, "head.changed")
        return model

    run(decoder(), passes, journal=journal)
    resumed, want = changed(), changed()
    run(resumed, passes, journal=journal)
    run(want, passes)
    assert graphs.text(resumed) == graphs.text(want)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [1, 9])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    fused: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    passes = "svd_llm(ratio=0.2, tokens=256, length=32, probe=32)"
    (tmp_path / "work").mkdir()
    calls: list[str] = []
    for method in ("_costs", "_fitted"):
        real = getattr(SvdLlm, method)

        def watched(self: SvdLlm, *arguments: Any, real: Any = real, method: str = method) -> Any:
            if len(calls) == moment and not resumed:
                raise Killed
            calls.append(method)
            return real(self, *arguments)

        monkeypatch.setattr(SvdLlm, method, watched)
    want, broken, resumed = fused.clone(), fused.clone(), True
    run(want, passes, work_dir=tmp_path / "work")
    everything, resumed = list(calls), False
    calls.clear()
    assert moment < len(everything)
    with pytest.raises(Killed):
        run(broken, passes, journal=Journal(tmp_path / "journal"))
    resumed = True
    run(fused, passes, journal=Journal(tmp_path / "journal"))
    assert calls == everything, "each unit is worked on once"
    assert graphs.text(fused) == graphs.text(want)


def test_other_options_do_not_resume(fused: ir.Model, tmp_path: Path) -> None:
    text, journal = "tokens=256, length=32, probe=32, allocation='uniform'", Journal(tmp_path / "journal")
    want = fused.clone()
    run(fused.clone(), f"svd_llm(ratio=0.2, {text})", journal=journal)
    run(fused, f"svd_llm(ratio=0.4, {text})", journal=journal)
    run(want, f"svd_llm(ratio=0.4, {text})")
    assert graphs.text(fused) == graphs.text(want)


def test_weights_that_are_not_finite_stay(fused: ir.Model) -> None:
    broken = find_linears(fused)[-2]
    w_NK = broken.w_NK().copy()
    w_NK[0, 0] = np.nan
    broken.set_weight(lambda: w_NK, "broken")
    report = run(fused, "svd_llm(ratio=0.3, allocation='uniform', tokens=64, length=16, exclude=('head',))")
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons[broken.name] == "its weights or its activation are not finite on the calibration text"
    assert report.modified


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "expected one of ratio, size and kl, got none"),
        ("ratio=0.2, size='1MB'", "got ratio and size"),
        ("ratio=1.0", "ratio must be between 0 and 1"),
        ("size='much'", "size must be a size such as '90MB'"),
        ("kl=0.0", "kl must be positive"),
        ("size='1MB', allocation='uniform'", "allocation must be 'kl' or 'energy' without a ratio"),
        ("kl=0.1, allocation='energy'", "allocation must be 'kl' where kl is given"),
        ("ratio=0.2, kinds=('x',)", "kinds must be among"),
        ("ratio=0.2, probe=1", "probe must be at least 16"),
        ("ratio=0.2, ridge=0.0", "ridge must be positive"),
    ],
)
def test_options_are_checked(options: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pipeline.parse(f"svd_llm({options})")


def test_what_cannot_be_met_is_refused_with_the_nearest(fused: ir.Model) -> None:
    before, text = graphs.text(fused), "tokens=64, length=16, probe=16"
    for options, message in (
        ("ratio=0.999", "cannot be met, all matrices at the smallest rank take ratio=0"),
        ("size='1kB'", "cannot be met, all matrices at the smallest rank take size='"),
        ("size='1GB'", "size=1GB is met as it is: the model takes"),
        ("ratio=0.99, allocation='uniform'", "no matrix gets smaller with ratio=0.99"),
        ("ratio=0.2, exclude=('nothing',)", "exclude='nothing' matches no linear"),
    ):
        with pytest.raises(OptionError, match=message) as caught:
            run(fused, f"svd_llm({options}, {text})")
        assert caught.value.hint
    assert graphs.text(fused) == before


def test_bfloat16_is_refused(fused: ir.Model) -> None:
    for one in find_linears(fused):
        one.weight.const_value = ir.tensor(one.w_NK().astype(ir.DataType.BFLOAT16.numpy()))
        one.weight.dtype = ir.DataType.BFLOAT16
    with pytest.raises(UnsupportedModelError, match="no kernels for bfloat16"):
        run(fused, "svd_llm(ratio=0.2)")
