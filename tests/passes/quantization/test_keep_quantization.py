"""keep_quantization: what was quantized is found bit for bit, whatever its GGUF type; the rest is left, and named."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import check
import gguf
import graphs
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.nbits import BITS, BLOCK_SIZES, CodedMatrix
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.target import TARGETS
from onnxpress.passes.quantization import keep_quantization as keeping
from onnxpress.passes.quantization.cast_float16 import CastFloat16
from onnxpress.passes.quantization.keep_quantization import KeepQuantization, common_step, recover
from onnxpress.passes.quantization.rtn import Rtn

Array = npt.NDArray[Any]
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
few = settings(max_examples=40, deadline=None, derandomize=True)
FORMATS = sorted(((bits, size) for bits in BITS for size in BLOCK_SIZES), key=lambda one: one[0] + 32 / one[1])


def found(w: Array, *, scale_dtype: np.dtype[Any] = F32, exact_in: np.dtype[Any] = F32) -> CodedMatrix | str:
    return recover(w, FORMATS, scale_dtype=scale_dtype, exact_in=exact_in)


def exactly(w: Array, **options: Any) -> CodedMatrix:
    """What `recover` finds, which is the matrix itself."""
    matrix = found(w, **options)
    assert isinstance(matrix, CodedMatrix), matrix
    np.testing.assert_array_equal(matrix.w_NK(), w)
    return matrix


@st.composite
def grids(draw: st.DrawFn, bits: tuple[int, ...] = BITS, columns: int | None = None) -> tuple[Array, int, int]:
    """(weights [N, K], bits, block size): codes times float16 scales, with what hurts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    width, size = draw(st.sampled_from(bits)), draw(st.sampled_from(BLOCK_SIZES))
    columns = columns or draw(st.sampled_from([size, 3 * size, 2 * size + 7]))
    blocks = -(-columns // size)
    end = 2 ** (width - 1)
    codes = rng.integers(-end, end, (7, blocks, size))
    codes[0] //= 2  # no weight on the last level
    codes[1] = 2 * (codes[1] // 2)  # a step twice as large would do
    codes[2, 0] = 0
    codes[3, 0, 1:] = 0  # one weight only
    scale = (rng.random((7, blocks, 1)) + 0.01) * 2.0 ** draw(st.integers(-20, 6))
    scale[4] *= -1
    scale = scale.astype(np.float16).astype(np.float32)
    return (codes * scale).astype(np.float32).reshape(7, -1)[:, :columns], width, size


@few
@given(st.lists(st.integers(-(2**22), 2**22), min_size=1, max_size=20), st.integers(-60, 60))
def test_law_the_step_is_the_greatest_common_divisor(whole: list[int], exponent: int) -> None:
    w = np.ldexp(np.array(whole, np.float32), exponent)
    (step,) = common_step(w[None])
    want = math.gcd(*whole)
    assert Fraction(float(step)) == want * Fraction(2) ** exponent
    assert common_step(np.random.default_rng(0).permutation(w)[None]) == step


def test_no_step() -> None:
    blocks = np.array([[1, np.nan], [1, np.inf], [1, 1e-30], [0, 0], [3, 1.5]], np.float32)
    np.testing.assert_array_equal(common_step(blocks), np.array([np.nan, np.nan, np.nan, 0, 1.5], np.float32))


@few
@given(grids())
def test_law_codes_times_scales_are_found(grid: tuple[Array, int, int]) -> None:
    w, bits, size = grid
    matrix = exactly(w)
    assert FORMATS.index((matrix.bits, matrix.block_size)) <= FORMATS.index((bits, size))


@few
@given(grids(), st.randoms(use_true_random=False))
def test_law_rows_may_come_in_any_order(grid: tuple[Array, int, int], random: Any) -> None:
    w, *_ = grid
    order = list(range(len(w)))
    random.shuffle(order)
    plain, shuffled = exactly(w), exactly(w[order])
    np.testing.assert_array_equal(plain.codes[order], shuffled.codes)
    np.testing.assert_array_equal(plain.scale[order], shuffled.scale)
    exactly(np.asfortranarray(w))


@few
@given(grids(bits=(4, 8), columns=96), st.integers(0, 6), st.integers(0, 95), st.booleans())
def test_law_one_bit_of_one_weight_is_seen(grid: tuple[Array, int, int], row: int, column: int, far: bool) -> None:
    w = np.concatenate([grid[0]] * 5) + 0
    row += 28 * far  # behind the rows that are looked at first
    w[row, column] = np.nextafter(w[row, column] or np.float32(1), np.float32(9))
    matrix = found(w)
    # Alone in its block, or a double of what it was, it would be on a grid again.
    if isinstance(matrix, CodedMatrix):
        np.testing.assert_array_equal(matrix.w_NK(), w)
    else:
        assert matrix == "the weights of a block are not whole multiples of one scale"


@pytest.mark.parametrize("row", [0, 40])
def test_weights_that_are_not_finite(row: int) -> None:
    w = np.ones((48, 64), np.float32)
    for bad in (np.nan, np.inf):
        w[row, 5] = bad
        assert found(w) == "weights are not finite"


def raw(kind: gguf.GGMLQuantizationType, rows: int = 20, columns: int = 512) -> Array:
    """A matrix of random blocks of a GGUF type, as the gguf package reads it; scales are small float16 numbers."""
    rng = np.random.default_rng(int(kind))
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, columns // size, nbytes), dtype=np.uint8)
    places = {
        "Q4_0": [0], "Q5_0": [0], "Q8_0": [0], "IQ4_NL": [0], "IQ4_XS": [0], "Q4_1": [0, 2], "Q5_1": [0, 2],
        "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "TQ1_0": [52], "TQ2_0": [64],
    }  # fmt: skip
    for place in places.get(kind.name, []):
        scale = (rng.random(data.shape[:2]) * 0.02 + 0.001).astype(np.float16)
        data[..., place : place + 2] = scale[..., None].view(np.uint8)
    if kind.name == "MXFP4":
        data[..., 0] = rng.integers(118, 124, data.shape[:2])
    return gguf.quants.dequantize(data.reshape(rows, -1), kind).astype(np.float32)


@pytest.mark.parametrize(
    "kind, bits, size",
    [
        ("Q8_0", 8, 32),
        ("Q4_0", 4, 32),
        ("Q5_0", 8, 32),
        ("Q6_K", 8, 16),
        ("Q3_K", 4, 16),
        ("IQ4_NL", 8, 32),
        ("IQ4_XS", 8, 32),
        ("MXFP4", 8, 32),
        ("TQ1_0", 2, 256),
        ("TQ2_0", 2, 256),
        ("Q4_1", 0, 0),
        ("Q5_1", 0, 0),
        ("Q2_K", 0, 0),
        ("Q4_K", 0, 0),
        ("Q5_K", 0, 0),
    ],
)
def test_which_types_of_gguf_are_exact(kind: str, bits: int, size: int) -> None:
    w = raw(gguf.GGMLQuantizationType[kind])
    if not bits:
        assert found(w) == "the weights of a block are not whole multiples of one scale"
        return
    matrix = exactly(w)
    assert (matrix.bits, matrix.block_size) == (bits, size)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_codes_and_scales_of_a_real_quantizer_are_those_of_the_file(kind: str) -> None:
    known = gguf.GGMLQuantizationType[kind]
    w = np.random.default_rng(0).standard_normal((40, 96), np.float32)
    data = gguf.quants.quantize(w, known)
    matrix = exactly(gguf.quants.dequantize(data, known), exact_in=F16)
    blocks = data.reshape(40, 3, -1)
    np.testing.assert_array_equal(matrix.scale, blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32))
    if kind == "Q8_0":
        np.testing.assert_array_equal(matrix.codes, blocks[..., 2:] + np.uint8(128))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_no_divisor_is_computed_of_files_of_the_usual_quantizers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = gguf.GGMLQuantizationType[kind]
    w = np.random.default_rng(1).standard_normal((400, 96), np.float32)
    measure, seen = keeping._measure, []
    monkeypatch.setattr(keeping, "_measure", lambda part: seen.append(len(part)) or measure(part))
    exactly(gguf.quants.dequantize(gguf.quants.quantize(w, known), known))
    assert seen == [16]  # to learn the format; a divisor takes five times as long


def test_scales_that_float16_holds() -> None:
    for kind in ("Q8_0", "Q4_0", "IQ4_NL"):
        matrix = exactly(raw(gguf.GGMLQuantizationType[kind]), exact_in=F16)
        np.testing.assert_array_equal(matrix.scale.astype(np.float16).astype(np.float32), matrix.scale)
    assert found(raw(gguf.GGMLQuantizationType.Q6_K), exact_in=F16) == "its scales need more bits than float16 has"
    # A scale of 12 bits, and codes over the whole range, which leave no room for a part of it.
    wide = np.arange(-127, 128, 2, dtype=np.float32)[None] * np.float32(4095 * 2.0**-20)
    assert found(np.repeat(wide[:, ::-4], 40, axis=0), exact_in=F16) == "its scales need more bits than float16 has"
    # All codes are multiples of 3, and three times the scale has 13 bits: a third of the divisor is the scale.
    thirds = np.arange(-15, 17, dtype=np.float32)[None] * np.float32(3 * 2047 * 2.0**-16)
    assert exactly(thirds, exact_in=F16).scale == np.float16(2047 * 2.0**-16)
    assert exactly(thirds).scale == np.float32(3 * 2047 * 2.0**-16)
    assert exactly(thirds, scale_dtype=F16).scale.dtype == np.float16


# --- the pass -----------------------------------------------------------------------------------------------------


def network(tied: bool = True, off_grid: tuple[int, ...] = ()) -> ir.Model:
    """A small network whose matrices are those of a Q4_0 file, but for the linears at `off_grid`."""
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for step in ("gated", "biased", "linear"):
        x = builder.step(step, x, x)
    model = builder.finish(x, tied, table)
    table.const_value = ir.tensor(as_q4_0(table.const_value.numpy()), name=table.name)
    for index, linear in enumerate(find_linears(model)):
        if index not in off_grid and linear.weight is not table:
            linear.weight.const_value = ir.tensor(linear.stored_form(as_q4_0(linear.w_NK())), name=linear.weight.name)
    return model


def as_q4_0(w: Array) -> Array:
    kind = gguf.GGMLQuantizationType.Q4_0
    return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(w), kind), kind)


