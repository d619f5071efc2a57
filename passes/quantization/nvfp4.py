"""Stores weights as 4-bit floats (e2m1) with an 8-bit scale per 16 of them and one scale per matrix (NVFP4), for CUDA.

A linear becomes one MatMulBlockQuantizedFp4Weight; activations stay float16 or bfloat16. 4.5 bits per weight.

Paper:   none; the format is NVIDIA's, described in arXiv:2509.25149, section 2
Axes:    N out features, K in features, G blocks of a row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.formats import FP4_WEIGHT
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization._block_floats import block_maxima, require_cuda, spread
from onnxpress.passes.quantization._stored_linears import HALVES, Floats, StoredLinears, Tensors

BLOCK = 16
LARGEST, LARGEST_SCALE = 6.0, 448.0  # of e2m1 and of e4m3

Codes = npt.NDArray[np.uint8]


def round_nvfp4(w_NK: Floats) -> tuple[Codes, Codes, np.float32]:
    """Codes, two a byte, the first in the low nibble; bytes of the e4m3 scales; the scale of the matrix.

    Args:
        w_NK: finite weights, K even. Not changed.

    Returns:
        uint8 [N, K / 2], uint8 [N, ceil(K / 16)], and weight per unit of code and scale.
    Laws:   every weight becomes the nearest of the eight levels, times its scales, and the largest of them beyond.
    """
    maxima_NG = block_maxima(w_NK, BLOCK)
    of_all = np.float32(maxima_NG.max(initial=0.0) / np.float32(LARGEST * LARGEST_SCALE))
    of_all = np.maximum(of_all, np.finfo(np.float32).tiny) if of_all > 0 or maxima_NG.any() else np.float32(1)
    scale_NG = np.minimum(maxima_NG / np.float32(LARGEST) / of_all, LARGEST_SCALE).astype(ml_dtypes.float8_e4m3fn)
    step_NG = scale_NG.astype(np.float32) * of_all
    step_NG[step_NG == 0] = np.inf  # weights of a block that is small beside all others become zeros
    relative_NK = w_NK.astype(np.float32) / spread(step_NG, BLOCK, w_NK.shape[1])
    # What a scale that was rounded down leaves beyond the largest level is cut off.
    levels_NK = np.clip(relative_NK, -LARGEST, LARGEST).astype(ml_dtypes.float4_e2m1fn)
    codes_NK = levels_NK.view(np.uint8) & np.uint8(15)
    packed = codes_NK[:, 0::2] | codes_NK[:, 1::2] << np.uint8(4)
    return packed, scale_NG.view(np.uint8), of_all


@dataclass(frozen=True, kw_only=True)
class Nvfp4(StoredLinears):
    """4-bit float weights, an 8-bit float scale per 16; CUDA only."""

    paper: ClassVar[str] = "arXiv:2509.25149"
    operator: ClassVar[str] = FP4_WEIGHT
    float_types: ClassVar[tuple[ir.DataType, ...]] = HALVES
    bits_of_codes: ClassVar[int] = 4

    def check_target(self, context: Context) -> None:
        require_cuda(self.name(), context)

    def weights_of_a_scale(self, linear: Linear) -> int:
        return BLOCK

    def attributes(self, linear: Linear) -> dict[str, Any]:
        return {"block_size": BLOCK}

    def encode(self, w_NK: Floats, dtype: ir.DataType) -> Tensors:
        packed, scale_NG, of_all = round_nvfp4(w_NK)
        return {
            "codes": ir.Tensor(packed),
            "scale": ir.Tensor(scale_NG),
            "scale_of_all": ir.Tensor(np.array(of_all, np.float32)),
        }

    def _refuse(self, linear: Linear, *, is_tied: bool) -> str | None:
        if linear.num_in % 2:
            return f"rows of {linear.num_in} weights do not fill bytes of two"
        return super()._refuse(linear, is_tied=is_tied)
