"""What an artifact is built for: one execution provider and one float type."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.compiler.errors import OptionError, near_miss


@dataclass(frozen=True)
class Target:
    """An execution provider and the float type of activations that its kernels want.

    One artifact serves one target: ONNX Runtime has no float32 GroupQueryAttention on CUDA and no float16 Softmax on
    the CPU, so a file that runs well on both does not exist.
    """

    provider: str  # "cpu" | "cuda"
    dtype: ir.DataType

    @property
    def name(self) -> str:
        """The word the user typed."""
        return next(name for name, one in TARGETS.items() if one == self)


TARGETS: dict[str, Target] = {
    "cpu": Target("cpu", ir.DataType.FLOAT),
    "cuda": Target("cuda", ir.DataType.FLOAT16),
    "cuda-bf16": Target("cuda", ir.DataType.BFLOAT16),
}


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
        OptionError: there is no such target.
    """
    try:
        return TARGETS[name]
    except KeyError:
        raise OptionError(
            f"target: expected {', '.join(TARGETS)}, got {name!r}", hint=near_miss(name, TARGETS)
        ) from None
