"""Stores weights in 4 bits on 16 levels that normal weights use equally often (NF4), or on those of FP4.

A linear becomes one MatMulBnb4, which has kernels on CUDA and, slow, on the CPU; activations are left alone.

Paper:   Dettmers et al., arXiv:2305.14314, appendix E
Axes:    N out features, K in features
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.compiler.formats import FP4, NF4
from onnxpress.compiler.linears import Linear
from onnxpress.passes.quantization._stored_linears import HALVES, Floats, StoredLinears, Tensors


def round_levels(w_NK: Floats, levels: npt.NDArray[np.float32], block: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Codes of the nearest levels, two a byte, the first in the high nibble, and the largest |weight| of each block.

    Args:
        w_NK: its size is a multiple of `block`.
        levels: of each of the 16 codes, at most 1 in size.
        block: weights along the flattened rows that share a scale.

    Returns:
        uint8 [N K / 2] and float32 [N K / block].
    """
    w_Gb = w_NK.astype(np.float32).reshape(-1, block)
    absmax_G = np.abs(w_Gb).max(axis=1)
    order = np.argsort(levels)
    middles = (levels[order][1:] + levels[order][:-1]) / 2
    relative = w_Gb / np.where(absmax_G > 0, absmax_G, 1)[:, None]
    codes = order.astype(np.uint8)[np.searchsorted(middles, relative.ravel())]
    packed = np.bitwise_or(codes[0::2] << np.uint8(4), codes[1::2]).astype(np.uint8, copy=False)
    return packed, absmax_G


@dataclass(frozen=True, kw_only=True)
class Nf4(StoredLinears):
    """4-bit weights on the levels of NF4 or FP4, a scale per block."""

    paper: ClassVar[str] = "arXiv:2305.14314"
    operator: ClassVar[str] = "MatMulBnb4"
    float_types: ClassVar[tuple[ir.DataType, ...]] = (ir.DataType.FLOAT, *HALVES)
    bits_of_codes: ClassVar[int] = 4

    levels: Literal["nf4", "fp4"] = "nf4"  # NormalFloat, or 4-bit floats
    block_size: int = 64  # weights that share a scale: 16, 32, 64 or 128; narrower where a row is no multiple of it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.block_size in (16, 32, 64, 128), "block_size", "16, 32, 64 or 128", "64 is that of the paper")

    def weights_of_a_scale(self, linear: Linear) -> int:
        return self._block(linear.num_in)

    def attributes(self, linear: Linear) -> dict[str, Any]:
        block = self._block(linear.num_in)
        return {"K": linear.num_in, "N": linear.num_out, "block_size": block, "quant_type": int(self.levels == "nf4")}

    def encode(self, w_NK: Floats, dtype: ir.DataType) -> Tensors:
        codes, absmax = round_levels(w_NK, NF4 if self.levels == "nf4" else FP4, self._block(w_NK.shape[1]))
        return {"codes": ir.Tensor(codes), "absmax": ir.Tensor(absmax.astype(dtype.numpy()), dtype=dtype)}

    def _refuse(self, linear: Linear, *, is_tied: bool) -> str | None:
        if linear.num_in % 16:
            return f"rows of {linear.num_in} weights are not a multiple of 16, the smallest block"
        return super()._refuse(linear, is_tied=is_tied)

    def _block(self, width: int) -> int:
        block = self.block_size
        while block > 16 and width % block:
            block //= 2
        return block
