"""SparseGPT: the textbook's result, exact zeros, and what each law says."""

from __future__ import annotations

import itertools
from pathlib import Path

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from decoders import decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from optimal_brain import reference

from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration import Group
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.columns import Moments
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.stats import damped
from onnxpress.compiler.zeros import Pattern
from onnxpress.passes.pruning.sparsegpt import sparsegpt

Array = np.ndarray
few = settings(max_examples=25, deadline=None, derandomize=True)
PATTERNS = [Pattern(0.5), Pattern(0.3), Pattern(0.5, 2, 4), Pattern(0.5, 4, 8), Pattern(2 / 3, 1, 3)]


@st.composite
def layers(draw: st.DrawFn, multiple: int = 24) -> tuple[Array, Array]:
    """Weights [N, K] and second moments, with what hurts: features that never occur, outliers, rows of one number."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    columns = multiple * draw(st.integers(1, 2))
    x_TK = rng.standard_normal((4 * columns, columns)) @ rng.standard_normal((columns, columns))
    x_TK[:, 0] *= draw(st.sampled_from([0.0, 1.0, 50.0]))
    w_NK = rng.standard_normal((4, columns))
    w_NK[0] = draw(st.sampled_from([w_NK[0], 0 * w_NK[0]]))
    return w_NK, x_TK.T @ x_TK / len(x_TK)


def order_of(hessian_KK: Array, group: int) -> list[int]:
    sums = [hessian_KK.diagonal()[first : first + group].sum() for first in range(0, len(hessian_KK), group)]
    return [
        group * one + inside for one in sorted(range(len(sums)), key=lambda one: -sums[one]) for inside in range(group)
    ]


def spans_of(pattern: Pattern, columns: int) -> list[tuple[int, int, int]]:
    if pattern.of:
        return [(one, one + pattern.of, pattern.of - pattern.kept) for one in range(0, columns, pattern.of)]
    edges = [*range(0, columns, 128), columns]
    return [
        (one, two, int(pattern.sparsity * two + 1e-9) - int(pattern.sparsity * one + 1e-9))
        for one, two in itertools.pairwise(edges)
    ]


def loss(w_NK: Array, q_NK: Array, hessian_KK: Array) -> float:
    off = q_NK - w_NK
    return float(np.einsum("nk,kl,nl->", off, hessian_KK, off))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@few
@given(layer=layers())
def test_the_slow_textbook_gives_the_same(pattern: Pattern, layer: tuple[Array, Array]) -> None:
    w_NK, hessian_KK = layer
    order, spans = order_of(hessian_KK, pattern.of or 1), spans_of(pattern, w_NK.shape[1])
    want, keep = reference(w_NK, damped(hessian_KK, 0.01), order, spans)
    found = sparsegpt(w_NK, Moments(hessian_KK, 0.01), pattern)
    live = np.abs(w_NK).sum(axis=1) > 0  # of zeros alone any may go
    np.testing.assert_array_equal((found != 0)[live], keep[live])
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_the_slow_textbook_gives_the_same_beyond_one_choice() -> None:
    """More columns than choose together: 128, and then the rest."""
    rng = np.random.default_rng(0)
    x_TK = rng.standard_normal((600, 40)) @ rng.standard_normal((40, 200)) + rng.standard_normal((600, 200))
    w_NK, hessian_KK = rng.standard_normal((2, 200)), x_TK.T @ x_TK / 600
    for pattern in (Pattern(0.37), Pattern(0.5, 50, 100)):
        order, spans = order_of(hessian_KK, pattern.of or 1), spans_of(pattern, 200)
        want, keep = reference(w_NK, damped(hessian_KK, 0.01), order, spans)
        found = sparsegpt(w_NK, Moments(hessian_KK, 0.01), pattern)
        np.testing.assert_array_equal(found != 0, keep)
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@few
@given(layer=layers(), rounds=st.integers(0, 2))
def test_law_every_row_has_its_zeros_exactly(pattern: Pattern, layer: tuple[Array, Array], rounds: int) -> None:
    w_NK, hessian_KK = layer
    found = sparsegpt(w_NK, Moments(hessian_KK, 0.01), pattern, rounds=rounds)[1:]
    zero = found == 0
    if pattern.of:
        assert (zero.reshape(-1, pattern.of).sum(axis=1) == pattern.of - pattern.kept).all()
    else:
        assert (zero.sum(axis=1) == int(pattern.sparsity * w_NK.shape[1] + 1e-9)).all()


@few
@given(layers())
def test_law_no_round_makes_the_loss_larger_and_many_end_at_least_squares(layer: tuple[Array, Array]) -> None:
    w_NK, hessian_KK = layer
    h, pattern = damped(hessian_KK, 0.01), Pattern(0.5)
    found = [sparsegpt(w_NK, Moments(hessian_KK, 0.01), pattern, rounds=rounds) for rounds in (0, 1, 2, 4)]
    losses = [loss(w_NK, one, h) for one in found]
    assert all(later <= earlier * (1 + 1e-5) + 1e-9 for earlier, later in itertools.pairwise(losses))
    best = np.zeros_like(w_NK)
    for row, keep in enumerate(found[0] != 0):
        if keep.any():
            best[row, keep] = np.linalg.solve(h[np.ix_(keep, keep)], h[keep] @ w_NK[row])
    assert loss(w_NK, best, h) <= losses[-1] * (1 + 1e-5) + 1e-9


@few
@given(layers())
def test_law_features_apart_leave_what_stays_unchanged(layer: tuple[Array, Array]) -> None:
    w_NK, hessian_KK = layer
    apart_KK = np.diag(hessian_KK.diagonal())
    found = sparsegpt(w_NK, Moments(apart_KK, 0.01), Pattern(0.5), rounds=1)
    np.testing.assert_allclose(found[found != 0], w_NK[found != 0], rtol=1e-5)


@few
@given(layers())
def test_law_rows_do_not_depend_on_each_other_and_without_zeros_all_stays(layer: tuple[Array, Array]) -> None:
    w_NK, hessian_KK = layer
    moments = Moments(hessian_KK, 0.01)
    whole = sparsegpt(w_NK, moments, Pattern(0.5))
    np.testing.assert_allclose(sparsegpt(w_NK[1:3], moments, Pattern(0.5)), whole[1:3], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sparsegpt(w_NK, moments, Pattern(0.0)), w_NK, rtol=1e-12)


def run(model: ir.Model, passes: str, **context: object) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), **context)  # type: ignore[arg-type]
    return pipeline.run(model, pipeline.parse(passes), made)[-1][1]


TEXT = "tokens=1024, length=64"


def test_the_fit_beats_what_does_not_fit() -> None:
    want = graphs.logits(decoder())
    losses = []
    for passes in ("magnitude(exclude=('head',))", f"wanda({TEXT})", f"sparsegpt({TEXT})"):
        model = decoder()
        run(model, passes)
        losses.append(float(((graphs.logits(model) - want) ** 2).mean()))
    assert losses[2] < 0.9 * losses[1]
    assert losses[2] < 0.9 * losses[0]


def test_the_teacher_makes_up_for_layers_before() -> None:
    ids_WS, _ = CalibrationText(vocab_size=200, seed=1).windows(1024, 64)
    want, errors = graphs.logits(decoder(), ids_WS), []
    for teacher in (False, True):
        model = decoder()
        run(model, f"sparsegpt({TEXT}, teacher={teacher})")
        errors.append(float(((graphs.logits(model, ids_WS) - want) ** 2).mean()))
    assert errors[1] < 0.97 * errors[0]


def test_the_report_says_what_was_done_and_that_nothing_gets_faster() -> None:
    model = decoder()
    report = run(model, f"sparsegpt({TEXT}, pattern='2:4')")
    assert report.metrics["sparsity"] == pytest.approx(0.5)
    assert 0 < report.metrics["output_error"] < 0.5
    assert any("nothing faster" in note for note in report.notes)
    assert all(row["sparsity"] == pytest.approx(0.5) for row in report.ledger)
    for linear in find_linears(model):
        if linear.name in report.changed:
            assert ((linear.w_NK().reshape(-1, 4) == 0).sum(axis=1) == 2).all()
    again = run(model, f"sparsegpt({TEXT}, pattern='2:4')")
    assert not again.modified
    assert again.reasons()["already this sparse"] == len(report.changed)


class _StopError(Exception):
    pass


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decoder()
    run(whole, f"sparsegpt({TEXT})")
    journal, model, calls = Journal(tmp_path), decoder(), 0
    replace = Group.replace

    def stopping(self: Group, *given: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise _StopError
        replace(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Group, "replace", stopping)
    with pytest.raises(Exception, match="StopError"):
        run(model, f"sparsegpt({TEXT})", journal=journal)
    monkeypatch.setattr(Group, "replace", replace)
    report = run(model, f"sparsegpt({TEXT})", journal=journal)
    assert any("an earlier run was stopped" in note for note in report.notes)
    assert graphs.text(model) == graphs.text(whole)


@pytest.mark.parametrize(
    ("options", "why", "nearest"),
    [
        ("sparsity=1.2", "between 0 and 1, got 1.2", "0.99"),
        ("sparsity=0.0", "between 0 and 1, got 0.0", "0.01"),
        ("pattern='4:2'", "more than there are", "'1:2'"),
        ("pattern='4:4'", "keeps all", "'3:4'"),
        ("pattern='0:4'", "keeps nothing", "'1:4'"),
        ("pattern='half'", "two numbers", "'2:4'"),
        ("pattern='2:4', sparsity=0.5", "got both", "'2:4'"),
        ("pattern='5:7'", "no multiple of 7", "'6:8'"),
        ("sparsity=0.01", "less than one weight", "0.03125"),
        ("rounds=-1", "0 or more", "2"),
        ("kinds=('tail',)", "among", ""),
        ("kinds=('router',)", "no linear of kind 'router'", "it has"),
        ("exclude=('blok0.*',)", "matches no linear", "block0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest(options: str, why: str, nearest: str) -> None:
    with pytest.raises(OptionError, match=why) as caught:
        run(decoder(), f"sparsegpt({options}, tokens=64, length=32)")
    assert nearest in (caught.value.hint or "")


def test_the_head_is_left_alone_unless_named() -> None:
    report = run(decoder(), f"sparsegpt({TEXT})")
    assert "head" not in report.changed
    assert any("kinds=('head',)" in reason for reason in report.reasons())
    assert run(decoder(), f"sparsegpt({TEXT}, kinds=('head',))").changed == ["head"]


def test_a_matrix_that_a_pattern_does_not_fit_is_skipped_with_the_nearest() -> None:
    report = run(decoder(), f"sparsegpt({TEXT}, pattern='32:64')")
    assert {name.partition(".")[2] for name in report.changed} == {"down"}
    assert any("no multiple of 64; the nearest is pattern='16:32'" in reason for reason in report.reasons())
