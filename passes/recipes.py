"""Named pipelines: what `--recipe NAME` runs, and what `fuse` stands for in a pass text."""

from __future__ import annotations

import onnx_ir as ir

from onnxpress.compiler.pass_ import Pass
from onnxpress.compiler.target import Target
from onnxpress.passes.canonicalize.simplify import Simplify
from onnxpress.passes.canonicalize.trim_logits import TrimLogits
from onnxpress.passes.canonicalize.unflatten import Unflatten
from onnxpress.passes.fusion.fold_attention_bias import FoldAttentionBias
from onnxpress.passes.fusion.fuse_attention import FuseAttention
from onnxpress.passes.fusion.fuse_encoder_attention import FuseEncoderAttention
from onnxpress.passes.fusion.fuse_gelu import FuseGelu
from onnxpress.passes.fusion.fuse_rmsnorm import FuseRmsnorm
from onnxpress.passes.fusion.fuse_rotary import FuseRotary
from onnxpress.passes.fusion.fuse_skip_norm import FuseSkipNorm
from onnxpress.passes.fusion.fuse_swiglu import FuseSwiglu
from onnxpress.passes.fusion.pack_attention import PackAttention
from onnxpress.passes.fusion.pack_gate_up import PackGateUp
from onnxpress.passes.fusion.pack_qkv import PackQkv
from onnxpress.passes.fusion.split_projections import SplitProjections
from onnxpress.passes.fusion.unpack_attention import UnpackAttention
from onnxpress.passes.quantization.cast_float16 import CastFloat16
from onnxpress.passes.quantization.gptq import Gptq
from onnxpress.passes.quantization.quantize_kv import QuantizeKv
from onnxpress.passes.quantization.rtn import Rtn
from onnxpress.passes.quantization.smooth import Smooth
from onnxpress.passes.quantization.static_int8 import StaticInt8

Overrides = dict[str, dict[str, int | bool | str]]

__all__ = ["fp32", "fuse", "int4", "int4_fast", "int4_rtn", "int4_small", "int8", "kv8", "pack", "w8a8"]


def fuse(target: Target) -> tuple[Pass, ...]:
    """Canonicalizes and fuses everything that has a kernel; float16 or bfloat16 where the target wants it."""
    fused: tuple[Pass, ...] = (
        Simplify(shapes=False),
        FuseRmsnorm(),
        FuseRotary(),
        FuseAttention(),
        FuseEncoderAttention(),
        UnpackAttention(),
        Unflatten(),
        SplitProjections(),
        FoldAttentionBias(),
        FuseSkipNorm(layer_norm="sum" if target.provider == "cpu" else "skip"),
        FuseSwiglu(),
        FuseGelu(),
        Simplify(),
    )
    # On CUDA the count would have to come back to the host: not tried there, so left out.
    if target.provider == "cuda":
        return (*fused, CastFloat16(dtype="bfloat16" if target.dtype == ir.DataType.BFLOAT16 else "float16"))
    return (*fused, TrimLogits())


def pack(target: Target) -> tuple[Pass, ...]:
    """Joins matrices that read the same activation. Comes last: other passes see queries, keys and values apart."""
    packed = (PackQkv(), PackGateUp())
    return (*packed, PackAttention()) if target.provider == "cpu" else packed


def fp32(target: Target) -> tuple[Pass, ...]:
    """Fusion alone: the same numbers, fewer operators."""
    return (*fuse(target), *pack(target))


def int8(target: Target) -> tuple[Pass, ...]:
    """All weights in 8 bits, the embedding included; practically without loss."""
    rtn = Rtn(bits=8, block_size=32)
    if target.provider == "cuda":  # activations stay floats there
        return (*fuse(target), rtn, *pack(target))
    return (*fuse(target), Smooth(granularity="block", fallback=True), rtn, *pack(target))


def w8a8(target: Target) -> tuple[Pass, ...]:
    """Weights and activations in 8 bits, multiplied as integers: quick at long prompts, less exact than `int8`.

    On CUDA, where ONNX Runtime has no such product of floats, the same as `int8`.
    """
    if target.provider == "cuda":
        return int8(target)
    # Packed first: a product that has its codes cannot be joined to another. Attention of encoders stays apart, or its
    # projections were no products any more.
    packed = PackQkv(), PackGateUp()
    activations = StaticInt8(calibrator="entropy", max_error=0.05, fallback=True)
    return (*fuse(target), Smooth(fallback=True), *packed, activations, Rtn(bits=8, block_size=32))


def kv8(target: Target) -> tuple[Pass, ...]:
    """`int8` with the key-value cache in 8 bits too: for long texts and large batches."""
    *fused, last = fuse(target)  # quantized before the last, a cast on CUDA: text is streamed in float32
    if target.provider == "cuda":  # which has no attention bias beside a quantized cache
        fused = [FuseAttention(padding="right") if isinstance(one, FuseAttention) else one for one in fused]
    weights = int8(target)[len(fuse(target)) :]
    return (*fused, QuantizeKv(), last, *weights)


# The error of 8 bits is lost beside that of 4: no zero points, and no search of scales. As overrides, not as options of
# the head: a model may have neither head nor embedding.
_WIDE_8_BITS: dict[str, int | bool | str] = {"bits": 8, "block_size": 64, "symmetric": True}
_EXACT_HEAD: Overrides = dict.fromkeys(("head", "embedding"), _WIDE_8_BITS)


def _fitted(target: Target, block_size: int, overrides: Overrides) -> tuple[Pass, ...]:
    # Zero points cost time on CUDA; on the CPU they do not, and halve what 4 bits lose.
    symmetric = target.provider == "cuda"
    gptq = Gptq(bits=4, block_size=block_size, symmetric=symmetric, overrides=overrides, fallback=True)
    return (*fuse(target), gptq, *pack(target))


def int4(target: Target) -> tuple[Pass, ...]:
    """Linears in 4 bits, fitted to calibration text; embedding and head in 8, which keeps rare words. Takes minutes."""
    return _fitted(target, 32, _EXACT_HEAD)


def int4_small(target: Target) -> tuple[Pass, ...]:
    """All weights in 4 bits, embedding and head included, fitted to calibration text: the smallest. Takes minutes."""
    return _fitted(target, 32, {})


def int4_fast(target: Target) -> tuple[Pass, ...]:
    """All weights in 4 bits with wide blocks, fitted to calibration text: the quickest to run. Takes minutes."""
    return _fitted(target, 128, {})


# Half the scales of gate and up cost no accuracy that was seen; those of any other matrix do.
_WIDE: Overrides = {kind: {"block_size": 64} for kind in ("gate", "up", "gate_up")}
_EXACT_ROUNDED_HEAD: Overrides = {kind: {**options, "scales": "max"} for kind, options in _EXACT_HEAD.items()}


def int4_rtn(target: Target) -> tuple[Pass, ...]:
    """As int4, rounded to the nearest: looks at no text, takes seconds, and loses some four times as much."""
    if target.provider == "cuda":
        rtn = Rtn(bits=4, block_size=32, overrides=_EXACT_ROUNDED_HEAD)
    else:
        rtn = Rtn(bits=4, block_size=32, symmetric=False, overrides={**_WIDE, **_EXACT_ROUNDED_HEAD})
    return (*fuse(target), rtn, *pack(target))
