"""Stores weights as 8-bit floats (e4m3) with a scale per block of a row, for CUDA.

A linear becomes one MatMulBlockQuantizedFp8Weight; activations stay float16 or bfloat16. Three bits of mantissa round
each weight relative to itself, so small weights beside a large one keep more than in int8, and large ones less.

Paper:   Micikevicius et al., arXiv:2209.05433 (the format); scales per block as in DeepSeek-V3, arXiv:2412.19437
Axes:    N out features, K in features, G blocks of a row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.formats import FP8_WEIGHT
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization._block_floats import block_maxima, require_cuda, spread
from onnxpress.passes.quantization._stored_linears import HALVES, Floats, StoredLinears, Tensors

LARGEST = 448.0  # of e4m3, which has no infinity: what lies beyond would become NaN


def round_fp8(w_NK: Floats, block: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """e4m3 codes and their scales, the largest |weight| of a block on the largest code.

    Args:
        w_NK: finite weights. Not changed.
        block: weights of a row that share a scale; the last block of a row may have fewer.

    Returns:
        float8_e4m3fn [N, K], and float32 [N, ceil(K / block)], weight per unit of code.
    Laws:   nearest code, ties to even; |error| <= |w| / 16 from scale / 64 on, and scale / 1024 below; weights on a
            grid that reaches its largest code stay as they are.
    """
    maxima_NG = block_maxima(w_NK, block)
    # Scales that are no normal numbers are flushed to 0 on a GPU.
    scale_NG = np.maximum(maxima_NG / np.float32(LARGEST), np.finfo(np.float32).tiny)
    scale_NG[maxima_NG == 0] = 1
    relative_NK = w_NK.astype(np.float32) / spread(scale_NG, block, w_NK.shape[1])
    codes_NK = np.clip(relative_NK, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return codes_NK, scale_NG


@dataclass(frozen=True, kw_only=True)
class Fp8(StoredLinears):
    """8-bit float weights, a float32 scale per block; CUDA only."""

    paper: ClassVar[str] = "arXiv:2209.05433"
    operator: ClassVar[str] = FP8_WEIGHT
    float_types: ClassVar[tuple[ir.DataType, ...]] = HALVES
    bits_of_codes: ClassVar[int] = 8

    block_size: int = 128  # weights of a row that share a scale: a power of two from 16 on

    def __post_init__(self) -> None:
        super().__post_init__()
        is_power = self.block_size >= 16 and self.block_size & (self.block_size - 1) == 0
        self.check(is_power, "block_size", "a power of two, at least 16", "128 is that of published checkpoints")

    def check_target(self, context: Context) -> None:
        require_cuda(self.name(), context)

    def weights_of_a_scale(self, linear: Linear) -> int:
        return self.block_size

    def attributes(self, linear: Linear) -> dict[str, Any]:
        return {"block_size": self.block_size}

    def encode(self, w_NK: Floats, dtype: ir.DataType) -> Tensors:
        codes_NK, scale_NG = round_fp8(w_NK, self.block_size)
        return {"codes": ir.Tensor(codes_NK, dtype=ir.DataType.FLOAT8E4M3FN), "scale": ir.Tensor(scale_NG)}
