"""StaticInt8: each way to choose a range against a slow oracle, the form of graphs, and the kernels they become."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import write_decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress import runtime
from onnxpress.compiler import formats, pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import CalibrationError, OptionError
from onnxpress.compiler.inspect import summarize
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import TARGETS
from onnxpress.passes import recipes
from onnxpress.passes.quantization._clipping import Histogram, count, entropy, mse, percentile
from onnxpress.passes.quantization._columns import fake_quantize, round_columns, spread
from onnxpress.passes.quantization.rtn import Rtn
from onnxpress.passes.quantization.static_int8 import StaticInt8

Array = npt.NDArray[Any]
few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
CALIBRATORS = ("minmax", "percentile", "mse", "entropy")
ROWS = 96


def values(seed: int) -> list[Array]:
    """Windows of unequal sizes, one of them empty, with a heavy tail and a mean of their own."""
    rng = np.random.default_rng(seed)
    shift, freedom = rng.uniform(-2, 2), rng.uniform(1.5, 6)
    return [(rng.standard_t(freedom, (1, n, 16)) + shift).astype(np.float32) for n in (40, 25, 0, 70)]


def initializer(array: Array, name: str) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def network(*steps: str) -> ir.Model:
    builder = graphs.Builder(64, ROWS, 0)
    table = builder.weight(ROWS, 64, name="table")
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    for step in steps or ("gated", "biased", "transposed"):
        x = builder.step(step, x, x)
    return builder.finish(x, False, table)


def looked_up(table: Array, *weights: Array, kind: str = "MatMul", bias: Array | None = None) -> ir.Model:
    """y0, y1, ... = table[input_ids] w each; a Gemm reads the rows of a sequence as they are."""
    ids = ir.val("input_ids", ir.DataType.INT64, ["b", "s"])
    constants = [initializer(table, "table")]
    x = ir.node("Gather", [constants[0], ids], {"axis": 0}, name="look")
    nodes = [x]
    x.outputs[0].name = "x"
    flat = x.outputs[0]
    if kind == "Gemm":
        constants.append(initializer(np.array([-1, table.shape[1]]), "sizes"))
        nodes.append(ir.node("Reshape", [flat, constants[-1]], name="flat"))
        flat = nodes[-1].outputs[0]
        flat.name = "flat"
    outputs = []
    for number, w in enumerate(weights):
        constants.append(initializer(w, f"w{number}"))
        operands = [flat, constants[-1]]
        if bias is not None:
            constants.append(initializer(bias, f"b{number}"))
            operands.append(constants[-1])
        nodes.append(ir.node(kind, operands, name=f"product{number}"))
        outputs.append(nodes[-1].outputs[0])
        outputs[-1].name, outputs[-1].dtype = f"y{number}", ir.DataType.FLOAT
        outputs[-1].shape = ir.Shape(["n", w.shape[1]] if kind == "Gemm" else ["b", "s", w.shape[1]])
    graph = ir.Graph([ids], outputs, nodes=nodes, initializers=constants, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=9)


def context(**options: Any) -> Context:
    """Random tokens of the whole vocabulary."""
    return Context(calibration=CalibrationText(vocab_size=ROWS, seed=1), **options)


def ids_of(tokens: int = 1024, length: int = 256) -> Array:
    return context().calibration.windows(tokens, length)[0]


def ops(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


def optimized(model: ir.Model, path: Path) -> tuple[list[str], ort.InferenceSession]:
    """Operators that ONNX Runtime runs, and its session."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return sorted(node.op_type for node in onnx.load(path).graph.node), session


def table_of(seed: int, width: int = 32) -> Array:
    return np.random.default_rng(seed).standard_normal((ROWS, width)).astype(np.float32)


