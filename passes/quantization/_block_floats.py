"""What passes share that store weights as small floats in blocks of a row, for operators that CUDA alone has.

Axes: N out features, K in features, G blocks of a row
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.pass_ import Context

Float2D = npt.NDArray[np.float32]


def require_cuda(name: str, context: Context) -> None:
    """Raises OptionError unless the target is CUDA: ONNX Runtime has kernels for small float weights there alone."""
    if context.target.provider != "cuda":
        raise OptionError(
            f"{name}: ONNX Runtime multiplies weights in small floats on CUDA only, got target {context.target.name!r}",
            hint="use --target cuda, or rtn(bits=8), which runs anywhere",
        )


def block_maxima(w_NK: npt.NDArray[Any], block: int) -> Float2D:
    """Largest |weight| of each block of a row, float32 [N, ceil(K / block)]; the last block may be shorter."""
    size_NK = np.abs(w_NK, dtype=np.float32)
    starts = np.arange(0, w_NK.shape[1], block)
    return np.asarray(np.maximum.reduceat(size_NK, starts, axis=1), np.float32)


def spread(scale_NG: Float2D, block: int, width: int) -> Float2D:
    """The scale of each weight, float32 [N, width]."""
    return np.repeat(scale_NG, block, axis=1)[:, :width]
