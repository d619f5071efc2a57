"""What every pass in the registry must keep, on random networks; a new pass file is covered at once."""

from __future__ import annotations

import copy

import check
import graphs
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings

from onnxpress.compiler import pipeline, registry
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.pass_ import Context, Report, options

every_pass = pytest.mark.parametrize("name", registry.names())
few = settings(
    max_examples=24,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def apply(name: str, model: ir.Model) -> Report | None:
    """Runs the pass's example on the model; None when it says that it has nothing to do here."""
    try:
        return pipeline.run(model, [registry.find(name).example(model)], Context(seed=1))[0][1]
    except OptionError as error:
        if not error.hint:
            pytest.fail(f"{name}: an option without effect must come with a hint")
        return None


@every_pass
@few
@given(model=graphs.models())
def test_keeps_the_contract(name: str, model: ir.Model) -> None:
    """All of the contract on one run of the pass: it is the runs that take the time."""
    outputs, before, interface = graphs.run(model), graphs.text(model), _interface(model)
    report = apply(name, model)
    after = graphs.text(model)
    check.promised(registry.find(name).promise, outputs, _as_float32(graphs.run(model)))
    assert _interface(model) == interface
    assert (before != after) == (report is not None and report.modified), "what it says it changed"
    if report is not None:
        assert all(skip.site and skip.reason for skip in report.skipped)
        assert len(set(report.changed)) == len(report.changed), "a site is named twice"
        assert report.bytes_after > 0
    again = apply(name, model)
    # Asked again, some take out what is next, and the others look for what is better than what they found.
    if name not in ("drop_blocks", "prune", "prune_ffn", "prune_heads", "prune_channels", "awq", "smooth", "rotate"):
        assert again is None or not again.modified, f"second run changed {again.changed}"
        assert graphs.text(model) == after


@every_pass
def test_options_round_trip_through_text(name: str) -> None:
    cls = registry.find(name)
    for option, (_, default) in options(cls).items():
        assert not callable(default), f"{name}: {option} has no default"
    try:
        pass_ = cls()
    except OptionError:
        return  # exactly one of several options is needed; its own test covers the text
    (parsed,) = pipeline.parse(str(pass_)).passes
    assert parsed == pass_
    assert str(parsed) == str(pass_)
    assert copy.copy(pass_) == pass_


def _interface(model: ir.Model) -> list[list[str | None]]:
    # What has a default is an offer: a caller who knows nothing of it gets what it got.
    inputs = [v.name for v in model.graph.inputs if v.name not in model.graph.initializers]
    return [inputs, [v.name for v in model.graph.outputs]]


def _as_float32(outputs: dict[str, graphs.Array]) -> dict[str, graphs.Array]:
    return {key: value.astype("float32") for key, value in outputs.items()}
