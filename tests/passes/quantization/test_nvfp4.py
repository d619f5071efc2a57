"""Nvfp4: the laws of rounding to e2m1 with two scales, and what the graph holds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from test_fp8 import CUDA, model, weights

from onnxpress.compiler.formats import FP4_WEIGHT, float_type, fp4_matrix, stored
from onnxpress.compiler.linears import find_linears
from onnxpress.passes.quantization.nvfp4 import Nvfp4, round_nvfp4

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LEVELS = np.unique([*LEVELS, *-LEVELS])


def read(w_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matrix, and the step of each block."""
    with np.errstate(divide="raise", invalid="raise"):
        packed, scale_NG, of_all = round_nvfp4(w_NK)
    assert packed.shape == (len(w_NK), w_NK.shape[1] // 2)
    assert (packed.dtype, scale_NG.dtype) == (np.uint8, np.uint8)
    step_NG = scale_NG.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * of_all
    return fp4_matrix(packed, scale_NG, float(of_all), 16), step_NG


def test_law_every_weight_becomes_its_nearest_level() -> None:
    """Against a loop in float64; the last block of a row is short, one is zero, one too small for its scale."""
    w_NK = weights(6, 72)
    got_NK, step_NG = read(w_NK)
    assert step_NG.shape == (6, 5)
    assert np.isfinite(got_NK).all()
    assert (got_NK[:2, :16] == 0).all()
    assert got_NK.any(axis=1).all()
    for (row, column), w in np.ndenumerate(w_NK.astype(np.float64)):
        best = np.abs(LEVELS * float(step_NG[row, column // 16]) - w).min()
        assert abs(float(got_NK[row, column]) - w) <= best + 1e-6 * abs(w)


def test_law_scales_follow_the_largest_of_a_block() -> None:
    w_NK = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    _, step_NG = read(w_NK)
    wanted = np.abs(w_NK.reshape(16, 4, 16)).max(axis=-1) / 6
    assert np.abs(step_NG / wanted - 1).max() <= 1 / 16 + 1e-6


def test_law_weights_on_a_grid_stay() -> None:
    rng = np.random.default_rng(1)
    w_NK = rng.choice(LEVELS, (8, 64)).astype(np.float32)
    w_NK[:, ::16] = 6
    scale_NG = 2.0 ** rng.integers(-3, 4, (8, 4))
    scale_NG[0, 0] = 448
    w_NK *= np.repeat(scale_NG, 16, axis=1).astype(np.float32)
    assert np.array_equal(read(w_NK)[0], w_NK)


def test_zeros_stay() -> None:
    assert not read(np.zeros((2, 32), np.float32))[0].any()


@pytest.mark.parametrize("kind", ["linear", "biased"])
def test_what_the_node_holds_reads_back(kind: str) -> None:
    made = model(kind)
    before = [one.w_NK() for one in find_linears(made, expand_pairs=True)]
    report = Nvfp4().run(made, CUDA)
    after = find_linears(made, expand_pairs=True)
    assert len(report.changed) == len(before) == len(after)
    for linear, w_NK in zip(after, before, strict=True):
        assert linear.holder == FP4_WEIGHT
        assert linear.shape == w_NK.shape
        assert np.array_equal(linear.w_NK(), read(w_NK)[0])
        assert linear.node.inputs[3].const_value.shape == ()  # type: ignore[union-attr]
        assert float_type(linear.node) == ir.DataType.FLOAT16
        if linear.bias is not None:
            assert linear.node.inputs[4:] == (None, linear.bias)
    assert (kind == "biased") == any(one.bias is not None for one in after)
    held = stored(after[0].node)
    assert held is not None
    assert held.description == f"{FP4_WEIGHT}, NVFP4 in blocks of 16"
    assert 4.5 <= report.metrics["bits_per_weight"] < 4.51
    assert 0.05 < report.metrics["weight_error"] < 0.15
    assert not Nvfp4().run(made, CUDA).modified


def test_rows_of_an_odd_number_are_left() -> None:
    report = Nvfp4().run(model(width=33), CUDA)
    assert not report.modified
    assert report.reasons()["rows of 33 weights do not fill bytes of two"] == 2
