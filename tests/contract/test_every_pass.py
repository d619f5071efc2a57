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
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def apply(name: str, model: ir.Model) -> Report | None:
    """Runs the pass's example on the model; None when it says that it has nothing to do here."""
    try:
        return registry.find(name).example(model).run(model, Context(seed=1))
    except OptionError as error:
        if not error.hint:
            pytest.fail(f"{name}: an option without effect must come with a hint")
        return None


@every_pass
@few
@given(model=graphs.models())
def test_keeps_its_promise(name: str, model: ir.Model) -> None:
    before = graphs.run(model)
    apply(name, model)
    check.promised(registry.find(name).promise, before, _as_float32(graphs.run(model)))


@every_pass
@few
@given(model=graphs.models())
def test_changed_is_truthful_and_a_second_run_does_nothing(name: str, model: ir.Model) -> None:
    before = graphs.text(model)
    report = apply(name, model)
    after = graphs.text(model)
    assert (before != after) == (report is not None and report.modified)
    again = apply(name, model)
    # Asked again, some take out what is next, and the others look for what is better than what they found.
    if name not in ("drop_blocks", "prune_ffn", "prune_heads", "awq", "smooth", "rotate"):
        assert again is None or not again.modified, f"second run changed {again.changed}"
        assert graphs.text(model) == after


@every_pass
@few
@given(model=graphs.models())
def test_keeps_the_interface(name: str, model: ir.Model) -> None:
    inputs, outputs = [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]
    apply(name, model)
    # What has a default is an offer: a caller who knows nothing of it gets what it got.
    assert [v.name for v in model.graph.inputs if v.name not in model.graph.initializers] == inputs
    assert [v.name for v in model.graph.outputs] == outputs


@every_pass
@few
@given(model=graphs.models())
def test_a_skip_has_a_reason_and_a_site(name: str, model: ir.Model) -> None:
    report = apply(name, model)
    if report is not None:
        assert all(skip.site and skip.reason for skip in report.skipped)
        assert len(set(report.changed)) == len(report.changed), "a site is named twice"
        assert report.bytes_after > 0


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


def _as_float32(outputs: dict[str, graphs.Array]) -> dict[str, graphs.Array]:
    return {key: value.astype("float32") for key, value in outputs.items()}
