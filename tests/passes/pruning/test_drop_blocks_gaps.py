"""DropBlocks: what is chosen, what makes up for it, and that what was measured on paper is what the graph then does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from decoders import VOCABULARY, decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_arrays import CalibrationArrays
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError, UnsupportedModelError
from onnxpress.compiler.journal import Journal, Section
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.probe import kl_divergence, log_softmax
from onnxpress.models.directory import find_graph
from onnxpress.passes.pruning import _network, _refit, drop_blocks
from onnxpress.passes.pruning._refit import Moments, fit, free, turned
from onnxpress.passes.pruning.drop_blocks import DropBlocks

Array = np.ndarray
few = settings(max_examples=25, deadline=None, derandomize=True)
SMALL: dict[str, Any] = {"tokens": 512, "length": 32, "probe": 32}


def written(num_tokens: int, length: int, seed: int = 3) -> Array:
    """Texts in which tokens go together."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(3, VOCABULARY, (max(1, num_tokens // length), 1))
    steps = rng.integers(0, 9, (len(starts), length)) ** 2
    return 3 + (starts + np.cumsum(steps, axis=1)) % (VOCABULARY - 3)


TEXT = CalibrationText(vocab_size=VOCABULARY, own=written)


def probe_ids(options: dict[str, Any] = SMALL) -> Array:
    return TEXT.windows(options["tokens"] + options["length"], options["length"])[0][:1, : options["probe"]]


def predictions(model: ir.Model, ids: Array) -> Array:
    return log_softmax(graphs.logits(model, ids)[0].astype(np.float32))


def kl(model: ir.Model, reference: ir.Model, ids: Array) -> float:
    return float(kl_divergence(predictions(reference, ids), predictions(model, ids)).mean())


def run(model: ir.Model, *, journal: Journal | None = None, text: CalibrationText = TEXT, **options: Any) -> Report:
    context = Context(calibration=text, journal=journal or Journal())
    return DropBlocks(**{**SMALL, **options}).run(model, context)