@few
@given(seeds)
def test_law_minmax_covers_every_value(seed: int) -> None:
    windows = values(seed)
    everything = np.concatenate([x.ravel() for x in windows])
    found = count(windows)
    assert (found.low, found.high) == (everything.min(), everything.max())
    assert found.counts_B.sum() == everything.size
    assert found.sums_B.sum() == pytest.approx(everything.sum(dtype=np.float64), rel=1e-9)
    edges = np.linspace(-found.size, found.size, len(found.counts_B) + 1)
    slow = np.histogram(everything.astype(np.float64), edges)[0]
    assert np.abs(slow - found.counts_B).sum() <= 4  # a value upon an edge may fall to either side
    rounding = StaticInt8(calibrator="minmax").rounding(windows)
    assert not isinstance(rounding, str)
    assert np.abs(rounding.apply(everything) - everything).max() <= rounding.facts["activation_scale"] * 1.001


def test_a_bin_knows_the_mean_of_its_values() -> None:
    found = count([np.array([[0.3, -0.1, 0.3]])])
    assert sorted(found.means_B[found.counts_B > 0]) == pytest.approx([-0.1, 0.3], rel=1e-9)


@few
@given(seeds, st.floats(90, 99.99))
def test_law_a_percentile_is_that_of_the_sorted_values(seed: int, share: float) -> None:
    windows = values(seed)
    found = count(windows)
    ordered = np.sort(np.concatenate([x.ravel() for x in windows]).astype(np.float64))
    cut = int((100 - share) / 200 * ordered.size)
    width = 2 * found.size / len(found.counts_B)
    low, high = percentile(found, share)
    assert low == pytest.approx(ordered[cut], abs=1.01 * width)
    assert high == pytest.approx(ordered[-1 - cut], abs=1.01 * width)


@few
@given(seeds)
def test_law_a_percentile_of_100_is_minmax(seed: int) -> None:
    found = count(values(seed))
    assert percentile(found, 100) == (found.low, found.high)


@few
@given(seeds)
def test_law_mse_is_the_least_of_all_cuts_and_never_above_minmax(seed: int) -> None:
    windows = values(seed)
    everything = np.concatenate([x.ravel() for x in windows])
    found = count(windows)

    def error(ends: tuple[float, float]) -> float:
        moved = fake_quantize(everything, spread(*ends)).astype(np.float64) - everything
        return float(np.square(moved).mean())

    slow = min(error((max(found.low, -t), min(found.high, t))) for t in found.size * 2.0 ** (-np.arange(128) / 16))
    best = error(mse(found))
    assert best <= slow * 1.001
    assert best <= error((found.low, found.high)) * 1.001


def test_mse_cuts_one_large_value_among_many() -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    x[0] = 30
    assert 4 < mse(count([x]))[1] < 25


def slow_entropy(found: Histogram) -> tuple[float, float]:
    """The textbook's loops over 4096 bins."""
    group = len(found.counts_B) // 4096
    counts = [int(found.counts_B[i * group : (i + 1) * group].sum()) for i in range(4096)]
    sums = [float(found.sums_B[i * group : (i + 1) * group].sum()) for i in range(4096)]
    best = (math.inf, (0.0, 0.0))
    for number in range(128, 7, -1):
        first, last = 2048 - 16 * number, 2048 + 16 * number
        ends = found.cut(found.size * number / 128)
        grid = spread(*ends)
        reference = [float(one) for one in counts[first:last]]
        reference[0] += sum(counts[:first])
        reference[-1] += sum(counts[last:])
        members: dict[int, list[int]] = {}
        for place in range(first, last):
            if counts[place]:
                code = round(sums[place] / counts[place] / grid.scale) + grid.zero
                members.setdefault(min(max(code, 0), 255), []).append(place)
        model = [1e-4] * len(reference)
        for places in members.values():
            for place in places:
                model[place - first] = sum(counts[one] for one in places) / len(places)
        inside = [index for index, one in enumerate(reference) if one]
        total, known = sum(reference), sum(model[index] for index in inside)
        terms = [(reference[i] / total, model[i] / known) for i in inside]
        divergence = sum(share * math.log(share / guess) for share, guess in terms)
        if divergence < best[0] - 1e-12:
            best = divergence, ends
    return best[1]


@settings(max_examples=4, deadline=None, derandomize=True)
@given(seeds)
def test_law_entropy_is_that_of_the_textbook(seed: int) -> None:
    found = count(values(seed))
    assert entropy(found) == pytest.approx(slow_entropy(found))


