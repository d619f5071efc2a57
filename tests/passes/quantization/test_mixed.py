"""Mixed: the knapsack against brute force, targets that are met, and errors that name the nearest."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler import pipeline
from onnxpress.compiler.allocation import Option, allocate
from onnxpress.compiler.artifact import write_graph
from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import OptionError, PreconditionError
from onnxpress.compiler.journal import Journal
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.sensitivity import Sensitivity
from onnxpress.passes.quantization._fitted_errors import fitted_errors
from onnxpress.passes.quantization._rounding import round_matrix
from onnxpress.passes.quantization._weight_only import Format
from onnxpress.passes.quantization.mixed import Mixed


def best(items: list[list[Option]], budget: float) -> float:
    plans = itertools.product(*items)
    return min((sum(one.cost for one in plan) for plan in plans if sum(o.nbytes for o in plan) <= budget), default=-1)


def problem(seed: int) -> list[list[Option]]:
    rng = np.random.default_rng(seed)
    return [
        [Option(float(rng.exponential()), int(rng.integers(1, 40))) for _ in range(rng.integers(1, 5))]
        for _ in range(rng.integers(1, 7))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_law_the_knapsack_is_within_one_item_of_the_best(seed: int) -> None:
    items = problem(seed)
    for budget in (20, 60, 100, 1000):
        plan, want = allocate(items, budget), best(items, budget)
        if plan is None:
            assert want == -1
            continue
        chosen = [options[index] for options, index in zip(items, plan, strict=True)]
        assert sum(one.nbytes for one in chosen) <= budget
        cost = sum(one.cost for one in chosen)
        step = max(max(one.cost for one in options) - min(one.cost for one in options) for options in items)
        assert want - 1e-9 <= cost <= want + step + 1e-9
        if budget == 1000:
            assert cost == pytest.approx(want), "what costs least, when all fits"


def test_law_steps_that_save_most_per_byte_come_first() -> None:
    items = [[Option(10, 10), Option(1, 20)], [Option(10, 10), Option(0, 30)], [Option(3, 10), Option(0, 40)]]
    assert allocate(items, 40) == [1, 0, 0]
    assert allocate(items, 60) == [1, 1, 0]
    assert allocate(items, 29) is None


def test_what_is_left_of_the_budget_is_spent() -> None:
    items = [[Option(10, 10), Option(9, 30), Option(0, 100)]]
    assert allocate(items, 100) == [2]
    assert allocate(items, 99) == [1], "not on the hull, and the best that fits"


def network(*, layers: int = 3, tied: bool = False) -> ir.Model:
    """Queries, keys and gated layers of width 128, the second of which has no say."""
    builder = graphs.Builder(128, 200, 0)
    table = builder.weight(200, 128, name="table", scale=1.0)
    stream = builder.op("Gather", table, builder.ids, width=128, axis=0)
    for layer in range(layers):
        inner = builder.step("gated", builder.norm(stream), stream)
        if layer == 1:
            inner = builder.op("Mul", inner, builder.scalar(1e-4), width=128)
        stream = builder.step("residual", stream, inner)
    return builder.finish(builder.norm(stream), tied, table)


def run(model: ir.Model, text: str, journal: Journal | None = None) -> Report:
    more = "" if "method='rtn'" in text else ", tokens=256, length=32"
    context = Context(calibration=CalibrationText(vocab_size=200), journal=journal or Journal())
    ((_, report),) = pipeline.run(model, pipeline.parse(f"mixed({text}{more}, probe=64)"), context)
    return report


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kilobytes", [215, 240, 290])
def test_the_files_are_no_larger_than_asked(tmp_path: Path, kilobytes: int, tied: bool) -> None:
    model = network(tied=tied)
    report = run(model, f"size='{kilobytes}kB', method='rtn'")
    write_graph(model, tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 0.93 * kilobytes * 1000 <= size <= kilobytes * 1000
    assert len({(row["bits"], row["block_size"]) for row in report.ledger}) > 1


def test_bits_are_met_and_more_of_them_cost_less() -> None:
    expected, used = [], []
    for bits in (4.5, 5.0, 6.0, 8.5):
        report = run(network(), f"bits={bits}, method='rtn'")
        assert bits - 0.5 <= report.metrics["bits_per_weight"] <= bits
        expected.append(report.metrics["expected_if_rounded"])
        used.append(report.metrics["weight_error"])
    assert expected == sorted(expected, reverse=True)
    assert used[-1] < 0.1 * used[0]


def test_the_loss_is_met_by_what_is_written() -> None:
    model = network()
    limit = 2e-3
    report = run(model, f"kl={limit}, method='rtn', accuracy_level=0")
    assert {row["bits"] for row in report.ledger} == {4, 8}, "neither all nor nothing"
    original = network()
    sensitivity = Sensitivity(
        original,
        feeds(original.graph, CalibrationText(vocab_size=200).windows(64, 64)[0])[0],
        find_linears(original),
    )
    stored = {one.name: one.w_NK() for one in find_linears(model)}
    new = {id(one.weight): one.stored_form(stored[one.name]) for one in find_linears(original)}
    tables = [node.inputs[0] for node in model.graph if node.op_type == "GatherBlockQuantized"]
    assert len(tables) == 1
    assert sensitivity.distance(new) <= limit


def test_a_matrix_without_a_say_gets_the_fewest_bits() -> None:
    report = run(network(), "bits=6.0, method='rtn'")
    rows = {row["site"]: row for row in report.ledger}
    silent = [row for name, row in rows.items() if name.startswith("block1.")]
    assert len(silent) == 3
    assert all(row["bits"] == 4 for row in silent)
    assert sum(row["expected_kl"] for row in silent) < 0.01 * sum(row["expected_kl"] for row in rows.values())
    assert any(row["bits"] == 8 for row in rows.values())


def test_gate_and_up_stay_in_one_format() -> None:
    for bits in (4.6, 5.5, 7.0):
        report = run(network(), f"bits={bits}, method='rtn'")
        formats = {row["site"]: (row["bits"], row["block_size"]) for row in report.ledger}
        for block in range(3):
            assert formats[f"block{block}.gate"] == formats[f"block{block}.up"]


def test_fitted_codes_are_nearer_than_rounded_ones() -> None:
    losses = []
    for method in ("rtn", "gptq"):
        original, model = network(), network()
        run(model, f"bits=4.6, method='{method}', accuracy_level=0")
        ids = np.random.default_rng(5).integers(0, 200, (1, 64))
        before, after = (graphs.run(one, {"input_ids": ids})["logits"] for one in (original, model))
        losses.append(np.square(after - before).mean())
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("option", ["size='100kB'", "bits=4.05", "kl=1e-9"])
def test_what_cannot_be_met_names_the_nearest(option: str) -> None:
    with pytest.raises(OptionError) as caught:
        run(network(), f"{option}, method='rtn'")
    nearest = re.search(r"(size='[^']+'|bits=[\d.]+|kl=[\d.e-]+)", caught.value.hint or "")
    assert nearest is not None
    assert run(network(), f"{nearest[1]}, method='rtn'").changed


def test_the_decision_is_told() -> None:
    report = run(network(), "bits=5.5, method='rtn'")
    assert report.notes[0].startswith("KL divergence expected of rounded codes")
    assert any(line.strip().startswith("down:") and "bits in blocks of" in line for line in report.notes)
    expected = sum(row["expected_kl"] for row in report.ledger)
    assert expected == pytest.approx(report.metrics["expected_if_rounded"])


def test_costs_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = network(), network()
    run(first, "bits=5.0", Journal(tmp_path))
    monkeypatch.setattr(Sensitivity, "distance", lambda *_: pytest.fail("measured again"))
    run(second, "bits=5.0", Journal(tmp_path))
    assert graphs.text(first) == graphs.text(second)


def test_two_matrices_that_share_a_weight_are_one() -> None:
    model = network(tied=True)
    report = run(model, "bits=5.0, method='rtn'")
    assert len({row["site"] for row in report.ledger}) == 10
    assert sum(node.op_type == "GatherBlockQuantized" for node in model.graph) == 1


def on_a_grid(model: ir.Model) -> None:
    """Rounds every linear to 4 bits in blocks of 32, as `mixed` probes them."""
    for number, linear in enumerate(find_linears(model)):
        exact = round_matrix(
            linear.w_NK(), bits=4, block_size=32, symmetric=True, scales="mse", scale_dtype=np.dtype(np.float32)
        )[0].w_NK()
        linear.set_weight(lambda exact=exact: exact, f"exact{number}")


def test_weights_that_were_rounded_before_are_not_free() -> None:
    model = network()
    on_a_grid(model)
    report = run(model, "bits=8.5, method='rtn'")
    assert report.metrics["expected_if_rounded"] > 0
    linears = [row for row in report.ledger if row["site"] != "embedding"]
    assert all(row["weight_error"] < 0.01 for row in linears), "no format that loses what is there"


def test_a_second_table_is_a_matrix_too() -> None:
    builder = graphs.Builder(64, 200, 0)
    tables = [builder.weight(200, 64, name=name, scale=1.0) for name in ("one", "two")]
    x, y = (builder.op("Gather", table, builder.ids, width=64, axis=0) for table in tables)
    stream = builder.step("residual", x, y)
    model = builder.finish(builder.step("gated", stream, stream), False, tables[0])
    report = run(model, "bits=6.0, method='rtn'")
    assert {"embedding", "embedding.2"} <= {row["site"] for row in report.ledger}


def test_costs_that_are_no_numbers_end_too() -> None:
    nan = float("nan")
    assert allocate([[Option(nan, 10), Option(nan, 20)], [Option(1, 10), Option(0, 20)]], 100) is not None


def test_what_has_no_effect_is_named() -> None:
    builder = graphs.Builder(64, 200, 0)
    table = builder.weight(200, 64, name="table", scale=1.0)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    pooled = builder.op("Tanh", builder.step("linear", x, x), width=64)
    pooled.name = "pooled"
    model = builder.finish(builder.step("linear", x, x), False, table)
    model.graph.outputs.append(pooled)
    report = run(model, "bits=6.0, method='rtn'")
    assert "without any effect" in report.notes[-1]
    assert report.notes[-1].endswith("(1)")


def test_a_wrong_exclude_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sensitivity, "distance", lambda *_: pytest.fail("measured first"))
    with pytest.raises(OptionError, match="matches no linear"):
        run(network(), "bits=5.0, exclude=('blok0.*',)")


def test_a_model_without_float_matrices_that_is_too_large() -> None:
    model = network()
    run(model, "bits=6.0, method='rtn'")
    report = run(model, "size='10MB'")
    assert not report.changed
    assert all("already quantized" in reason for reason in report.reasons())
    with pytest.raises(PreconditionError, match="no float matrix is left"):
        run(model, "size='100kB'")


def test_excluded_matrices_stay_float() -> None:
    model = network()
    report = run(model, "bits=5.0, method='rtn', exclude=('block0.*',)")
    assert not any(row["site"].startswith("block0.") for row in report.ledger)
    assert sum(one.holder == "MatMul" for one in find_linears(model)) == 3


@pytest.mark.parametrize(
    "options",
    [
        "bits=5.0, method='rtn', tokens=32",
        "",
        "size='90MB', bits=5.0",
        "size='90 apples'",
        "kl=0.0",
        "bits=4.0",
        "probe=1",
        "size='90MB', method='awq'",
    ],
)
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(OptionError, match="mixed"):
        pipeline.parse(f"mixed({options})")


def test_a_size_may_have_any_unit() -> None:
    for text in ("1GB", "0.5GiB", "900 MB", "1000000", "2e"):
        if text == "2e":
            with pytest.raises(OptionError, match="90MB"):
                Mixed(size=text)
        else:
            Mixed(size=text)


def test_law_fitting_leaves_less_than_rounding_and_more_bits_less_still() -> None:
    model = network()
    context = Context(calibration=CalibrationText(vocab_size=200))
    pass_ = Mixed(bits=5.0)
    items = pass_._items(model, context, Report())
    sites = [site for item in items for site in item.sites]
    formats = {id(site): [Format(4, 32, True), *item.formats] for item in items for site in item.sites}
    errors = fitted_errors(model, formats, sites, context, tokens=2048, length=256, damping=0.01, label="fitting")
    assert len(errors) == sum(bool(site.linears) for site in sites)
    for item in items:
        for site in item.sites:
            if site.linears:
                before, after = errors[id(site)]
                sizes = {
                    (one.bits, one.block_size, one.symmetric): error
                    for one, error in zip(item.formats, after, strict=True)
                }
                assert sizes[4, 32, True] < 0.9 * before
                assert sizes[8, 32, True] < 0.02 * sizes[4, 32, True]
                assert sizes[4, 32, False] < sizes[4, 64, False] < sizes[4, 128, False]


def test_costs_of_fitted_codes_are_those_that_fitting_leaves() -> None:
    ledgers = [
        {row["site"]: row for row in run(network(), f"bits=5.0, method='{how}'").ledger} for how in ("rtn", "gptq")
    ]
    same = [name for name, row in ledgers[0].items() if row["bits"] == ledgers[1][name]["bits"] == 4]
    assert same
    for name in same:
        rounded, fitted = (ledger[name] for ledger in ledgers)
        if rounded["block_size"] == fitted["block_size"] and name != "embedding":
            assert 0 < fitted["expected_kl"] < rounded["expected_kl"]
