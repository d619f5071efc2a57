"""Prune: the aim is met by what costs least, by a clock that is told what costs time; the same by hand; refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from decoders import decoder

from onnxpress.compiler import pipeline, sizes
from onnxpress.compiler.artifact import write_graph
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import OptionError, PreconditionError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context, Report, weight_bytes
from onnxpress.compiler.sensitivity import Sensitivity
from onnxpress.models.directory import find_graph
from onnxpress.passes.pruning import _layers, _savings
from onnxpress.passes.pruning._parts import find_parts

TEXT = "tokens=256, length=32, probe=32"
Price = Callable[[ir.Model], float]


class Clock:
    """Takes as long as a rule says that a model takes."""

    def __init__(self, rule: Price) -> None:
        self.rule, self.asked = rule, 0

    def __call__(self, model: ir.Model, context: Context, phase: str) -> Any:
        self.asked += 1
        seconds = self.rule(model)

        class Fixed:
            def seconds(self) -> float:
                return seconds

        return Fixed()


def attention_counts(model: ir.Model) -> float:
    return 1.0 + sum(part.has_attention for part in find_parts(model, sublayers=True))


def channels_count(model: ir.Model) -> float:
    return 100.0 + sum(one.num_in for one in find_linears(model) if one.kind == "down")


def bytes_count(model: ir.Model) -> float:
    return float(weight_bytes(model))


def run(model: ir.Model, passes: str, clock: Price = bytes_count, **context: Any) -> Report:
    made = Context(calibration=CalibrationText(vocab_size=200, seed=1), stopwatch=Clock(clock), **context)
    return pipeline.run(model, pipeline.parse(passes), made)[0][1]


def deep() -> ir.Model:
    """Six blocks, of which three may go."""
    return decoder(layers=6)


def left(model: ir.Model) -> tuple[int, list[int]]:
    """How many attention sublayers there are, and the widths of the feed-forward ones."""
    attention = sum(part.has_attention for part in find_parts(model, sublayers=True))
    return attention, [one.num_in for one in find_linears(model) if one.kind == "down"]


@pytest.mark.parametrize("architecture", ["random", "gpt_neox", "gemma2"])
def test_an_aim_is_met_and_the_model_still_runs(architecture: str, tiny_export: Callable[..., Path]) -> None:
    model = deep() if architecture == "random" else ir.load(find_graph(tiny_export(architecture, num_layers=4)))
    whole, before = bytes_count(model), left(model)
    report = run(model, f"prune(speedup=1.2, {TEXT})")
    assert whole / bytes_count(model) == pytest.approx(report.metrics["decode_speedup"], rel=0.02)
    assert report.metrics["decode_speedup"] >= 0.98 * 1.2
    assert left(model) != before
    outputs = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(
        ["logits"], {**feeds(model.graph, np.arange(1, 9)[None])[0]}
    )
    assert np.isfinite(outputs[0]).all()
    caches = [value for value in model.graph.inputs if "past" in str(value.name)]
    assert len(caches) == 2 * left(model)[0]


def test_it_takes_what_takes_time() -> None:
    """With a clock that counts one thing alone, only that is taken."""
    model = deep()
    widths = left(model)[1]
    run(model, f"prune(speedup=1.3, {TEXT})", attention_counts)
    assert left(model) == (4, widths), "7 / 1.3 is 5.4"
    model = deep()
    run(model, f"prune(speedup=1.3, {TEXT})", channels_count)
    attention, now = left(model)
    assert attention == 6
    assert (100 + sum(widths)) / (100 + sum(now)) >= 0.98 * 1.3


@pytest.mark.parametrize(
    "take, stays",
    [
        ("('channels',)", {"attention", "sublayers"}),
        ("('attention',)", {"widths"}),
        ("('feed_forward',)", {"attention"}),
    ],
)
def test_only_what_may_be_taken_is(take: str, stays: set[str]) -> None:
    model = deep()
    attention, widths = left(model)
    run(model, f"prune(speedup=1.05, take={take}, {TEXT})")
    attention_now, widths_now = left(model)
    assert ("attention" in stays) == (attention_now == attention)
    assert "depth" not in stays or len(widths_now) == len(widths)
    assert ("widths" in stays) == (widths_now == widths)


def test_what_is_excluded_stays() -> None:
    model = deep()
    report = run(model, f"prune(speedup=1.1, exclude=('block2.*', '*.attention'), {TEXT})")
    attention, widths = left(model)
    assert attention == 6
    assert 64 in widths
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert reasons["block3.attention"] == "stays: excluded"
    assert reasons["block0.attention"] == "stays: protected"
    with pytest.raises(OptionError, match=r"exclude='nothing\.\*' matches no layer"):
        run(deep(), f"prune(speedup=1.1, exclude=('nothing.*',), {TEXT})")


def test_the_files_fit_the_size(tmp_path: Path) -> None:
    model = deep()
    whole = sizes.bytes_besides(model, [])
    report = run(model, f"prune(size='{int(0.8 * whole)}', {TEXT})")
    write_graph(model, tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written <= 0.8 * whole
    assert report.metrics["files_bytes"] <= 0.8 * whole


def test_what_follows_counts_in() -> None:
    """A size is that after the quantizer behind: too large for floats, it is met by codes."""
    quantizer = "rtn(bits=8, block_size=16)"
    model = deep()
    run(model, quantizer)
    aim = int(0.85 * sizes.bytes_besides(model, []))
    model = deep()
    report = run(model, f"prune(size='{aim}', then='{quantizer}', {TEXT}), {quantizer}")
    assert any(quantizer in note for note in report.notes)
    assert sizes.bytes_besides(model, []) <= aim
    assert sizes.bytes_besides(model, []) >= 0.85 * aim, "and no smaller than it must be"


def test_a_loss_is_kept_to() -> None:
    small, large = deep(), deep()
    reports = [run(small, f"prune(kl=0.004, {TEXT})"), run(large, f"prune(kl=0.03, {TEXT})")]
    assert reports[0].metrics["expected_kl"] <= 0.004
    assert reports[0].metrics["expected_kl"] < reports[1].metrics["expected_kl"] <= 0.03
    assert reports[0].metrics["decode_speedup"] < reports[1].metrics["decode_speedup"]
    with pytest.raises(OptionError, match="cannot be met, the least that anything costs is") as caught:
        run(deep(), f"prune(kl=1e-12, {TEXT})")
    nearest = re.search(r"kl=[\de.-]+", str(caught.value.hint))
    assert nearest
    assert run(deep(), f"prune({nearest[0]}, {TEXT})").modified


def test_the_same_by_hand() -> None:
    model, by_hand = deep(), deep()
    report = run(model, f"prune(speedup=1.4, {TEXT})", lambda one: bytes_count(one) + 4e4 * attention_counts(one))
    text = next(note for note in report.notes if note.startswith("the same as "))
    assert "drop_blocks" in text
    assert "prune_ffn" in text
    run(by_hand, text.removeprefix("the same as "))
    assert graphs.text(model) == graphs.text(by_hand)


def test_a_sum_that_misjudges_is_corrected() -> None:
    """Together things save less than alone, as with a clock of which a part is fixed once much is gone."""
    whole = bytes_count(deep())

    def less(model: ir.Model) -> float:
        gone = 1 - bytes_count(model) / whole
        return 1 - gone + 1.2 * gone**2

    model = deep()
    report = run(model, f"prune(speedup=1.12, {TEXT})", less)
    assert less(deep()) / less(model) >= 0.98 * 1.12
    assert report.metrics["decode_speedup"] == pytest.approx(1 / less(model), rel=0.02)


def test_what_is_not_met_is_refused() -> None:
    """A clock by which nothing but the first look saves time."""
    looks = iter(range(100))
    with pytest.raises(OptionError, match=r"the nearest that was found comes to speedup=1\.01"):
        run(deep(), f"prune(speedup=1.2, {TEXT})", lambda model: bytes_count(model) if next(looks) < 6 else 5e9)


def test_what_saves_no_time_is_not_taken() -> None:
    for options in ("speedup=1.1", "kl=0.03"):
        model = deep()
        with pytest.raises(OptionError, match="nothing that may be taken is seen to save time"):
            run(model, f"prune({options}, {TEXT})", lambda _: 1.0)
        assert graphs.text(model) == graphs.text(deep())


def test_noise_is_told_from_savings() -> None:
    noise = np.random.default_rng(0)

    class Noisy:
        def seconds(self) -> float:
            return float(noise.lognormal(0, 0.5))

    context = Context(calibration=CalibrationText(vocab_size=200, seed=1), stopwatch=lambda *_: Noisy())
    with pytest.raises(OptionError, match="timing is wrong by"):
        pipeline.run(deep(), pipeline.parse(f"prune(speedup=1.1, {TEXT})"), context)


@pytest.mark.parametrize(
    "options, message, hint",
    [
        ("", "expected one of speedup, size and kl, got none", "prune(speedup=1.3)"),
        ("speedup=1.3, kl=0.1", "expected one of speedup, size and kl, got speedup and kl", None),
        ("speedup=0.9", "speedup must be above 1, got 0.9", "1.3 is 30 %"),
        ("size='small'", "size must be a size", None),
        ("speedup=1.2, take=('heads',)", "take must be some of attention, channels, feed_forward", "take=("),
        ("speedup=1.2, rounds=0", "rounds must be at least 1", None),
        ("size='90kB', phase='prefill'", "phase and rounds have no effect with size", "weighed"),
        ("speedup=50.0", "speedup=50.0 cannot be met", "the nearest is speedup="),
        ("size='1kB'", "size=1kB cannot be met", "the nearest is size="),
        ("size='1GB'", "size=1GB is met as it is", "ask for less"),
    ],
)
def test_what_cannot_be_is_refused(options: str, message: str, hint: str | None) -> None:
    with pytest.raises(OptionError) as caught:
        run(deep(), f"prune({options})")
    assert message in caught.value.message
    assert hint is None or hint in str(caught.value.hint)


def test_the_nearest_can_be_asked_for() -> None:
    with pytest.raises(OptionError) as caught:
        run(deep(), f"prune(size='1kB', {TEXT})")
    nearest = re.search(r"size='[^']+'", str(caught.value.hint))
    assert nearest
    assert run(deep(), f"prune({nearest[0]}, {TEXT})").modified


def test_without_anything_that_could_time_it() -> None:
    context = Context(calibration=CalibrationText(vocab_size=200, seed=1))
    with pytest.raises(PreconditionError, match="nothing here can run the model") as caught:
        pipeline.run(deep(), pipeline.parse(f"prune(speedup=1.2, {TEXT})"), context)
    assert "size=" in str(caught.value.hint)


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want, broken, again = deep(), deep(), deep()
    passes = f"prune(speedup=1.3, {TEXT})"
    run(want, passes)
    real, calls = _layers.curve, []
    distance, costs = Sensitivity.distance, []
    monkeypatch.setattr(
        Sensitivity, "distance", lambda self, new, *gone: costs.append(bool(new)) or distance(self, new, *gone)
    )

    def watched(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(_layers, "curve", watched)
    with pytest.raises(Killed):
        run(broken, passes, journal=Journal(tmp_path))
    calls.extend([1] * 10)
    run(again, passes, journal=Journal(tmp_path))
    assert len(calls) == 13 + 4, "six layers, of which two were done"
    assert graphs.text(again) == graphs.text(want)
    assert costs.count(False) == 6, "each sublayer that may go, once"


def test_savings_are_of_one_of_a_kind() -> None:
    model = deep()
    context = Context(stopwatch=Clock(attention_counts))
    found = _savings.measure(_savings.Variants(model, context, "", None, "decode", 1), [4, 6, 8], [], [])
    assert found.attention == pytest.approx(1 / 7)
    assert np.isnan(found.feed_forward)


def test_a_real_clock_times_real_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of tiny models are mostly noise: each session tells some, and what they say is made up."""
    seen: list[float] = []

    def ratio(whole: Any, other: Any, rounds: int) -> tuple[float, float]:
        seen.extend(one.seconds() for one in (whole, other))
        return 0.9, 0.01

    monkeypatch.setattr(_savings, "_ratio", ratio)
    write_graph(deep(), tmp_path)
    for phase in ("decode", "prefill"):
        artifact = optimize(
            tmp_path / "model.onnx", passes=f"prune(speedup=1.1, phase='{phase}', {TEXT})", measure=False
        )
        assert artifact.report["passes"][0]["metrics"][f"{phase}_speedup"] == pytest.approx(1 / 0.9)
    assert len(seen) == 2 * 2 * 6
    assert min(seen) > 0


def test_what_is_no_transformer_is_told_what_is_for_it() -> None:
    with pytest.raises(OptionError, match="found no sublayers") as caught:
        run(graphs.branching(), "prune(speedup=1.1)")
    assert "prune_channels" in str(caught.value.hint)
