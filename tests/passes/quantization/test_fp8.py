"""Fp8: the laws of rounding to e4m3, what the graph holds, and where a kernel is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import graphs
import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import stand_ins

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.formats import FP8_WEIGHT, blocks_matrix, float_type, stored
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Pass
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization.cast_float16 import CastFloat16
from onnxpress.passes.quantization.fp8 import Fp8, round_fp8
from onnxpress.passes.quantization.nvfp4 import Nvfp4
from onnxpress.passes.quantization.rtn import Rtn

CUDA = Context(target=TARGETS["cuda"])
EVERY = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
EVERY = np.unique(EVERY[np.isfinite(EVERY)])


def weights(rows: int, columns: int) -> np.ndarray:
    """Of many sizes, with a block of zeros, one of the smallest numbers, and an outlier."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((rows, columns)) * np.exp(2 * rng.standard_normal((rows, columns)))).astype(np.float32)
    w[0, :32], w[1, :32], w[2, 3] = 0, 1e-41, 1e4
    return w


def read(w_NK: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    codes_NK, scale_NG = round_fp8(w_NK, block)
    assert codes_NK.dtype == ml_dtypes.float8_e4m3fn
    assert scale_NG.shape == (len(w_NK), -(-w_NK.shape[1] // block))
    return blocks_matrix(codes_NK.astype(np.float32), scale_NG, block), scale_NG


def test_law_every_weight_becomes_its_nearest_code() -> None:
    """Against a loop in float64; the last block of a row is short."""
    w_NK = weights(6, 72)
    got_NK, scale_NG = read(w_NK, 32)
    assert np.isfinite(got_NK).all()
    for (row, column), w in np.ndenumerate(w_NK.astype(np.float64)):
        block = w_NK[row, column // 32 * 32 : (column // 32 + 1) * 32]
        scale = float(scale_NG[row, column // 32])
        if np.abs(block).max() > 1e-30:
            assert scale == pytest.approx(float(np.abs(block).max()) / 448, rel=1e-6)
        best = np.abs(EVERY * scale - w).min()
        # Halfway between two codes float32 may fall on either side.
        assert abs(float(got_NK[row, column]) - w) <= best + 1e-6 * abs(w)


def test_law_error_is_relative_to_the_weight() -> None:
    w_NK = weights(64, 256)
    got_NK, scale_NG = read(w_NK, 128)
    scale_NK = np.repeat(scale_NG, 128, axis=1)
    is_normal = np.abs(w_NK) >= scale_NK / 64
    error_NK = np.abs(got_NK - w_NK)
    assert is_normal.mean() > 0.5
    assert (error_NK[is_normal] <= np.abs(w_NK[is_normal]) / 16 * (1 + 1e-6)).all()
    assert (error_NK[~is_normal] <= scale_NK[~is_normal] / 1024 * (1 + 1e-6)).all()
    assert (error_NK[is_normal] > np.abs(w_NK[is_normal]) / 20).any(), "the bound is nearly reached"


def test_law_weights_on_a_grid_stay() -> None:
    rng = np.random.default_rng(1)
    codes_NK = rng.choice(EVERY, (16, 128)).astype(np.float32)
    codes_NK[:, ::32] = 448
    w_NK = blocks_matrix(codes_NK, (2.0 ** rng.integers(-12, 3, (16, 4))).astype(np.float32), 32)
    assert np.array_equal(read(w_NK, 32)[0], w_NK)
    once = read(weights(16, 128), 32)[0]
    assert np.allclose(read(once, 32)[0], once, rtol=1e-6, atol=0), "a second rounding finds the same codes"


def model(kind: str = "linear", width: int = 64, dtype: str = "float16") -> ir.Model:
    builder = graphs.Builder(width, 96, 0)
    table = builder.weight(96, width, name="table")
    x = builder.op("Gather", table, builder.ids, width=width, axis=0)
    made = builder.finish(builder.step(kind, x, x), False, table)
    made.graph.opset_imports["com.microsoft"] = 1
    CastFloat16(dtype=dtype).run(made, CUDA)  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["linear", "biased", "gated"])
def test_what_the_node_holds_reads_back(kind: str, dtype: str) -> None:
    made = model(kind, dtype=dtype)
    before = [one.w_NK() for one in find_linears(made, expand_pairs=True)]
    target = Context(target=TARGETS["cuda-bf16" if dtype == "bfloat16" else "cuda"])
    report = Fp8(block_size=32).run(made, target)
    after = find_linears(made, expand_pairs=True)
    assert len(report.changed) == len(before) == len(after)
    for linear, w_NK in zip(after, before, strict=True):
        assert linear.holder == FP8_WEIGHT
        assert linear.is_quantized
        assert linear.shape == w_NK.shape
        assert np.array_equal(linear.w_NK(), read(w_NK, 32)[0])
        kinds = [None if one is None else one.dtype for one in linear.node.inputs]
        half = ir.DataType[dtype.upper()]
        assert kinds[:3] == [half, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT]
        assert float_type(linear.node) == half
        if linear.bias is not None:
            assert linear.node.inputs[3:] == (None, linear.bias)
            assert linear.bias.dtype == half
    assert (kind == "biased") == any(one.bias is not None for one in after)
    held = stored(after[0].node)
    assert held is not None
    assert held.description == f"{FP8_WEIGHT}, e4m3 in blocks of 32"
    assert report.metrics["bits_per_weight"] == 9
    assert 0.01 < report.metrics["weight_error"] < 0.04
    assert not Fp8(block_size=32).run(made, target).modified


def test_rtn_stores_anew_what_it_reads() -> None:
    made = model()
    Fp8().run(made, CUDA)
    w_NK = find_linears(made, expand_pairs=True)[0].w_NK()
    Rtn(bits=8, requantize=True).run(made, CUDA)
    linear = find_linears(made, expand_pairs=True)[0]
    assert linear.holder == "MatMulNBits"
    assert linear.node.inputs[2].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
    assert np.abs(linear.w_NK() - w_NK).max() < 0.02 * np.abs(w_NK).max()


@pytest.mark.parametrize("pass_", [Fp8(), Nvfp4()])
def test_what_has_no_kernel_is_refused(pass_: Pass) -> None:
    with pytest.raises(OptionError, match="on CUDA only, got target 'cpu'"):
        pass_.run(model(), Context())
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32, name="table")
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    in_float = builder.finish(builder.step("linear", x, x), False, table)
    report = pass_.run(in_float, CUDA)
    assert not report.modified
    assert any("not for float" in reason for reason in report.reasons())


@pytest.mark.parametrize("size", [8, 48, 0])
def test_block_sizes(size: int) -> None:
    with pytest.raises(OptionError, match="block_size must be a power of two"):
        Fp8(block_size=size)


_PLANNER = """
import json, sys
from onnxpress.runtime.placement import audit
print(json.dumps(audit(sys.argv[1], "cuda").to_json()))
"""


def test_planned_on_cuda(tmp_path: Path) -> None:
    """Kernels of both formats exist, and nothing is copied between devices (planned with stand-in libraries)."""
    reason = stand_ins.missing()
    if reason is not None:
        pytest.skip(f"no stand-in CUDA libraries: {reason}")
    stand_ins.build(tmp_path)
    for pass_ in (Fp8(), Nvfp4()):
        made = model("gated")
        report = pass_.run(made, CUDA)
        folder = tmp_path / pass_.name()
        folder.mkdir()
        ir.save(made, folder / "model.onnx")
        done = subprocess.run(
            [sys.executable, "-c", _PLANNER, str(folder)],
            env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        assert (found["stray"], found["inner_copies"]) == ([], [])
        operator = type(pass_).operator  # type: ignore[attr-defined]
        assert found["operators"]["CUDAExecutionProvider"][operator] == len(report.changed) == 4