def test_entropy_cuts_where_hardly_any_value_lies() -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    x[:3] = 60, -60, 45
    assert 3 < entropy(count([x]))[1] < 30


@pytest.mark.parametrize("calibrator", ["minmax", "mse"])
@pytest.mark.parametrize("step", [0.03125, 8.0])
def test_law_values_on_a_grid_of_8_bits_stay(calibrator: Any, step: float) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, 4000)
    codes[:2] = -127, 128
    x = (codes * step).astype(np.float32)
    rounding = StaticInt8(calibrator=calibrator).rounding([x])
    assert not isinstance(rounding, str)
    assert rounding.facts == {"activation_scale": step, "activation_zero": 127}
    assert np.array_equal(rounding.apply(x), x)


@few
@given(seeds, st.sampled_from(["MatMul", "Gemm"]), st.booleans())
def test_kernel_computes_what_numpy_does(seed: int, kind: str, biased: bool) -> None:
    rng = np.random.default_rng(seed)
    table, w = table_of(seed), rng.standard_normal((32, 24)).astype(np.float32)
    bias = rng.standard_normal(24).astype(np.float32) if biased and kind == "Gemm" else None
    model = looked_up(table, w, kind=kind, bias=bias)
    StaticInt8().run(model, context())
    (linear,) = find_linears(model)
    assert linear.holder == formats.QDQ
    codes, scale = round_columns(w.T)
    q = formats.columns_matrix(codes, scale, None)
    assert np.array_equal(linear.w_NK(), q)
    ids = ids_of()
    seen = table[np.unique(ids)]
    chosen = spread(float(seen.min()), float(seen.max()))
    x = table[ids[:1]]
    wanted = fake_quantize(x, chosen) @ q.T + (0 if bias is None else bias)
    got = graphs.run(model, {"input_ids": ids[:1]})["y0"]
    check.close(wanted.reshape(got.shape), got)


def test_onnx_runtime_fuses_every_product_to_its_integer_kernel(tmp_path: Path) -> None:
    model, feeds = network(), {"input_ids": ids_of(8, 8)}
    before = graphs.run(model, feeds)["logits"]
    products = len(find_linears(model))
    StaticInt8().run(model, context())
    found, session = optimized(model, tmp_path / "optimized.onnx")
    assert found.count("MatMulIntegerToFloat") + found.count("QLinearMatMul") == products
    assert found.count("MatMulIntegerToFloat") > 2  # two of them share an activation
    assert not {"MatMul", "DequantizeLinear"} & set(found)
    check.close(graphs.run(model, feeds)["logits"], session.run(["logits"], feeds)[0], tolerance=0.05)
    check.close(before, session.run(["logits"], feeds)[0], tolerance=0.1)


def test_linears_that_read_one_activation_share_one_quantizer() -> None:
    rng = np.random.default_rng(0)
    w = [rng.standard_normal((32, n)).astype(np.float32) for n in (8, 12, 16)]
    model = looked_up(table_of(0), *w)
    StaticInt8(exclude=("head",)).run(model, context())
    assert [ops(model).count(kind) for kind in ("QuantizeLinear", "DequantizeLinear", "MatMul")] == [1, 3, 3]
    # The one that was left out stands first, and finds the quantizer of the others in front of it.
    StaticInt8().run(model, context())
    assert [ops(model).count(kind) for kind in ("QuantizeLinear", "DequantizeLinear", "MatMul")] == [1, 4, 3]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    graphs.run(model, {"input_ids": ids_of(8, 8)})


def test_a_quantizer_of_another_range_is_not_shared() -> None:
    w = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    model = looked_up(table_of(0), w, w.copy())
    narrow = StaticInt8(exclude=("head",), calibrator="percentile", percentile=90.0, max_error=1e6)
    assert narrow.run(model, context()).changed == ["head.2"]
    assert StaticInt8().run(model, context()).changed == ["head"]
    assert ops(model).count("QuantizeLinear") == 2


