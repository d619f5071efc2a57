"""The watchers see what they should: a broken promise, a loss, and nothing where nothing happened."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from decoders import VOCABULARY, decoder, write_decoder

from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import VerificationError
from onnxpress.compiler.linears import find_linears, unique_name
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.probe import Probe, kl_divergence, log_softmax
from onnxpress.compiler.registry import find
from onnxpress.compiler.verify import LossMeter, Verifier, compare, in_place, snapshot, write_with_exact_activations
from onnxpress.passes.canonicalize.simplify import Simplify

IDS = np.arange(3, 67)[None]


@dataclass(frozen=True, kw_only=True)
class _Scale(Pass):
    """Multiplies one weight by a factor and promises whatever it is told to."""

    factor: float = 1.0

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        linear = find_linears(model)[0]
        array = linear.w_NK() * np.float32(self.factor)
        linear.set_weight(lambda: array, unique_name(model.graph, "scaled"))
        report.change(linear.name)
        return report


class Exact(_Scale):
    promise: ClassVar[Promise] = Promise.EXACT


class Close(_Scale):
    promise: ClassVar[Promise] = Promise.CLOSE


class Lossy(_Scale):
    promise: ClassVar[Promise] = Promise.LOSSY


def verified(pass_: Pass, tmp_path: Path) -> Verifier:
    verifier = Verifier(tmp_path, vocab_size=VOCABULARY)
    pipeline.run(decoder(), [pass_], Context(), [verifier])
    return verifier


@pytest.mark.parametrize("pass_", [Exact(), Close(), Close(factor=1 + 1e-5), Lossy(factor=2.0)])
def test_accepts_what_was_promised(pass_: Pass, tmp_path: Path) -> None:
    verifier = verified(pass_, tmp_path)
    assert len(verifier.results) == (pass_.promise is not Promise.LOSSY)


def test_a_weight_that_is_turned_for_good_changes_nothing(tmp_path: Path) -> None:
    """ONNX Runtime packs constants, and sums packed ones in another order: that is none of the pass's doing."""
    builder = graphs.Builder(256, 96, 0)
    table = builder.weight(96, 256, name="table", scale=1.0)
    stream = builder.op("Gather", table, builder.ids, width=256, axis=0)
    for _ in range(3):
        stream = builder.step("transposed", builder.norm(stream), stream)
    model = builder.finish(stream, True, table)
    verifier = Verifier(tmp_path, vocab_size=96)
    ((_, report),) = pipeline.run(model, [Simplify()], Context(), [verifier])
    assert report.modified
    assert [row["largest_difference"] for row in verifier.results] == [0.0]


_ROUNDING = """<ir_version: 10, opset_import: ["": 21]> g (float[2, 8] x) => (float[2, 8] y) {
    product = MatMul (x, w)
    codes, scale, zero = DynamicQuantizeLinear (product)
    y = DequantizeLinear (codes, scale, zero)
}"""


def rounding() -> ir.Model:
    """A product whose result is rounded to 8 bits."""
    model = ir.from_onnx_text(_ROUNDING)
    weight = ir.tensor(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), name="w")
    value = ir.Value(name="w", shape=weight.shape, type=ir.TensorType(weight.dtype), const_value=weight)
    model.graph[0].replace_input_with(1, value)
    model.graph.register_initializer(value)
    return model


def test_what_a_graph_rounds_itself_is_noted(tmp_path: Path) -> None:
    """There a last bit may become a step, so a CLOSE pass is not blamed; an EXACT one has no such excuse."""
    verifier = Verifier(tmp_path)
    pipeline.run(rounding(), [Close(factor=1.02)], Context(), [verifier])
    (row,) = verifier.results
    assert row["note"].startswith("not verified: y differs by")
    with pytest.raises(VerificationError):
        pipeline.run(rounding(), [Exact(factor=1.02)], Context(), [Verifier(tmp_path)])


