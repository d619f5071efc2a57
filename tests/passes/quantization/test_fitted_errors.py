"""What a format costs once codes are fitted: errors at the outputs, relative to them, scale the cost of rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from test_mixed import network, run

from onnxpress.compiler.allocation import Option
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization import mixed
from onnxpress.passes.quantization._calibrated import solve
from onnxpress.passes.quantization._fitted_errors import fitted_errors
from onnxpress.passes.quantization._least_squares import Moments
from onnxpress.passes.quantization._mixed import Fitted
from onnxpress.passes.quantization._rounding import round_matrix
from onnxpress.passes.quantization._weight_only import Format, Site
from onnxpress.passes.quantization.mixed import Mixed


def one_linear(*, tables: int = 1, shared: bool = False) -> ir.Model:
    """Tokens' rows of a table times a matrix, which with two tables is read twice: in place, or as a copy."""
    builder = graphs.Builder(64, 200, 0)
    rows = [builder.weight(200, 64, name=f"table{number}", scale=1.0 + number) for number in range(tables)]
    weight = builder.weight(64, 64)
    stream = None
    for number, table in enumerate(rows):
        x = builder.op("Gather", table, builder.ids, width=64, axis=0)
        own = weight if shared or not number else builder.const(weight.const_value.numpy().copy(), "copy")
        y = builder.op("MatMul", x, own, width=64)
        stream = y if stream is None else builder.op("Add", stream, y, width=64)
    return builder.finish(builder.norm(stream), False, rows[0])


def errors_of(model: ir.Model, *formats: Format, damping: float = 0.01) -> dict[str, tuple[float, list[float]]]:
    """`fitted_errors` by the name of the matrix."""
    context = Context(calibration=CalibrationText(vocab_size=200))
    items = Mixed(bits=5.0)._items(model, context, Report())
    sites = [site for item in items for site in item.sites]
    asked = {id(site): formats for site in sites}
    found = fitted_errors(model, asked, sites, context, tokens=1024, length=128, damping=damping, label="fitting")
    return {site.name: found[id(site)] for site in sites if id(site) in found}


FORMATS = Format(8, 32, True, "max"), Format(4, 32, False), Format(4, 64, True)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_law_errors_are_those_of_the_outputs_relative_to_them(damping: float) -> None:
    model = one_linear()
    linear = find_linears(model)[0]
    ids = CalibrationText(vocab_size=200).windows(1024, 128)[0]
    x_TK = model.graph.initializers["table00"].const_value.numpy()[ids.reshape(-1)].astype(np.float64)
    moments = Moments(x_TK.T @ x_TK / len(x_TK), damping)
    w_NK = linear.w_NK()
    dtype = np.dtype(np.float32)
    new = [round_matrix(w_NK, **FORMATS[0]._asdict(), scale_dtype=dtype)[0].w_NK()]
    for one in FORMATS[1:]:
        steps_KN, grid = solve(np.ascontiguousarray(w_NK.T), one, dtype, moments, rounds=0)
        new.append((steps_KN * grid.spread(grid.scale_GN, 64)).T)
    want = [np.square(x_TK @ (one - w_NK).T).sum() / np.square(x_TK @ w_NK.T).sum() for one in new]
    before, after = errors_of(model, *FORMATS, damping=damping)[linear.name]
    assert [before, *after] == pytest.approx(want, rel=1e-3)


def test_law_the_size_of_weights_does_not_matter_to_their_errors() -> None:
    """Gate and up are priced together: the one with the larger weights has no more say."""
    plain, scaled = network(), network()
    up = next(one for one in find_linears(scaled) if one.name == "block0.up")
    larger = up.w_NK() * np.float32(64)
    up.set_weight(lambda: larger, "larger")
    found = [errors_of(model, *FORMATS) for model in (plain, scaled)]
    for name in ("block0.gate", "block0.up"):
        before, after = (np.hstack(one[name]) for one in found)
        assert after == pytest.approx(before, rel=1e-4), name


def test_of_two_readers_of_a_weight_the_first_tells_its_error() -> None:
    name = find_linears(one_linear(tables=2, shared=True))[0].name
    shared, apart = (errors_of(one_linear(tables=2, shared=how), *FORMATS) for how in (True, False))
    assert np.hstack(shared[name]) == pytest.approx(np.hstack(apart[name]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_no_finite_text_reaches_has_no_error() -> None:
    model = network()
    linears = find_linears(model)
    broken = linears[1].w_NK().copy()
    broken[0, 0] = np.inf
    linears[1].set_weight(lambda: broken, "broken")
    found = errors_of(model, *FORMATS)
    assert linears[0].name in found
    assert linears[-2].name not in found


def test_law_fitting_scales_the_cost_of_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the errors of all matrices of an item together, where all are known; sizes and tables stay what they were."""
    model, asked = network(tied=True), {}
    context = Context(calibration=CalibrationText(vocab_size=200))
    pass_ = Mixed(bits=5.0, tokens=512)
    items = pass_._items(model, context, Report())
    names = [item.name for item in items]
    for number, item in enumerate(items):
        item.probe, item.cost = item.formats[-1], 2.0 + number
        item.options = [Option(100.0 + index, 10 * number + index) for index in range(len(item.formats))]
    before = [list(item.options) for item in items]
    unknown, silent = names.index("block1.gate+block1.up"), names.index("block2.down")
    items[silent].cost = 0.0

    def errors(
        _: object, formats: Mapping[int, Sequence[Format]], sites: Sequence[Site], *__: object, **options: object
    ) -> object:
        asked.update(options, formats=formats, sites=[site.name for site in sites])
        left_out = id(items[unknown].sites[0])
        return {
            id(site): (
                1.0 + 2 * number,
                [0.1 * (1 + index) * (1 + number) for index, _ in enumerate(formats[id(site)][1:])],
            )
            for item in items
            for number, site in enumerate(item.sites)
            if id(site) != left_out and not site.embeddings
        }

    monkeypatch.setattr(mixed, "fitted_errors", errors)
    pass_._reprice(items, model, context)
    assert (asked["tokens"], asked["length"]) == (512, 512)
    assert asked["damping"] == pytest.approx(8 * Fitted.damping), "few tokens say less"
    for item in items:
        for site in item.sites:
            assert asked["formats"][id(site)] == [item.probe, *item.formats]
            assert (site.name in asked["sites"]) == (not site.embeddings)
    for number, item in enumerate(items):
        if number in (unknown, silent) or item.sites[0].embeddings:
            assert item.options == before[number], item.name
            continue
        # (0.1 + 0.2) / (1 + 3) of gate and up, 0.1 / 1 of one alone
        share = 0.3 / 4 if len(item.sites) == 2 else 0.1
        assert [one.cost for one in item.options] == pytest.approx(
            [item.cost * share * (1 + index) for index in range(len(item.formats))]
        )
        assert [one.nbytes for one in item.options] == [one.nbytes for one in before[number]]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_only_fitted_codes_are_priced_anew(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    seen: list[object] = []
    monkeypatch.setattr(Mixed, "_reprice", lambda self, *_: seen.append(self))
    run(network(layers=1), f"bits=5.0, method='{method}'")
    assert len(seen) == (method == "gptq")
