"""The ledger says which matrix lost most, from what the card has; and what it does not know."""

from __future__ import annotations

import json
import math
from typing import Any

import graphs
import numpy as np
import pytest
from decoders import decoder

from onnxpress.compiler import pipeline
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import OptionError, UnsupportedModelError
from onnxpress.compiler.inspect import read_ledger
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.report import Card, pass_row
from onnxpress.compiler.stats import Stats
from onnxpress.passes.quantization._weight_only import output_error


def row(site: str, **facts: Any) -> dict[str, Any]:
    plain = {"kind": "down", "shape": [8, 64], "bits": 4, "block_size": 32, "bytes": 100, "snr_db": 20.0}
    return {"site": site, **plain, "weight_error": 0.1, **facts}


def card(*rows: dict[str, Any], name: str = "rtn") -> Card:
    return {
        "name": "m",
        "passes": [{"pass": "fuse", "ledger": [{"site": "x", "window": 4}]}, {"pass": name, "ledger": [*rows]}],
    }


def test_the_largest_output_error_comes_first_whatever_the_weights_lost() -> None:
    found = read_ledger(
        card(
            row("a", weight_error=0.3, output_error=0.1),
            row("table", weight_error=0.9),
            row("b", weight_error=0.2, output_error=0.2),
        )
    )
    assert [one.site for one in found.rows] == ["b", "a", "table"]
    assert [one.share for one in found.rows] == pytest.approx([0.8, 0.2, None])
    assert found.share_of == "output_error"
    assert "not of the KL" in found.note


def test_a_measured_divergence_counts_before_all_errors() -> None:
    found = read_ledger(
        card(row("a", output_error=0.3, expected_kl=0.01), row("b", output_error=0.1, expected_kl=0.03), name="mixed")
    )
    assert [one.site for one in found.rows] == ["b", "a"]
    assert [one.share for one in found.rows] == pytest.approx([0.75, 0.25])
    assert found.share_of == "expected_kl"
    assert "of the KL divergence" in found.note


def test_without_text_shares_are_those_of_the_weights() -> None:
    found = read_ledger(card(row("a", weight_error=0.1, activation_error=0.05), row("b", weight_error=0.3)))
    assert [one.site for one in found.rows] == ["b", "a"]
    assert [one.share for one in found.rows] == pytest.approx([0.9, 0.1])
    assert found.share_of == "weight_error"
    assert "not of the KL" in found.note
    assert [one.activation_error for one in found.rows] == [None, 0.05], "a column of its own, not part of the share"


def test_a_matrix_that_is_exact_has_no_ratio_and_no_share() -> None:
    found = read_ledger(card(row("a", weight_error=0.0, snr_db=math.inf)))
    assert (found.rows[0].snr_db, found.rows[0].share) == (None, 0.0)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][0]["site"] == "a"


def test_what_was_rounded_twice_counts_once_as_it_is_stored() -> None:
    made = card(row("a", bits=8))
    made["passes"] += card(row("a", bits=4), name="hqq")["passes"]
    (only,) = read_ledger(made).rows
    assert (only.bits, only.made_by) == (4, "hqq")


@pytest.mark.parametrize("made", [{}, {"name": "m", "passes": []}, card(), {"passes": [{"pass": "rtn"}]}])
def test_a_card_without_rows_is_refused_with_a_hint(made: Card) -> None:
    with pytest.raises(UnsupportedModelError, match="no ledger") as caught:
        read_ledger(made)
    assert "quantizes" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "passes, has_outputs",
    [
        ("rtn", False),
        ("hqq", False),
        ("hqq(ledger_tokens=64)", True),
        ("kquant(importance='activations', tokens=64, length=16)", True),
    ],
)
def test_every_pass_that_quantizes_fills_it(passes: str, has_outputs: bool) -> None:
    context = Context(calibration=CalibrationText(vocab_size=60))
    ((pass_, report),) = pipeline.run(decoder(layers=2), pipeline.parse(passes), context)
    found = read_ledger({"name": "m", "passes": [pass_row(pass_, report)]})
    assert {one.site for one in found.rows} == set(report.changed)
    assert sum(one.share or 0.0 for one in found.rows) == pytest.approx(1)
    assert all(one.made_by == str(pass_) and one.snr_db and one.weight_error for one in found.rows)
    assert any(one.output_error for one in found.rows) == has_outputs
    for one in found.rows:
        assert one.snr_db == pytest.approx(-20 * math.log10(one.weight_error or 1))
        assert (one.activation_error or 0.0) >= 0


def test_an_output_error_is_that_of_the_product() -> None:
    rng = np.random.default_rng(0)
    w_NK, x_TK = rng.standard_normal((8, 16)), rng.standard_normal((40, 16)) * np.linspace(0, 3, 16)
    q_NK = w_NK + 0.1 * rng.standard_normal((8, 16))
    stats = Stats(16)
    stats.update(x_TK)
    want = np.linalg.norm(x_TK @ (q_NK - w_NK).T) / np.linalg.norm(x_TK @ w_NK.T)
    assert output_error(w_NK.astype(np.float32), q_NK.astype(np.float32), stats) == pytest.approx(want, rel=1e-4)


def test_text_for_the_ledger_changes_no_code_and_gptq_keeps_its_own_errors() -> None:
    def done(passes: str) -> tuple[bytes, dict[str, float | None]]:
        model, context = decoder(layers=1), Context(calibration=CalibrationText(vocab_size=60))
        ((pass_, report),) = pipeline.run(model, pipeline.parse(passes), context)
        found = read_ledger({"passes": [pass_row(pass_, report)]})
        assert bool(report.calibration) == ("tokens" in passes)
        return graphs.text(model), {one.site: one.output_error for one in found.rows}

    (plain, nothing), (measured, errors) = done("rtn"), done("rtn(ledger_tokens=32)")
    assert plain == measured
    assert set(nothing.values()) == {None}
    assert all(error is not None and 0 < error < 0.5 for site, error in errors.items() if site != "embedding")
    text = "tokens=64, length=16"
    assert done(f"gptq({text})")[1] == done(f"gptq({text}, ledger_tokens=16)")[1]
    with pytest.raises(OptionError, match="ledger_tokens"):
        pipeline.parse("rtn(ledger_tokens=-1)")
