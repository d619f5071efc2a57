"""Rounding in a format that is there: the laws, over bits, zero points and short scales."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler import packing, scales
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.nbits import CodedMatrix, replace_linear, store
from onnxpress.compiler.requantize import coded, nearest

FORMATS = [(bits, zero, short) for bits in (2, 4, 8) for zero in (False, True) for short in (False, True)]


def matrix(bits: int, zero: bool, short: bool, rows: int = 6, columns: int = 40, block: int = 16) -> CodedMatrix:
    rng = np.random.default_rng(bits + 10 * zero + 20 * short)
    groups = -(-columns // block)
    codes = rng.integers(0, 2**bits, (rows, groups * block)).astype(np.uint8)
    scale = (0.05 + rng.random((rows, groups))).astype(np.float32)
    if short:
        scale = scales.multiples(scale, scales.unit_of(scale.max(axis=1, keepdims=True)))
    zeros = (
        rng.integers(0, 2**bits, (rows, groups)).astype(np.uint8) if zero else np.full((rows, groups), 2 ** (bits - 1))
    )
    codes.reshape(rows, groups, block)[:, -1, columns % block :] = zeros[:, -1, None]
    packed = packing.pack(codes, bits).reshape(rows, groups, -1)
    return CodedMatrix(packed, scale, packing.pack_zero_points(zeros, bits) if zero else None, columns, bits, block)


@pytest.mark.parametrize("bits, zero, short", FORMATS)
def test_law_what_lies_on_the_grid_keeps_its_codes(bits: int, zero: bool, short: bool) -> None:
    old = matrix(bits, zero, short)
    w = old.w_NK().copy()
    w[2] += 5.0  # of one row everything is new
    new = nearest(w, old)
    for row in (0, 1, 3, 4, 5):
        assert np.array_equal(new.codes[row], old.codes[row])
        assert np.array_equal(new.scale[row], old.scale[row])
    assert not np.array_equal(new.w_NK()[2], old.w_NK()[2])


@pytest.mark.parametrize("bits, zero, short", FORMATS)
def test_law_the_error_is_that_of_half_a_step(bits: int, zero: bool, short: bool) -> None:
    old = matrix(bits, zero, short)
    w = 3 * np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    new = nearest(w, old)
    assert (new.bits, new.block_size, new.num_in) == (old.bits, old.block_size, old.num_in)
    assert (new.zero is None) == (old.zero is None)
    assert new.codes.shape == old.codes.shape
    if short:
        assert scales.split(new.scale) is not None
    if bits == 8:
        step = np.repeat(np.abs(new.scale), 16, axis=1)[:, :40]
        # Ranges may be cut: what lies outside is few and far, so most lie within half a step.
        assert np.mean(np.abs(new.w_NK() - w) <= 0.501 * step) > 0.9
    relative = np.linalg.norm(new.w_NK() - w) / np.linalg.norm(w)
    assert relative < {2: 0.6, 4: 0.12, 8: 0.01}[bits]


@pytest.mark.parametrize("bits, zero, short", FORMATS)
def test_law_never_further_than_on_the_old_grid(bits: int, zero: bool, short: bool) -> None:
    old = matrix(bits, zero, short)
    w = old.w_NK() + 0.3 * np.random.default_rng(1).standard_normal((6, 40)).astype(np.float32)
    scale = np.repeat(old.scale, 16, axis=1)[:, :40]
    zeros = np.full(old.scale.shape, 2 ** (bits - 1)) if old.zero is None else packing.unpack(old.zero, bits)[:, :3]
    middle = np.repeat(zeros, 16, axis=1)[:, :40]
    kept = (np.clip(np.rint(w / scale) + middle, 0, 2**bits - 1) - middle) * scale
    error = np.linalg.norm(nearest(w, old).w_NK() - w, axis=1)
    assert (error <= np.linalg.norm(kept - w, axis=1) * (1 + 1e-5)).all()


def test_rows_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    old = matrix(4, True, False)
    w = np.random.default_rng(2).standard_normal((6, 40)).astype(np.float32)
    whole = nearest(w, old)
    monkeypatch.setattr("onnxpress.compiler.requantize._ROWS", 4)
    pieces = nearest(w, old)
    assert np.array_equal(whole.w_NK(), pieces.w_NK())
    assert np.array_equal(whole.codes, pieces.codes)


def test_zeros_stay_finite() -> None:
    for zero in (False, True):
        old = matrix(4, zero, True)
        assert np.array_equal(nearest(np.zeros((6, 40), np.float32), old).w_NK(), np.zeros((6, 40)))


TEXT = """<ir_version: 10, opset_import: ["": 18]>
g (float[1, 40] x) => (float[1, 6] y) <float[40, 6] w = {%s}> { y = MatMul(x, w) }""" % ", ".join(["1"] * 240)  # noqa: UP031


def test_coded_reads_what_a_node_holds() -> None:
    model = ir.from_onnx_text(TEXT)
    (linear,) = find_linears(model)
    old = matrix(4, True, False)
    node = replace_linear(linear, store(model.graph, "w", old), 0)
    found = coded(node)
    assert found is not None
    assert np.array_equal(found.w_NK(), old.w_NK())
    zero = node.inputs[3]
    assert zero is not None
    zero.const_value = ir.tensor(np.ones((6, 3), np.float32))
    assert coded(node) is None