def test_what_rounding_cannot_explain_fails_there_too(tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        pipeline.run(rounding(), [Close(factor=1.3)], Context(), [Verifier(tmp_path)])


def test_activations_that_matmulnbits_rounds_are_compared_exactly(tmp_path: Path) -> None:
    model = decoder()
    find("rtn")().run(model, Context())
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    rounded = Verifier(tmp_path, vocab_size=VOCABULARY)
    rounded.before(Exact(), model)
    exact = ir.load(tmp_path / "verify0.onnx")
    for node in exact.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    plain = Verifier(tmp_path, vocab_size=VOCABULARY)
    plain.before(Exact(), exact)
    assert rounded._outputs is not None
    assert plain._outputs is not None
    assert all(np.array_equal(rounded._outputs[name], plain._outputs[name]) for name in plain._outputs)
    assert not list(tmp_path.glob("*exact*"))


@pytest.mark.parametrize("pass_", [Exact(factor=1 + 1e-5), Close(factor=9.0), Close(factor=float("nan"))])
def test_a_broken_promise_names_the_pass_and_the_site_and_keeps_both_models(pass_: Pass, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match=r"block0\.q") as caught:
        verified(pass_, tmp_path)
    assert str(pass_) in str(caught.value)
    folder = Path(str(caught.value.hint).partition(" in ")[2].partition(" (")[0])
    for name in ("before.onnx", "after.onnx"):
        Probe(folder / name)


def test_compare_sees_what_is_wrong() -> None:
    right = {"y": np.arange(1.0, 5.0, dtype=np.float32)}
    assert compare(right, right, is_exact=True) == (None, 0.0)
    wrong = {
        "a bit": np.nextafter(right["y"], np.float32(9)),
        "shape": right["y"].reshape(2, 2),
        "zeros": right["y"] * 0,
        "nan": right["y"] * np.float32("nan"),
        "one percent": right["y"] * np.float32(1.01),
    }
    for name, array in wrong.items():
        assert compare(right, {"y": array}, is_exact=True)[0] is not None, name
        assert (compare(right, {"y": array}, is_exact=False)[0] is None) == (name == "a bit"), name
    assert compare(right, {}, is_exact=False)[0] == "output y is gone"


def test_a_snapshot_is_the_model_and_its_weights_are_read_from_there(tmp_path: Path) -> None:
    model = decoder()
    calls = []
    linear = find_linears(model)[0]
    array = linear.w_NK().copy()
    linear.set_weight(lambda: calls.append(1) or array, "lazy")  # type: ignore[func-returns-value]
    path = snapshot(model, tmp_path, "one")
    expected = len(calls)
    np.testing.assert_array_equal(find_linears(model)[0].w_NK(), array)
    assert len(calls) == expected
    assert Probe(path).is_language_model


def meter(passes: list[Pass], tmp_path: Path, **options: bool) -> tuple[LossMeter, list[Report]]:
    watcher = LossMeter(passes, tmp_path, IDS, "test", **options)
    model = decoder()
    done = pipeline.run(model, passes, Context(), [watcher])
    watcher.finish(snapshot(model, tmp_path, "final"))
    return watcher, [report for _, report in done]


def test_each_lossy_pass_is_charged_its_own_cost(tmp_path: Path) -> None:
    watcher, reports = meter([Close(), Lossy(factor=1.5), Lossy(factor=1.0), Lossy(factor=3.0)], tmp_path)
    assert "kl" not in reports[0].metrics
    first, nothing, last = (report.metrics for report in reports[1:])
    assert first["kl"] == first["kl_added"] > 0
    assert nothing["kl_added"] == pytest.approx(0, abs=1e-9)
    assert last["kl"] == pytest.approx(first["kl"] + last["kl_added"])
    assert watcher.quality["kl"] == last["kl"]
    assert watcher.quality["tokens"] == IDS.shape[1] - 1
    assert watcher.quality["perplexity_before"] != watcher.quality["perplexity_after"]


def test_a_last_pass_without_work_leaves_the_loss_to_those_before(tmp_path: Path) -> None:
    passes = [Lossy(factor=1.5), find("rtn")(requantize=True, exclude=("*",))]  # type: ignore[call-arg]
    watcher, (first, nothing) = meter(passes, tmp_path)
    assert not nothing.modified
    assert nothing.metrics["kl_added"] == pytest.approx(0, abs=1e-9)
    assert first.metrics["kl"] > 0
    assert watcher.quality["kl"] == pytest.approx(first.metrics["kl"])
    assert watcher.quality["perplexity_after"] != watcher.quality["perplexity_before"]
    alone, (report,) = meter(passes[1:], tmp_path)
    assert alone.quality == report.metrics == {}


def test_the_kl_is_that_of_the_outputs(tmp_path: Path) -> None:
    _, (report,) = meter([Lossy(factor=1.5)], tmp_path)
    before = Probe(snapshot(decoder(), tmp_path, "before")).logits(IDS)[0]
    after = Probe(tmp_path / "final.onnx").logits(IDS)[0]
    expected = kl_divergence(log_softmax(before), log_softmax(after)).mean()
    assert report.metrics["kl"] == pytest.approx(expected, rel=1e-3)


def test_weights_on_disk_are_measured_where_they_lie(tmp_path: Path) -> None:
    """The same divergence as from a saved copy, and no copy."""
    source = tmp_path / "source"
    source.mkdir()
    ir.save(decoder(), source / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    model = ir.load(source / "model.onnx")
    found = in_place(model)
    assert found is not None
    assert found[1] == source
    assert len(found[0]) < 50_000  # the graph alone
    watcher = LossMeter([Lossy()], tmp_path, IDS)
    (_, report), *_ = pipeline.run(model, [Lossy(factor=1.5)], Context(), [watcher])
    assert not list(tmp_path.glob("reference*"))
    watcher.finish(snapshot(model, tmp_path, "final"))
    _, (copied,) = meter([Lossy(factor=1.5)], tmp_path)
    assert report.metrics["kl"] == pytest.approx(copied.metrics["kl"], rel=1e-4)


def test_what_is_not_on_disk_needs_a_copy(tmp_path: Path) -> None:
    model = decoder()
    linear = find_linears(model)[0]
    array = linear.w_NK().copy()
    snapshot(model, tmp_path, "whole")
    assert in_place(model) is not None
    linear.set_weight(lambda: array, "lazy")
    assert in_place(model) is None
    other = tmp_path / "other"
    other.mkdir()
    model.graph.initializers["lazy"].const_value = ir.ExternalTensor(
        "file", 0, array.nbytes, ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="lazy", base_dir=other
    )
    assert in_place(model) is None  # two folders


def test_a_verifier_takes_nothing_away_from_the_reference(tmp_path: Path) -> None:
    def sample() -> tuple[np.ndarray, str]:
        time.sleep(0.5)
        return IDS, "test"

    source = tmp_path / "source.onnx"
    ir.save(decoder(), source, external_data="source.onnx.data")
    model, work = ir.load(source), tmp_path / "work"
    work.mkdir()
    passes = [Lossy(factor=1.5), Close()]
    watcher = LossMeter(passes, work, sample=sample)
    pipeline.run(model, passes, Context(), [Verifier(work, VOCABULARY), watcher])
    watcher.finish(snapshot(model, work, "final"))
    assert watcher.quality["kl"] > 0


def test_a_closed_meter_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()

    def sample() -> tuple[np.ndarray, str]:
        gate.wait(10)
        return IDS, "test"

    watcher = LossMeter([Lossy()], tmp_path, sample=sample)
    watcher.before(Lossy(), decoder())
    watcher.close()
    gate.set()
    assert watcher._reference is not None
    assert watcher._reference.exception(10) is not None
    assert not caplog.records


def test_an_error_in_the_thread_is_an_error(tmp_path: Path) -> None:
    def sample() -> tuple[np.ndarray, str]:
        raise OSError("tokenizer.json: cannot be read")

    watcher = LossMeter([Lossy()], tmp_path, sample=sample)
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        pipeline.run(decoder(), [Lossy(factor=2.0)], Context(), [watcher])


def test_error_of_weights_and_of_activations_apart(tmp_path: Path) -> None:
    rtn = find("rtn")(bits=4)  # type: ignore[call-arg]
    watcher, (report,) = meter([rtn], tmp_path, split=True)
    assert report.metrics["kl_weights"] > 0
    parts = watcher.quality["kl_weights"] + watcher.quality["kl_activations"]
    assert parts == pytest.approx(watcher.quality["kl"])
    assert not list(tmp_path.glob("*exact-activations*"))


def test_a_float_graph_rounds_no_activations(tmp_path: Path) -> None:
    assert write_with_exact_activations(snapshot(decoder(), tmp_path, "plain")) is None


def test_a_model_that_does_not_run_here_is_said_not_fatal(tmp_path: Path) -> None:
    model = decoder()
    model.graph[0].domain = "nowhere"
    model.opset_imports["nowhere"] = 1
    watcher = LossMeter([Lossy()], tmp_path, IDS)
    pipeline.run(model, [Lossy()], Context(), [watcher])
    watcher.finish(tmp_path / "none.onnx")
    assert watcher.quality["not_measured"]


def test_kl_is_zero_for_equal_and_positive_for_different() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    p, q = log_softmax(logits), log_softmax(2 * logits)
    np.testing.assert_allclose(np.exp(p).sum(axis=1), 1, rtol=1e-6)
    assert kl_divergence(p, p).max() == 0
    assert kl_divergence(p, q).min() > 0


def test_what_does_not_run_here_is_not_verified_any_more(tmp_path: Path) -> None:
    source = write_decoder(tmp_path / "source")
    made = optimize(source, output=tmp_path / "made", recipe="fp32", target="cuda-bf16", verify=True)
    *_, last = made.report["verified"]
    assert "dtype='bfloat16'" in last["pass"]
    assert "does not run here" in last["not_verified"]
    assert made.report["quality"]["not_measured"]
    assert made.report["target"] == "cuda-bf16"