def matrices(model: ir.Model) -> dict[str, Array]:
    linears = find_linears(model)
    (table,) = find_embeddings(model, linears)
    return {one.name: one.w_NK().copy() for one in linears} | {"embedding": table.table_VH().copy()}


def run(model: ir.Model, context: Context | None = None, **options: Any) -> Report:
    return KeepQuantization(**options).run(model, context or Context())


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_stays_the_same_float(tied: bool) -> None:
    model = network(tied)
    before, outputs = matrices(model), graphs.run(model)
    report = run(model)
    after = matrices(model)
    assert sorted(report.changed) == sorted(before.keys() - ({"embedding"} if tied else set()))
    for name, want in before.items():
        np.testing.assert_array_equal(after[name], want, err_msg=name)
    assert report.metrics["weight_error"] == 0
    assert report.metrics["bits_per_weight"] == 4.5  # the scales are float16 numbers, and stored as such
    assert 0 < report.metrics["activation_error"] < 0.03
    assert {(row["bits"], row["block_size"]) for row in report.ledger} == {(4, 32)}
    check.close(outputs["logits"], graphs.run(model)["logits"], tolerance=3e-2)  # what int8 activations add
    kinds = [node.op_type for node in model.graph]
    assert "MatMul" not in kinds
    assert "Gather" not in kinds
    codes = [name for name in model.graph.initializers if name.endswith(".codes")]
    assert len(codes) == len(report.changed)  # tied, the head and the embedding read the same


