"""Calibration streams: what a group sees is what the whole model computes, with the weights it was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration import Calibration, Stage
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import CalibrationError, PreconditionError
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.pass_ import Context

Array = np.ndarray


@pytest.fixture(params=["llama", "gemma2", "phi3", "gpt_neox", "mixtral"])
def decoder(request: pytest.FixtureRequest, tiny_export: Callable[..., Path], tmp_path: Path) -> ir.Model:
    source = models.load(tiny_export(request.param), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    return source.model


def windows(model: ir.Model) -> list[dict[str, Array]]:
    return feeds(model.graph, np.random.default_rng(3).integers(3, 200, (3, 12)))


def activations(model: ir.Model, linears: list[Linear], inputs: list[dict[str, Array]]) -> dict[str, Array]:
    """What each linear reads when the whole model runs, [T, K]."""
    copy = model.clone()
    outputs = {one.activation.name for one in linears}
    values = {value.name: value for node in copy.graph for value in node.outputs}
    values |= {value.name: value for value in copy.graph.inputs}
    known = {value.name for value in copy.graph.outputs}
    for name in sorted(outputs - known):
        copy.graph.outputs.append(values[name])
    session = graphs.session(copy)
    names = [one.name for one in session.get_outputs()]
    runs = [dict(zip(names, session.run(None, window), strict=True)) for window in inputs]
    return {
        one.name: np.concatenate([run[one.activation.name].reshape(-1, one.num_in) for run in runs]) for one in linears
    }


def test_law_second_moments_are_those_of_the_whole_model(decoder: ir.Model, tmp_path: Path) -> None:
    linears, inputs = find_linears(decoder), windows(decoder)
    seen = activations(decoder, linears, inputs)
    text = graphs.text(decoder)
    observed = []
    with Calibration(decoder, inputs, linears, tmp_path) as run:
        for stage in run.stages:
            group = run.observe(stage)
            assert group.stats.drift_KK is None, "nothing was replaced, so there is one stream"
            for linear in group.linears:
                x_TK = seen[linear.name].astype(np.float64)
                assert group.stats.count == len(x_TK)
                np.testing.assert_allclose(group.stats.gram_KK, x_TK.T @ x_TK, rtol=1e-4, atol=1e-3)
                np.testing.assert_allclose(group.stats.absmax_K, np.abs(x_TK).max(axis=0), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(group.stats.abs_K, np.abs(x_TK).sum(axis=0), rtol=1e-4)
                np.testing.assert_allclose(group.stats.sum_K, x_TK.sum(axis=0), rtol=1e-3, atol=1e-3)
                observed.append(linear.name)
    assert sorted(observed) == sorted(one.name for one in linears)
    assert graphs.text(decoder) == text, "the graph was changed"
    assert not list(tmp_path.glob("streams-*"))


def test_law_the_compressed_stream_is_the_compressed_model(decoder: ir.Model, tmp_path: Path) -> None:
    linears, inputs = find_linears(decoder), windows(decoder)
    rng = np.random.default_rng(7)
    new = {one.name: one.w_NK() + 0.02 * rng.standard_normal(one.shape).astype(np.float32) for one in linears}
    teacher = activations(decoder, linears, inputs)
    drifts = {}
    with Calibration(decoder, inputs, linears, tmp_path) as run:
        for stage in run.stages:
            group = run.observe(stage)
            for linear in group.linears:
                drifts[linear.name] = group.stats
                group.replace(linear, new[linear.name])
    for one in linears:
        one.set_weight(lambda name=one.name: new[name], f"{one.name}.new")
    compressed = activations(decoder, find_linears(decoder), inputs)
    moved, tokens = 0, 3 * 12
    for name, stats in drifts.items():
        x_TK, x0_TK = compressed[name].astype(np.float64), teacher[name].astype(np.float64)
        np.testing.assert_allclose(stats.gram_KK, x_TK.T @ x_TK, rtol=1e-3, atol=2e-3)
        want = (x0_TK - x_TK).T @ x_TK if len(x0_TK) == len(x_TK) else np.zeros(())
        if len(x0_TK) != tokens:
            assert stats.drift_KK is None, "an expert sees other tokens than its teacher"
        elif stats.drift_KK is None:
            assert np.abs(want).max() < 1e-6
        else:
            moved += 1
            np.testing.assert_allclose(stats.drift_KK, want, rtol=1e-2, atol=1e-3 * np.abs(want).max() + 1e-3)
    routed = sum(len(array) != tokens for array in teacher.values())
    assert moved >= len(linears) - routed - 4, "only q, k, v and, beside them, up read what nobody has changed yet"


def test_each_node_runs_in_one_stage(decoder: ir.Model) -> None:
    with Calibration(decoder, windows(decoder), find_linears(decoder)) as run:
        nodes = [id(node) for stage in run.stages for node in stage.nodes]
        assert len(nodes) == len(set(nodes))
        made: set[int] = set()
        for stage in run.stages:
            for value in stage.inputs:
                assert value.is_graph_input() or id(value) in made
            made |= {id(value) for value in stage.outputs}


def test_values_are_dropped_when_nobody_reads_them(decoder: ir.Model, tmp_path: Path) -> None:
    with Calibration(decoder, windows(decoder), find_linears(decoder), tmp_path) as run:
        most = 0
        for stage in run.stages:
            run.observe(stage)
            most = max(most, len(list(tmp_path.glob("streams-*/*"))))
        assert most <= 24
        assert len(list(tmp_path.glob("streams-*/*"))) <= 4


def test_a_graph_inside_a_node_is_refused_by_name() -> None:
    model = graphs.branching()
    pipeline.run(model, pipeline.parse("simplify"), Context())  # lifts the weights out of Constant nodes
    found = find_linears(model)
    assert found
    with pytest.raises(PreconditionError, match="holds a graph of its own"):
        Calibration(model, [], found)


def test_a_stage_that_does_not_run_is_named(decoder: ir.Model) -> None:
    inputs = windows(decoder)
    for window in inputs:
        window["input_ids"] = window["input_ids"] + 10_000
    with Calibration(decoder, inputs, find_linears(decoder)) as run:
        first: Stage = run.stages[0]
        with pytest.raises(PreconditionError, match="does not run by itself"):
            run.observe(first)


def test_windows_come_from_all_of_every_text(tiny_export: Callable[..., Path]) -> None:
    tokenizer = tiny_export("llama") / "tokenizer.json"
    texts = {"a": "a" * 1000, "b": "b" * 400 + "c" * 600}
    text = CalibrationText(texts=texts, tokenizer=tokenizer, vocab_size=320)
    ids, facts = text.windows(400, 100)
    assert ids.shape == (4, 100)
    assert facts["windows"] == [4, 100]
    letters = [{chr(97 + int(token) - int(ids[0, 0])) for token in window} for window in ids]
    assert letters == [{"a"}, {"b"}, {"a"}, {"c"}]
    again, same = text.windows(400, 100)
    assert same == facts
    np.testing.assert_array_equal(ids, again)
    assert text.windows(400, 50)[1]["sha256"] != facts["sha256"]
    assert CalibrationText(texts=texts, tokenizer=tokenizer, vocab_size=320, max_length=32).windows(64, 100)[
        0
    ].shape == (
        2,
        32,
    )


def test_text_that_is_too_short_is_named(tiny_export: Callable[..., Path]) -> None:
    text = CalibrationText(texts={"note.txt": "x"}, tokenizer=tiny_export("llama") / "tokenizer.json", vocab_size=320)
    with pytest.raises(CalibrationError, match=r"note\.txt: expected text, found 1 tokens"):
        text.windows(100, 10)


def test_without_a_tokenizer_ids_are_random_and_said_so() -> None:
    ids, facts = CalibrationText(vocab_size=50, seed=3).windows(64, 16)
    assert ids.shape == (4, 16)
    assert ids.max() < 50
    assert "random" in facts["text"]
