"""Sensitivity: the distance of a changed model, of which only the changed part runs."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.errors import CalibrationError
from onnxpress.compiler.linears import Linear, find_linears
from onnxpress.compiler.probe import kl_divergence, log_softmax
from onnxpress.compiler.sensitivity import Sensitivity


def network(*, output: str = "logits", unread: bool = False) -> ir.Model:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table", scale=1.0)
    stream = builder.op("Gather", table, builder.ids, width=32, axis=0)
    for _ in range(3):
        stream = builder.step("residual", stream, builder.step("gated", builder.norm(stream), stream))
    if unread:
        builder.step("linear", stream, stream)
    model = builder.finish(builder.norm(stream), False, table)
    model.graph.outputs[0].name = output
    return model


def ids(length: int = 40) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 96, (1, length))


def opened(model: ir.Model) -> tuple[Sensitivity, list[Linear]]:
    linears = find_linears(model)
    return Sensitivity(model, feeds(model.graph, ids())[0], linears), linears


def changed(linear: Linear, times: float = 1.1) -> dict[int, np.ndarray]:
    return {id(linear.weight): linear.stored_form(linear.w_NK() * np.float32(times))}


@pytest.mark.parametrize("output", ["logits", "last_hidden_state"])
def test_law_the_distance_is_that_of_the_whole_changed_model(output: str) -> None:
    model = network(output=output)
    sensitivity, linears = opened(model)
    before = graphs.run(model, {"input_ids": ids()})[output]
    for linear in linears:
        got = sensitivity.distance(changed(linear))
        copy = model.clone()
        same = next(one for one in find_linears(copy) if one.name == linear.name)
        same.set_weight(lambda linear=linear: linear.w_NK() * np.float32(1.1), "new")
        after = graphs.run(copy, {"input_ids": ids()})[output]
        if output == "logits":
            want = kl_divergence(log_softmax(before[0]), log_softmax(after[0])).mean()
        else:
            want = np.square(after - before).sum() / np.square(before).sum()
        assert want > 1e-7
        assert got == pytest.approx(want, rel=1e-3)


def test_law_no_change_no_distance() -> None:
    sensitivity, linears = opened(network())
    assert sensitivity.distance({}) == 0
    assert sensitivity.distance({key: value for one in linears for key, value in changed(one, 1.0).items()}) == 0


def test_law_changes_do_not_stay() -> None:
    sensitivity, linears = opened(network())
    first = sensitivity.distance(changed(linears[0]))
    sensitivity.distance(changed(linears[1], 5.0))
    assert sensitivity.distance(changed(linears[0])) == first


def test_what_leads_nowhere_costs_nothing() -> None:
    sensitivity, linears = opened(network(unread=True))
    unread = [one for one in linears if not one.output.uses() and not one.output.is_graph_output()]
    assert len(unread) == 1
    assert sensitivity.distance(changed(unread[0])) == 0


def test_only_what_an_error_reaches_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sensitivity, linears = opened(network())
    ran = []
    real = Sensitivity._run
    monkeypatch.setattr(Sensitivity, "_run", lambda self, stage, *rest: (ran.append(stage), real(self, stage, *rest)))
    sensitivity.distance(changed(linears[0]))
    everything = len(ran)
    ran.clear()
    sensitivity.distance(changed(next(one for one in linears if one.kind == "head")))
    assert len(ran) == 1 < everything


def test_outputs_that_are_not_finite() -> None:
    model = network()
    find_linears(model)[0].set_weight(lambda: np.full((64, 32), np.inf, np.float32), "broken", (64, 32))
    with pytest.raises(CalibrationError, match="not finite"):
        opened(model)