def test_activations_may_stay_float() -> None:
    model = network()
    outputs = graphs.run(model)
    run(model, accuracy_level=0)
    check.close(outputs["logits"], graphs.run(model)["logits"], tolerance=1e-5)


def test_what_is_on_no_grid_stays_float_and_is_named() -> None:
    model = network(off_grid=(1, 3))
    names = [one.name for one in find_linears(model)]
    context = Context(stored_types={names[1]: ("blk.7.ffn_up.weight", "Q4_K")})
    report = run(model, context)
    reason = "the weights of a block are not whole multiples of one scale"
    assert report.reasons() == {f"blk.*.ffn_up.weight is Q4_K: {reason}": 1, reason: 1}
    assert [skip.site for skip in report.skipped] == [names[1], names[3]]
    holders = {one.name: one.holder for one in find_linears(model)}
    assert [name for name in names if holders[name] == "MatMul"] == [names[1], names[3]]
    rounded = Rtn(bits=8).run(model, context)
    assert rounded.changed == [names[1], names[3]]


def test_the_ledger_names_the_tensor() -> None:
    model = network()
    name = find_linears(model)[0].name
    report = run(model, Context(stored_types={name: ("blk.0.ffn_gate.weight", "Q4_0")}))
    (row,) = [row for row in report.ledger if row["site"] == name]
    assert (row["source_tensor"], row["source_type"]) == ("blk.0.ffn_gate.weight", "Q4_0")


def test_a_cast_to_float16_loses_nothing() -> None:
    model = network()
    before, context = matrices(model), Context(target=TARGETS["cuda"])
    run(model, context)
    CastFloat16().run(model, context)
    for name, want in before.items():
        np.testing.assert_array_equal(matrices(model)[name], want, err_msg=name)
    graphs.session(model)


def test_a_second_run_and_exclusions() -> None:
    model = network()
    report = run(model, exclude=("head",))
    assert report.reasons() == {"excluded": 1}
    again = run(model)
    assert again.changed == ["head"]
    assert again.reasons() == {"already quantized: MatMulNBits, 4 bits in blocks of 32": len(report.changed)}


def test_wrong_use() -> None:
    with pytest.raises(OptionError, match="accuracy_level must be 0 or 4, got 2"):
        KeepQuantization(accuracy_level=2)
    with pytest.raises(OptionError, match=r"exclude='haed' matches no linear") as caught:
        run(network(), exclude=("haed",))
    assert "head" in str(caught.value.hint)
