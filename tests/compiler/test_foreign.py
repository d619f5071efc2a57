"""Graphs that others wrote: branches, old opsets, sizes without names, weights in Constant nodes, no config."""

from __future__ import annotations

from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler.inspect import summarize
from onnxpress.compiler.optimize import optimize
from onnxpress.models.onnx_file import load_onnx

FEEDS = {
    "sound": np.random.default_rng(1).standard_normal((3, 160)).astype(np.float32),
    "state": np.random.default_rng(2).standard_normal((3, 56)).astype(np.float32),
}


def saved(tmp_path: Path) -> Path:
    ir.save(graphs.branching(), tmp_path / "strange.onnx")
    return tmp_path / "strange.onnx"


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize(("recipe", "tolerance"), [("fp32", check.CLOSE), ("int8", 2e-2), ("int4-rtn", 2e-1)])
def test_every_recipe_takes_it(tmp_path: Path, recipe: str, tolerance: float, flag: bool) -> None:
    artifact = optimize(saved(tmp_path), output=tmp_path / "out", recipe=recipe, verify=True)
    feeds = {**FEEDS, "flag": np.array(flag)}
    want = graphs.run(graphs.branching(), feeds)
    got = graphs.run(load_onnx(artifact.directory / "model.onnx"), feeds)
    assert list(want) == list(got)
    for name in want:
        check.close(want[name], got[name], name, tolerance)


def test_every_weight_is_quantized_or_has_a_reason(tmp_path: Path) -> None:
    card = optimize(saved(tmp_path), output=tmp_path / "out", recipe="int8").report
    assert card["size"]["bytes_before"] >= 4 * (8 * 32 + 64 * 40 + 64 * 64)  # Constant nodes and branches count
    (rtn,) = [row for row in card["passes"] if row["pass"].startswith("rtn")]
    assert rtn["changed"] == 1
    reasons = {skip["reason"]: skip["sites"] for skip in rtn["skipped"]}
    assert reasons == {"inside of If: only the main graph is rewritten": ["inner_weight"]}
    skipped = {skip["reason"] for row in card["passes"] for skip in row["skipped"]}
    looked = {"no pass looks into the graphs inside If"}
    looked |= {"calibration: the model reads 'sound', and calibration text gives token ids only"}
    assert skipped == set(reasons) | looked, "a classifier's Softmax is no attention, its head no language model's"


def test_it_is_measured_on_sizes_that_it_runs_with(tmp_path: Path) -> None:
    """The kernel needs 32 samples; nothing in the graph says so."""
    quality = optimize(saved(tmp_path), output=tmp_path / "out", recipe="int8").report["quality"]
    assert 0 < quality["output_error"] < 0.05
    assert "not_measured" not in quality


def test_inspect_counts_bytes_wherever_they_are() -> None:
    summary = summarize(graphs.branching())
    assert summary.bytes >= 4 * (8 * 32 + 64 * 40 + 64 * 64)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4", "int4-rtn"])
def test_a_model_without_any_product(tmp_path: Path, recipe: str) -> None:
    """No head and no embedding: what the recipes say about them must not be an error."""
    text = """<ir_version: 7, opset_import: ["": 11]> g (float[1, 1, ?] x) => (float[1, 64, n] y) {
        w = Constant <value = float {0}> ()
        y = Conv (x, w)
    }"""
    model = ir.from_onnx_text(text)
    kernel = np.random.default_rng(0).standard_normal((64, 1, 32)).astype(np.float32)
    model.graph[0].attributes["value"] = ir.AttrTensor("value", ir.tensor(kernel, name="w"))
    ir.save(model, tmp_path / "waves.onnx")
    artifact = optimize(tmp_path / "waves.onnx", output=tmp_path / "out", recipe=recipe, verify=True)
    skipped = [skip["reason"] for row in artifact.report["passes"] for skip in row["skipped"]]
    assert skipped == ([] if recipe == "fp32" else ["ONNX Runtime has no Conv with weights in blocks"])