@st.composite
def moments(draw: st.DrawFn) -> tuple[Moments, Array]:
    """Of a gap, and the weights before it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    columns, width, count = draw(st.integers(2, 16)), draw(st.integers(2, 8)), draw(st.integers(40, 90))
    a_TK = rng.standard_normal((count, columns)) * 3.0 ** rng.integers(-2, 3, columns)
    if draw(st.booleans()):
        a_TK[:, 0] = 0
    x_TH = rng.standard_normal((count, width)) * 3.0 ** rng.integers(-2, 5, (count, 1))
    found = Moments(columns, width)
    found.update(a_TK, x_TH, x_TH + rng.standard_normal((count, width)))
    return found, rng.standard_normal((width, columns)).astype(np.float32)


@few
@given(moments())
def test_law_less_ridge_never_loses_more_and_much_is_plain_removal(problem: tuple[Moments, Array]) -> None:
    seen, w_HK = problem
    for solve in (free, lambda found, ridge: turned(found, w_HK, ridge)):
        losses = [seen.loss(solve(seen, ridge)) for ridge in (1e9, 10, 1, 0.1, 1e-2, 1e-4)]
        assert all(later <= earlier + 1e-6 * seen.energy for earlier, later in itertools.pairwise(losses))
        assert losses[0] == pytest.approx(seen.energy, rel=1e-5)
        assert losses[-1] <= seen.energy
    assert seen.loss(free(seen, 1e-6)) <= seen.loss(turned(seen, w_HK, 1e-6)) + 1e-4 * seen.energy


@few
@given(moments())
def test_law_moments_give_the_loss_of_the_tokens(problem: tuple[Moments, Array]) -> None:
    rng = np.random.default_rng(problem[0].count)
    a_TK, x_TH, y_TH = (rng.standard_normal((20, width)).astype(np.float32) for width in (5, 3, 3))
    seen, delta_KH = Moments(5, 3), rng.standard_normal((5, 3))
    seen.update(a_TK, x_TH, y_TH)
    off_TH = (x_TH - y_TH - a_TK @ delta_KH) / np.sqrt(np.square(x_TH).mean(axis=1, keepdims=True))
    assert seen.loss(delta_KH) == pytest.approx(float(np.square(off_TH).sum()), rel=1e-5)


def test_what_is_linear_is_made_up_for() -> None:
    rng = np.random.default_rng(0)
    w_HK, d_HK = (rng.standard_normal((4, 6)).astype(np.float32) for _ in range(2))
    windows = []
    for _ in range(8):
        a_TK, x_TH = rng.standard_normal((32, 6)), rng.standard_normal((32, 4))
        windows.append((a_TK, x_TH, x_TH - a_TK @ d_HK.T))
    found = fit(windows, w_HK)
    assert found is not None
    assert (found.form, found.ridge) == ("free", min(_refit.RIDGES))
    assert found.after < 1e-3 * found.before
    assert np.abs(found.delta_HK - d_HK).max() < 1e-2


def test_noise_is_not_fitted() -> None:
    rng = np.random.default_rng(0)
    windows = [tuple(rng.standard_normal((3, width)) for width in (16, 4, 4)) for _ in range(4)]
    found = fit(windows, rng.standard_normal((4, 16)).astype(np.float32))  # type: ignore[arg-type]
    assert found is None or found.after < found.before


def test_tokens_that_are_not_finite_or_empty_do_not_count() -> None:
    a_TK, x_TH = np.ones((5, 3), np.float32), np.ones((5, 2), np.float32)
    a_TK[0, 0], x_TH[1, 1], x_TH[2] = np.inf, np.nan, 0
    seen = Moments(3, 2)
    seen.update(a_TK, x_TH, np.zeros_like(x_TH))
    assert seen.count == 2
    assert np.isfinite(seen.gram_KK).all()


@pytest.mark.parametrize("parts", ["blocks", "sublayers"])
def test_costs_are_those_of_the_graph(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes the part that costs least, as the rewritten graph shows."""
    monkeypatch.setattr(drop_blocks, "_LASTING", -1e9)  # everything is measured again
    model = decoder(layers=6)
    report = run(model, count=2, parts=parts, compensate=False, probe=32)
    ids = TEXT.windows(32, 32)[0][:1]
    number = {"blocks": 6, "sublayers": 12}[parts]
    per_block, chosen, costs = number // 6, [], []
    for _ in range(2):
        found = {}
        for index in range(2 * per_block, number - per_block):
            if index not in chosen:
                one = decoder(layers=6)
                DropBlocks(indices=(*chosen, index), parts=parts, compensate=False).run(one, Context())
                found[index] = kl(one, decoder(layers=6), ids)
        chosen.append(min(found, key=lambda index: found[index]))
        costs.append(found[chosen[-1]])
    rows = sorted((row for row in report.ledger if "step" in row), key=lambda row: row["step"])
    kinds = ("attention", "mlp")
    names = [f"block{i}" if parts == "blocks" else f"block{i // 2}.{kinds[i % 2]}" for i in chosen]
    assert [row["site"] for row in rows] == names
    assert [row["cost"] for row in rows] == pytest.approx(costs, rel=1e-3)
    assert report.metrics["kl"] == pytest.approx(kl(model, decoder(layers=6), ids), rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"indices": (2,)}, {"indices": (2, 3, 5)}, {"indices": (4, 7), "parts": "sublayers"}]
)
def test_compensation_does_in_the_graph_what_it_did_on_paper(options: dict[str, Any]) -> None:
    model = decoder(layers=6)
    report = run(model, **options)
    plain = decoder(layers=6)
    run(plain, compensate=False, **options)
    assert any("gap" in row for row in report.ledger), report.reasons()
    assert report.metrics["kl"] < report.metrics["kl_plain"]
    ids, whole = probe_ids(), decoder(layers=6)
    assert report.metrics["kl_plain"] == pytest.approx(kl(plain, whole, ids), rel=1e-3)
    assert report.metrics["kl"] == pytest.approx(kl(model, whole, ids), rel=1e-3)
    assert [node.op_type for node in model.graph] == [node.op_type for node in plain.graph]


