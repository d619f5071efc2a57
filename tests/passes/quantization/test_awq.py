"""AWQ: the model stays the same, and rounding costs less afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import check
import folds
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Pass
from onnxpress.compiler.stats import Stats
from onnxpress.passes.quantization.awq import Awq
from onnxpress.passes.quantization.rtn import Rtn
from onnxpress.passes.quantization.smooth import Smooth

FEW = {"tokens": 512, "length": 64}


def correlated(columns: int = 64, *, tokens: int = 2048) -> Stats:
    rng = np.random.default_rng(0)
    x_TK = rng.standard_normal((tokens, 8)) @ rng.standard_normal((8, columns)) + 0.3 * rng.standard_normal(
        (tokens, columns)
    )
    x_TK[:, ::16] *= 12
    stats = Stats(columns)
    stats.update(x_TK.astype(np.float32))
    return stats


@pytest.mark.parametrize(("tied", "biased"), [(False, False), (True, False), (False, True)])
def test_law_the_model_stays_the_same(tied: bool, biased: bool) -> None:
    report = folds.law_the_model_stays_the_same(Awq(**FEW), folds.network(tied=tied, biased=biased))
    # Norms before gate and up, products before down, and the norm before a head of its own.
    assert len(report.changed) == (4 if tied else 5)
    assert report.metrics["error_ratio"] < 0.9
    if tied:
        assert "its weight is shared" in report.reasons()


def test_law_the_error_is_never_above_that_of_rounding() -> None:
    rng = np.random.default_rng(1)
    w_NK = rng.standard_t(5, (48, 64)).astype(np.float32)
    for stats in (correlated(), correlated(tokens=3)):
        found = Awq(block_size=16).choose([w_NK], stats)
        assert found is not None
        factor_K, new, old = found
        assert new < old
        assert (factor_K > 0).all()
        assert np.argmax(factor_K) % 16 == 0, "the features that get large get a finer grid"


def test_nothing_helps_what_needs_no_help() -> None:
    stats = Stats(64)
    stats.update(np.random.default_rng(0).choice([-1, 1], (4096, 64)).astype(np.float32))
    grid = np.random.default_rng(1).integers(-8, 8, (32, 64)).astype(np.float32)
    assert Awq(block_size=16, symmetric=True).choose([grid], stats) is None
    assert Awq().choose([grid], Stats(64)) is None, "no tokens"


def test_rounding_costs_less_afterwards() -> None:
    rtn = Rtn(bits=4, block_size=32, symmetric=False, accuracy_level=0, exclude=("head", "embedding"))
    alone, after = folds.loss(folds.network, rtn), folds.loss(folds.network, Awq(**FEW), rtn)
    assert after < 0.8 * alone


@pytest.mark.parametrize("make", [Awq, Smooth])
@pytest.mark.parametrize("architecture", ["qwen2", "phi3", "gpt2", "gemma"])
def test_architectures(tiny_export: Callable[..., Path], architecture: str, make: type[Pass], tmp_path: Path) -> None:
    # Biases (Qwen2), packed matrices (Phi-3), LayerNorm with a bias and a tied head (GPT-2), gains of 1 + w (Gemma).
    model = models.load(tiny_export(architecture), work_dir=tmp_path).model
    context = Context()
    for one in pipeline.parse("fuse"):
        one.run(model, context)
    inputs = feeds(model.graph, np.random.default_rng(0).integers(0, 300, (1, 24)))[0]
    before = graphs.run(model, inputs)
    report = make(**FEW).run(model, context)
    after = graphs.run(model, inputs)
    assert report.changed, report.reasons()
    for name, value in before.items():
        check.close(value, after[name], name, tolerance=2e-5)


def test_what_is_quantized_is_left() -> None:
    model = folds.network()
    Rtn(bits=4, block_size=16).run(model, Context())
    report = Awq(**FEW).run(model, Context())
    assert not report.changed
    assert report.reasons() == {"already quantized: comes before quantizers": len(find_linears(model))}


def test_what_others_read_is_left() -> None:
    model = folds.network()
    linear = next(one for one in find_linears(model) if one.num_out == 128)
    seen = ir.node("Identity", [linear.activation], name="seen")
    seen.outputs[0].name, seen.outputs[0].dtype = "seen", ir.DataType.FLOAT
    model.graph.append(seen)
    model.graph.outputs.append(seen.outputs[0])
    report = Awq(**FEW).run(model, Context())
    assert "something else reads its activation too" in report.reasons()


@pytest.mark.parametrize("options", ["bits=3", "block_size=7", "tokens=0", "length=0"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(OptionError, match="awq"):
        pipeline.parse(f"awq({options})")


def test_a_transpose_that_two_matrices_share_is_seen() -> None:
    builder = graphs.Builder(64, 200, 0)
    table = builder.weight(200, 64, name="table", scale=1.0)
    stream = builder.op("Gather", table, builder.ids, width=64, axis=0)
    turned = builder.op("Transpose", builder.weight(64, 64), perm=[1, 0])
    for _ in range(2):
        stream = builder.op("Add", stream, builder.op("MatMul", builder.norm(stream), turned, width=64), width=64)
    model = builder.finish(builder.norm(stream), False, table)
    before = graphs.run(model, folds.ids())["logits"]
    report = Awq(**FEW).run(model, Context(calibration=CalibrationText(vocab_size=200)))
    assert report.reasons()["its weight is shared"] == 2
    check.close(before, graphs.run(model, folds.ids())["logits"], tolerance=2e-6)


@pytest.mark.parametrize("what", ["one number", "overridable"])
def test_gains_that_hold_no_factor_are_left(what: str) -> None:
    model = folds.network()
    for value in [one for one in model.graph.initializers.values() if one.shape is not None and one.shape == [64]]:
        if what == "one number":
            value.const_value = ir.Tensor(np.array([2.0], np.float32), name=value.name)
            value.shape = ir.Shape([1])
        else:
            model.graph.inputs.append(value)
    before = graphs.run(model, folds.ids())["logits"]
    report = Awq(**FEW).run(model, Context(calibration=CalibrationText(vocab_size=200)))
    assert not any(name == "head" for name in report.changed)
    check.close(before, graphs.run(model, folds.ids())["logits"], tolerance=2e-6)
