"""Calibration streams: what a group sees is what the whole model computes, with the weights it was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration import Calibration, Stage
from onnxpress.compiler.calibration_text import CalibrationText, _even, feeds
from onnxpress.compiler.errors import CalibrationError, UnsupportedModelError
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
                observed.append(linear.name)
    assert sorted(observed) == sorted(one.name for one in linears)
    assert graphs.text(decoder) == text, "the graph was changed"
    assert not list(tmp_path.glob("streams-*"))


def test_law_values_are_those_of_the_whole_model(decoder: ir.Model, tmp_path: Path) -> None:
    """Of any output of a node, whoever reads it; between groups of linears as well as alone."""
    ends = [value for node in decoder.graph if node.op_type == "GroupQueryAttention" for value in node.outputs[1:3]]
    ends += [value for value in decoder.graph.outputs if value.name == "logits"]
    assert len(ends) > 4
    inputs, session = windows(decoder), graphs.session(decoder)
    whole = [
        dict(zip([one.name for one in session.get_outputs()], session.run(None, one), strict=True)) for one in inputs
    ]
    for linears in ([], find_linears(decoder)):
        seen = []
        with Calibration(decoder, inputs, linears, tmp_path, ends=ends) as run:
            for stage in run.stages:
                if stage.linears:
                    run.observe(stage)
                    continue
                for window, array in zip(whole, run.values(stage), strict=True):
                    check.close(window[stage.end.name], array)
                seen.append(stage.end.name)
        assert seen == [value.name for value in ends]
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
    with pytest.raises(UnsupportedModelError, match="holds a graph of its own"):
        Calibration(model, [], found)


def test_a_stage_that_does_not_run_is_named(decoder: ir.Model) -> None:
    inputs = windows(decoder)
    for window in inputs:
        window["input_ids"] = window["input_ids"] + 10_000
    with Calibration(decoder, inputs, find_linears(decoder)) as run:
        first: Stage = run.stages[0]
        with pytest.raises(CalibrationError, match="does not run on windows of text"):
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


def test_a_short_text_does_not_cost_the_long_one_its_windows(tiny_export: Callable[..., Path]) -> None:
    tokenizer = tiny_export("llama") / "tokenizer.json"
    short = CalibrationText(texts={"a": "a" * 1000, "b": "b" * 25}, tokenizer=tokenizer, vocab_size=320)
    ids, facts = short.windows(400, 100)
    assert ids.shape == (4, 100)
    assert facts["text"] == "400 tokens of a; shorter than a window of 100 tokens and left out: b"
    assert short.windows(100, 25)[0].shape == (4, 25)
    assert len({*short.windows(100, 25)[0][:, 0]}) == 2
    # What a text does not have, the others give.
    few = CalibrationText(texts={"a": "a" * 1000, "b": "b" * 100}, tokenizer=tokenizer, vocab_size=320)
    ids, _ = few.windows(600, 100)
    assert ids.shape == (6, 100)
    assert sum(len({*row, ids[1, 0]}) == 1 for row in ids) == 1
    both = dataclasses.replace(few, texts={"a": "a" * 30, "b": "b" * 25})
    assert both.windows(400, 100)[0].shape == (2, 25), "all are short"


@pytest.mark.parametrize(
    ("available", "count", "want"),
    [([10, 10], 6, [3, 3]), ([10, 1], 6, [5, 1]), ([1, 9, 2], 9, [1, 6, 2]), ([2, 2], 9, [2, 2]), ([5], 3, [3])],
)
def test_law_shares_are_as_even_as_can_be(available: list[int], count: int, want: list[int]) -> None:
    assert _even(available, count) == want


def test_the_beginning_of_a_text_is_left_for_measuring(tiny_export: Callable[..., Path]) -> None:
    text = CalibrationText(texts={"a": "a" * 50 + "b" * 950}, tokenizer=tiny_export("llama") / "tokenizer.json")
    text = dataclasses.replace(text, vocab_size=320)
    assert len(set(text.windows(1000, 50)[0].ravel())) == 2
    assert len(set(dataclasses.replace(text, held_out=50).windows(1000, 50)[0].ravel())) == 1
    assert len(set(dataclasses.replace(text, held_out=600).windows(1000, 50)[0].ravel())) == 2, "too short for that"


@pytest.mark.parametrize("architecture", ["vit", "whisper"])
def test_models_that_read_no_text_are_refused_before_anything_runs(architecture: str) -> None:
    name = {"vit": "pixel_values", "whisper": "encoder_hidden_states"}[architecture]
    value = ir.val(name, ir.DataType.FLOAT, ["batch", "channels", "height", "width"])
    graph = ir.Graph([value], [], nodes=[])
    with pytest.raises(CalibrationError, match=name):
        feeds(graph, np.ones((1, 1024), np.int64))


def test_an_early_linear_of_other_rows_costs_nobody_the_teacher() -> None:
    """A linear reads a learned table of 5 rows before any token is seen."""
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    positions = builder.op("Identity", builder.weight(1, 5, 32), width=32)
    early = builder.op("ReduceMean", builder.op("MatMul", positions, builder.weight(32, 32), width=32), width=32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    x = builder.op("Add", builder.step("linear", x, x), early, width=32)
    model = builder.finish(builder.step("linear", x, x), False, table)
    linears, drifts = find_linears(model), {}
    inputs = feeds(model.graph, np.random.default_rng(3).integers(0, 96, (3, 12)))
    with Calibration(model, inputs, linears) as run:
        for stage in run.stages:
            group = run.observe(stage)
            for linear in group.linears:
                drifts[linear.name] = group.stats.drift_KK is not None
                group.replace(linear, linear.w_NK() * np.float32(1.01))
    assert sum(drifts.values()) == len(linears) - 2, "the first two read what nobody has changed yet"


def test_activations_without_a_declared_type_are_taken_as_they_are(
    tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    model = models.load(tiny_export("llama"), work_dir=tmp_path).model
    assert sum(value.dtype is None for node in model.graph for value in node.outputs) > 100
    linears = find_linears(model)
    with Calibration(model, windows(model), linears) as run:
        assert sum(run.observe(stage).stats.count == 36 for stage in run.stages) == len(run.stages)


def test_quantized_embeddings_with_zero_points_are_part_of_a_stage(decoder: ir.Model) -> None:
    passes = "rtn(symmetric=False, exclude=('block*', 'head*'), overrides={'embedding': {'symmetric': False}})"
    pipeline.run(decoder, pipeline.parse(passes), Context())
    linears = [one for one in find_linears(decoder) if one.holder != "MatMulNBits"]
    with Calibration(decoder, windows(decoder), linears) as run:
        assert all(run.observe(stage).stats is not None for stage in run.stages)