def test_a_later_gap_sees_what_an_earlier_one_was_given() -> None:
    """The stream behind the second gap is as near as the report says, in the model with both."""
    model = decoder(layers=6)
    report = run(model, indices=(1, 4))
    row = next(row for row in report.ledger if row.get("gap") == "block4")
    fresh = written(32 * 32, 32, seed=7)
    streams = []
    for one, name in ((decoder(layers=6), "l4.add2"), (model, "l3.add2")):
        value = next(value for node in one.graph for value in node.outputs if value.name == name)
        one.graph.outputs.append(value)
        streams.append(np.concatenate([graphs.run(one, graphs_feeds(one, ids))[name] for ids in fresh]))
    off = np.square(streams[0] - streams[1]).sum(-1) / np.square(streams[0]).mean(-1)
    assert float(off.mean()) / 32 == pytest.approx(row["after"], rel=0.2)
    assert row["after"] < 0.7 * row["before"]


def graphs_feeds(model: ir.Model, ids: Array) -> dict[str, Array]:
    from onnxpress.compiler.calibration_text import feeds

    return dict(feeds(model.graph, ids[None])[0])


def test_without_gain_the_removal_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(windows: Sequence[Any], w_HK: Array) -> _refit.Fit:
        return _refit.Fit(10 * np.ones_like(w_HK), "free", 1.0, 1.0, 0.5)

    monkeypatch.setattr(_network, "fit", harmful)
    model, plain = decoder(layers=5), decoder(layers=5)
    report = run(model, indices=(2,))
    run(plain, indices=(2,), compensate=False)
    assert report.reasons() == {"the model's predictions do not gain by it": 1}
    assert graphs.text(model) == graphs.text(plain)


def test_what_cannot_make_up_is_said() -> None:
    assert run(decoder(layers=4), indices=(0,)).reasons() == {"no projection comes before it": 1}
    quantized = decoder(layers=4)
    pipeline.run(quantized, pipeline.parse("rtn(bits=4, block_size=32)"), Context())
    assert run(quantized, indices=(2,)).reasons() == {
        "block1.down before it is quantized: prune first, then quantize": 1
    }
    no_text = run(decoder(layers=4), indices=(2,), text=CalibrationText(vocab_size=200))
    assert no_text.reasons() == {"there is no text, of which the model's tokenizer.json makes tokens": 1}


def test_norms_behind_a_sublayer_are_in_the_way(tiny_export: Callable[..., Path]) -> None:
    model = ir.load(find_graph(tiny_export("gemma2", "optimum", num_layers=4)))
    pipeline.run(model, pipeline.parse("fuse"), Context())
    report = run(model, indices=(2,), text=CalibrationText(vocab_size=250, own=written))
    assert report.reasons() == {"a norm stands between the projection before it and the stream": 1}


@pytest.mark.parametrize("architecture", ["gpt_neox", "granite", "gpt2"])
def test_every_form_of_a_sum_can_be_made_up_for(architecture: str, tiny_export: Callable[..., Path]) -> None:
    """Side by side, scaled, with a bias, and joined with a norm: the graph does what was measured."""
    text = CalibrationText(vocab_size=250, own=lambda tokens, length: written(tokens, length) % 250)
    path = find_graph(tiny_export(architecture, "optimum", num_layers=4))
    before = "simplify" if architecture == "gpt2" else "fuse, pack"
    ids = text.windows(SMALL["tokens"] + 32, 32)[0][:1]
    for options in (
        {"indices": (2,)},
        {"indices": (4, 5), "parts": "sublayers"},
        {"indices": (3,), "parts": "sublayers"},
    ):
        model, whole = ir.load(path), ir.load(path)
        pipeline.run(model, pipeline.parse(before), Context())
        report = run(model, text=text, **options)
        assert any("gap" in row for row in report.ledger), (options, report.reasons())
        assert report.metrics["kl"] == pytest.approx(kl(model, whole, ids), rel=1e-2, abs=1e-7)