def test_a_weight_that_two_linears_read_is_stored_once() -> None:
    model = network("linear", "linear")
    first, second = find_linears(model)[:2]
    second.node.replace_input_with(1, first.weight)
    StaticInt8().run(model, context())
    first, second = find_linears(model)[:2]
    assert first.weight is second.weight
    assert first.activation is not second.activation


def test_every_linear_of_a_network_is_stored_and_seen() -> None:
    model = network()
    names = [(one.name, one.kind, one.shape, one.bias is None) for one in find_linears(model)]
    report = StaticInt8().run(model, context())
    linears = find_linears(model)
    assert [(one.name, one.kind, one.shape, one.bias is None) for one in linears] == names
    assert {one.holder for one in linears} == {formats.QDQ}
    assert len(report.ledger) == len(report.changed) == len(names)
    for row in report.ledger:
        assert 0 < row["activation_error"] < row["output_error"] < 0.05
        assert 0 < row["weight_error"] < 0.02
        assert row["activation_scale"] > 0
        assert 0 <= row["activation_zero"] <= 255
    assert report.calibration["windows"] == [4, 256]
    assert summarize(model).quantized == {"DequantizeLinear+MatMul, 8 bits per column": len(names)}
    again = StaticInt8().run(model, context())
    assert not again.modified
    Rtn(bits=8).run(model, context())
    assert {one.holder for one in find_linears(model)} == {formats.QDQ}
    assert "GatherBlockQuantized" in ops(model)


def test_measured_errors_are_those_of_the_kernel() -> None:
    w = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    model, feeds = looked_up(table_of(0), w), {"input_ids": ids_of(8, 8)}
    before = graphs.run(model, feeds)["y0"]
    (row,) = StaticInt8(tokens=8, length=8).run(model, context()).ledger
    error = np.linalg.norm(graphs.run(model, feeds)["y0"] - before) / np.linalg.norm(before)
    assert row["output_error"] == pytest.approx(error, rel=1e-3)


def test_a_linear_that_loses_much_stays_in_float() -> None:
    """A feature that no product reads takes all the steps."""
    table, w = table_of(0), np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    table[:, 3] *= 3000
    w[3] = 0
    model = looked_up(table, w)
    report = StaticInt8().run(model, context())
    assert report.reasons()["its output would lose more than max_error=0.1"] == 1
    assert report.notes[0].startswith("head stays in float: its output would lose ")
    assert ops(model) == ["Gather", "MatMul"]
    assert StaticInt8(max_error=1e6).run(model, context()).changed == ["head"]


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (0.0, "its activation is 0 throughout the calibration text, or no token reaches it"),
        (np.nan, "its activation is not finite on the calibration text"),
        (np.inf, "its activation is not finite on the calibration text"),
    ],
)
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_an_activation_without_a_range_stays_in_float(fill: float, reason: str, calibrator: Any) -> None:
    model = looked_up(np.full((ROWS, 32), fill, np.float32), np.ones((32, 4), np.float32))
    assert reason in StaticInt8(calibrator=calibrator).run(model, context()).reasons()
    assert ops(model) == ["Gather", "MatMul"]


def test_an_activation_without_tokens_has_no_range() -> None:
    assert isinstance(StaticInt8().rounding([np.zeros((0, 8), np.float32)]), str)


def test_refusals() -> None:
    table, w = table_of(0), np.ones((32, 4), np.float32)
    with pytest.raises(OptionError, match="on the CPU only, got target 'cuda'") as caught:
        StaticInt8().run(looked_up(table, w), context(target=TARGETS["cuda"]))
    assert caught.value.hint == "use rtn(bits=8), which stores weights alone in 8 bits"
    with pytest.raises(OptionError, match="matches no linear"):
        StaticInt8(exclude=("lm_hed",)).run(looked_up(table, w), context())
    excluded = looked_up(table, w)
    assert StaticInt8(exclude=("head",)).run(excluded, context()).reasons()["excluded"] == 1
    assert ops(excluded) == ["Gather", "MatMul"]
    broken = looked_up(table, np.full((32, 4), np.nan, np.float32))
    assert StaticInt8().run(broken, context()).reasons()["weights are not finite"] == 1
    assert ops(broken) == ["Gather", "MatMul"]
    half = looked_up(table.astype(np.float16), w.astype(np.float16))
    reason = "DequantizeLinear+MatMul has a kernel for float activations, not for float16"
    assert StaticInt8().run(half, context()).reasons()[reason] == 1
    old = looked_up(table, w)
    old.graph.opset_imports[""] = 12
    reason = "DequantizeLinear has scales per column from opset 13 on, and the graph has 12"
    assert StaticInt8().run(old, context()).reasons()[reason] == 1


