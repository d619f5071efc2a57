"""SmoothQuant: the model stays the same, and int8 activations cost less afterwards."""

from __future__ import annotations

import folds
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError, StreamingError
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.stats import Stats
from onnxpress.passes.quantization.rtn import Rtn
from onnxpress.passes.quantization.smooth import Smooth, _shared_max

FEW = {"tokens": 512, "length": 64}


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.5}, {"granularity": "block"}, {"granularity": "block", "block_size": 16}]
)
def test_law_the_model_stays_the_same(options: dict[str, object]) -> None:
    report = folds.law_the_model_stays_the_same(Smooth(**FEW, **options), folds.network())
    assert report.metrics["error_ratio"] < 1


def int8_error(w_NK: np.ndarray, x_TK: np.ndarray, factor_K: np.ndarray) -> float:
    """Of a product whose operands are rounded to 8 bits: a step for all of x, and one per row of w."""
    x, w = x_TK / factor_K, w_NK * factor_K
    steps = np.abs(x).max() / 127, np.abs(w).max(axis=1, keepdims=True) / 127
    rounded = [np.rint(one / step) * step for one, step in zip((x, w), steps, strict=True)]
    return float(np.square(rounded[0] @ rounded[1].T - x_TK @ w_NK.T).sum(axis=1).mean())


def test_law_the_error_that_decides_is_the_error_that_occurs() -> None:
    rng = np.random.default_rng(0)
    x_TK = rng.standard_normal((4096, 64)).astype(np.float32)
    x_TK[:, 5] *= 60
    w_NK = rng.standard_normal((48, 64)).astype(np.float32)
    stats = Stats(64)
    stats.update(x_TK)
    found = Smooth().choose([w_NK], stats)
    assert found is not None
    factor_K, new, old = found
    assert int8_error(w_NK, x_TK, np.ones(64)) == pytest.approx(old, rel=0.1)
    assert int8_error(w_NK, x_TK, factor_K) == pytest.approx(new, rel=0.1)
    assert new < 0.2 * old
    assert np.argmax(factor_K) == 5


@pytest.mark.parametrize("alpha", [0.35, 0.75])
def test_law_the_factor_is_that_of_the_paper(alpha: float) -> None:
    rng = np.random.default_rng(0)
    x_TK = (rng.standard_normal((4096, 64)) * np.where(np.arange(64) % 9 == 0, 60, 1)).astype(np.float32)
    w_NK = (rng.standard_normal((48, 64)) * np.linspace(0.5, 2, 64)).astype(np.float32)
    stats = Stats(64)
    stats.update(x_TK)
    found = Smooth(alpha=alpha).choose([w_NK[:20], w_NK[20:]], stats)
    assert found is not None
    paper_K = np.abs(x_TK).max(axis=0) ** alpha / np.abs(w_NK).max(axis=0) ** (1 - alpha)
    # Up to one number for all features, which changes nothing.
    np.testing.assert_allclose(found[0] / found[0][0], paper_K / paper_K[0], rtol=1e-5)


def test_even_activations_need_no_factor() -> None:
    stats = Stats(64)
    stats.update(np.random.default_rng(0).choice([-1.0, 1.0], (512, 64)).astype(np.float32))
    w_NK = np.ones((8, 64), np.float32)
    w_NK[:, 3] = 9
    assert Smooth(alpha=1e-3).choose([w_NK], stats) is None
    assert Smooth().choose([w_NK], Stats(64)) is None, "no tokens"


def test_features_that_never_occur_keep_their_weights() -> None:
    stats = Stats(32)
    x_TK = np.random.default_rng(0).standard_normal((512, 32)).astype(np.float32)
    x_TK[:, 7], x_TK[:, 3] = 0, 50 * x_TK[:, 3]
    stats.update(x_TK)
    found = Smooth().choose([np.ones((4, 32), np.float32)], stats)
    assert found is not None
    assert found[0][7] == 1
    assert np.isfinite(found[0]).all()


def test_law_the_largest_of_a_block_is_shared() -> None:
    x = np.random.default_rng(0).random((3, 70))
    shared = _shared_max(x, 32)
    assert (shared >= x).all()
    for start in range(0, 70, 32):
        np.testing.assert_array_equal(
            shared[:, start : start + 32],
            np.broadcast_to(x[:, start : start + 32].max(axis=1, keepdims=True), shared[:, start : start + 32].shape),
        )


def test_int8_kernels_lose_less_afterwards() -> None:
    rtn = Rtn(bits=8, block_size=64, exclude=("head", "embedding"))
    smooth = Smooth(**FEW, granularity="block", block_size=64)
    assert folds.loss(lambda: folds.network(outliers=100), smooth, rtn) < 0.7 * folds.loss(
        lambda: folds.network(outliers=100), rtn
    )


def test_text_says_what_it_saw() -> None:
    report = Smooth(**FEW).run(folds.network(), Context())
    assert report.calibration["windows"] == [8, 64]


@pytest.mark.parametrize("options", ["alpha=0.0", "alpha=1.5", "block_size=16", "granularity='token'", "tokens=0"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(OptionError, match="smooth"):
        pipeline.parse(f"smooth({options})")


def test_a_model_without_text_is_left_only_if_asked_for() -> None:
    model = folds.network()
    model.graph.inputs.append(ir.val("pixel_values", ir.DataType.FLOAT, ["batch", 3, "height", "width"]))
    with pytest.raises(StreamingError, match="pixel_values"):
        Smooth().run(model, Context())
    text = CalibrationText(vocab_size=200, own=lambda tokens, length: np.ones((1, 8), np.int64))
    report = Smooth(fallback=True).run(model, Context(calibration=text))
    assert not report.changed
    assert any("pixel_values" in reason for reason in report.reasons())
    report = Smooth(fallback=True).run(folds.network(), Context())
    assert not report.changed
    assert any("no tokenizer.json" in reason for reason in report.reasons())
