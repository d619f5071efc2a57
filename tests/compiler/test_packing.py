"""Packing: what a node without attributes means. Round trips are tested with rtn."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.packing import dequantize, dequantize_node, pack


def test_without_attributes_blocks_are_128_wide_and_codes_have_4_bits() -> None:
    """The operator's own defaults (com.microsoft GatherBlockQuantized)."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(0, 16, (3, 256), dtype=np.uint8), rng.standard_normal((3, 2)).astype(np.float32)
    inputs = [ir.Value(const_value=ir.tensor(array)) for array in (pack(codes, 4), np.zeros(1, np.int64), scale)]
    node = ir.Node("com.microsoft", "GatherBlockQuantized", inputs)
    assert np.array_equal(dequantize_node(node), dequantize(codes, scale, None, bits=4, block_size=128))