def test_what_is_impossible_is_refused_with_the_nearest() -> None:
    for options, hint in (
        ({"count": 4}, "the nearest is count=3"),
        ({"count": 9, "parts": "sublayers"}, "the nearest is count=6"),
        ({"indices": (2, 9)}, r"the nearest is indices=\(2,\)"),
    ):
        model = decoder(layers=6)
        with pytest.raises(OptionError) as caught:
            run(model, **options)  # type: ignore[arg-type]
        assert re.search(hint, caught.value.hint or ""), caught.value.hint
        assert graphs.text(model) == graphs.text(decoder(layers=6))
    bfloat = decoder(layers=6)
    for value in bfloat.graph.initializers.values():
        value.dtype = ir.DataType.BFLOAT16
    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        run(bfloat, count=1)


def test_the_turn_of_the_stream_chooses_too() -> None:
    report = run(decoder(layers=6), count=1, by="stream", compensate=False)
    (row,) = (row for row in report.ledger if "influence" in row)
    assert row["influence"] == min(row["influences"][2:5])
    assert len(row["influences"]) == 6


def test_a_model_of_images_is_measured_on_random_inputs(tiny_export: Callable[..., Path]) -> None:
    model = ir.load(find_graph(tiny_export("vit", "optimum", num_layers=5)))
    report = DropBlocks(count=1).run(model, Context(config={"image_size": 32, "num_channels": 3}))
    assert report.metrics["kl"] > 0  # of the classes
    assert report.calibration["text"].startswith("random inputs")
    assert sum(name.startswith("block") for name in report.changed) == 1


def test_a_model_of_images_is_measured_and_fitted_on_given_images(tiny_export: Callable[..., Path]) -> None:
    model = ir.load(find_graph(tiny_export("vit", "optimum", num_layers=5)))
    images = np.random.default_rng(0).standard_normal((40, 3, 32, 32)).astype(np.float32)
    context = Context(arrays=CalibrationArrays({"pixel_values": images}, "images"))
    report = DropBlocks(count=1).run(model, context)
    assert "images" in report.calibration["text"]
    assert report.metrics["kl"] < report.metrics["kl_plain"], "what makes up for the gap was fitted"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", [2, 5, -1])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = decoder(layers=6)
    original, written_units = Section.write, []

    def write(self: Section, unit: str, *arguments: Any) -> None:
        original(self, unit, *arguments)
        written_units.append(unit)
        if len(written_units) == limit:
            raise Killed

    monkeypatch.setattr(Section, "write", write)
    limit = 0
    run(want, count=2)
    total = len(written_units)
    assert "block" in written_units[-1]
    written_units.clear()
    limit = moment if moment > 0 else total
    with pytest.raises(Killed):
        run(decoder(layers=6), count=2, journal=Journal(tmp_path / "journal"))
    model = decoder(layers=6)
    run(model, count=2, journal=Journal(tmp_path / "journal"))
    assert graphs.text(model) == graphs.text(want)
    assert len(written_units) == total  # nothing was done twice


def test_a_pruned_model_can_be_pruned_quantized_and_pruned_again() -> None:
    model = decoder(layers=6)
    context = Context(calibration=TEXT, config={"num_hidden_layers": 6})
    passes = (
        "drop_blocks(count=1, tokens=512, length=32, probe=32), "
        "drop_blocks(indices=(6,), parts='sublayers', tokens=512, length=32, probe=32), "
        "gptq(bits=4, block_size=32, tokens=512, length=32), drop_blocks(indices=(1,))"
    )
    pipeline.run(model, pipeline.parse(passes), context)
    assert context.config["num_hidden_layers"] == 3
    caches = [value.name for value in model.graph.inputs if "past" in str(value.name)]
    assert caches == [f"past_key_values.{i}.{end}" for i in range(3) for end in ("key", "value")]
    assert np.isfinite(graphs.logits(model, probe_ids())).all()
    assert any(one.is_quantized for one in find_linears(model))
