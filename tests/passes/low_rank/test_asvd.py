"""Asvd: the scaling of the paper, and where it stands between svd and svd_llm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.stats import Stats
from onnxpress.compiler.whitening import Activation, output_directions
from onnxpress.passes.low_rank.asvd import Asvd


def test_law_it_is_the_decomposition_of_scaled_columns() -> None:
    rng = np.random.default_rng(0)
    x_TK = rng.standard_normal((300, 20)) * np.geomspace(0.1, 10, 20)
    stats = Stats(20)
    stats.update(x_TK)
    w_NK, scale_K = rng.standard_normal((32, 20)), np.abs(x_TK.astype(np.float32)).mean(axis=0) ** 0.5
    left, values, right = np.linalg.svd(w_NK * scale_K, full_matrices=False)
    want = (left[:, :6] * values[:6]) @ right[:6] / scale_K
    found = output_directions(w_NK, Activation(Asvd(ratio=0.3).moments(stats)))
    first, second = found.factors(w_NK, 6)
    np.testing.assert_allclose((first @ second).T, want, atol=1e-6 * np.abs(want).max())


def test_without_scaling_it_is_svd(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("llama"), work_dir=tmp_path)
    plain, scaled = source.model.clone(), source.model
    context = Context(calibration=CalibrationText(vocab_size=200))
    pipeline.run(plain, pipeline.parse("svd(ratio=0.3)"), context)
    text = "tokens=64, length=16, allocation='uniform'"
    ((_, report),) = pipeline.run(scaled, pipeline.parse(f"asvd(ratio=0.3, alpha=0.0, {text})"), context)
    assert report.changed
    for one, two in zip(find_linears(plain), find_linears(scaled), strict=True):
        assert (one.factors is None) == (two.factors is None)
        np.testing.assert_allclose(one.w_NK(), two.w_NK(), atol=1e-4 * np.abs(one.w_NK()).max())


def test_matrices_that_stay_whole_are_left_as_they_are(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("llama"), work_dir=tmp_path)
    before = {one.name: one.w_NK().copy() for one in find_linears(source.model)}
    context = Context(calibration=CalibrationText(vocab_size=200))
    text = "tokens=64, length=16, probe=16"
    ((_, report),) = pipeline.run(source.model, pipeline.parse(f"asvd(ratio=0.1, {text})"), context)
    whole = [one for one in find_linears(source.model) if one.factors is None]
    assert whole
    assert all(np.array_equal(one.w_NK(), before[one.name]) for one in whole)
    assert any("stays whole" in reason for reason in report.reasons())


def test_alpha_is_checked() -> None:
    with pytest.raises(OptionError, match="alpha must be from 0 to 2"):
        Asvd(ratio=0.2, alpha=3.0)