def test_a_model_without_text_is_refused() -> None:
    x, w = ir.val("x", ir.DataType.FLOAT, ["n", 8]), initializer(np.ones((8, 4), np.float32), "w")
    node = ir.node("MatMul", [x, w], name="product")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=9)
    with pytest.raises(CalibrationError, match="calibration text gives token ids only"):
        StaticInt8().run(model, context())
    report = StaticInt8(fallback=True).run(model, context())
    assert [skip.site for skip in report.skipped] == ["all of it"]
    assert ops(model) == ["MatMul"]


def test_the_calibrator_that_is_asked_for_chooses() -> None:
    windows = [np.random.default_rng(0).standard_normal(200_000).astype(np.float32)]
    windows[0][0] = 30
    found = count(windows)
    ends = {
        "minmax": (found.low, found.high),
        "percentile": percentile(found, 99.99),
        "mse": mse(found),
        "entropy": entropy(found),
    }
    assert len(set(ends.values())) == 4
    for calibrator, wanted in ends.items():
        rounding = StaticInt8(calibrator=calibrator).rounding(windows)  # type: ignore[arg-type]
        assert not isinstance(rounding, str)
        assert tuple(rounding.facts.values()) == spread(*wanted)


def test_options_are_text() -> None:
    for calibrator in CALIBRATORS:
        (parsed,) = pipeline.parse(f"static_int8(calibrator='{calibrator}', tokens=64)").passes
        assert parsed == StaticInt8(calibrator=calibrator, tokens=64)  # type: ignore[arg-type]
        assert pipeline.parse(str(parsed)).passes == (parsed,)
    assert pipeline.parse("static_int8(calibrator='percentile', percentile=99.9)").passes[0].percentile == 99.9  # type: ignore[attr-defined]
    for option in (
        "max_error=0.0",
        "tokens=0",
        "length=0",
        "calibrator='max'",
        "percentile=99.9",
        "calibrator='percentile', percentile=0.0",
        "calibrator='percentile', percentile=100.1",
    ):
        with pytest.raises(OptionError, match=option.rpartition(", ")[2].partition("=")[0]):
            pipeline.parse(f"static_int8({option})")


def test_a_decoder_generates(tmp_path: Path) -> None:
    plain = write_decoder(tmp_path / "plain")
    made = optimize(plain, output=tmp_path / "small", passes="static_int8, rtn(bits=8)", verify=True)
    assert made.report["operators"]["QuantizeLinear"] >= 2 * 4
    assert made.report["quality"]["kl"] < 0.01
    options = {"max_new_tokens": 8, "temperature": 0.0}
    assert len(runtime.load(tmp_path / "small").generate("abc", **options).tokens) > 0


def test_the_recipe_joins_matrices_before_it_rounds_them(tmp_path: Path) -> None:
    plain = write_decoder(tmp_path / "plain")
    made = optimize(plain, output=tmp_path / "small", recipe="w8a8", verify=True)
    found = made.report["operators"]
    assert (found["QuantizeLinear"], found["MatMul"]) == (9, 9)  # of 2 blocks: qkv, output, gate and up, down; the head
    assert made.report["quality"]["kl"] < 0.01
    assert recipes.w8a8(TARGETS["cuda"]) == recipes.int8(TARGETS["cuda"])


def test_a_mistyped_choice_is_told_the_choices() -> None:
    with pytest.raises(OptionError, match="must be minmax or percentile or mse or entropy, got 'msee'") as caught:
        StaticInt8(calibrator="msee")  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean 'mse'?"
