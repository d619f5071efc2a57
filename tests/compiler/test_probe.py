"""Sample inputs for graphs that do not say how large they must be."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from onnxpress.compiler.probe import Probe

TEXT = """<ir_version: 8, opset_import: ["": 16]>
g (float[?, ?] sound, float[2, ?, 16] state) => (float[?, ?] padded, float[2, ?, 16] next)
<int64[4] pads = {0, 0, 0, 40}>
{
    padded = Pad <mode = "reflect"> (sound, pads)
    batch = Shape <start = 0, end = 1> (sound)
    two = Constant <value = int64[1] {2}> ()
    width = Constant <value = int64[1] {16}> ()
    sizes = Concat <axis = 0> (two, batch, width)
    zeros = ConstantOfShape (sizes)
    next = Add (zeros, state)
}"""


def probe(tmp_path: Path, text: str) -> Probe:
    ir.save(ir.from_onnx_text(text), tmp_path / "model.onnx")
    return Probe(tmp_path / "model.onnx")


def test_free_sizes_are_tried_and_kept(tmp_path: Path) -> None:
    """Reflecting 40 samples takes more than 40, and the axis of the state that has no name is the batch."""
    one, sizes = probe(tmp_path, TEXT), {"height": 4}
    outputs = one.run_random(0, sizes)
    assert outputs["padded"].shape == (2, 64 + 40)
    assert outputs["next"].shape == (2, 2, 16)
    again = one.run_random(0, dict(sizes))
    assert all((outputs[name] == again[name]).all() for name in outputs)
    assert sizes["height"] == 4


def test_what_runs_with_no_size_says_why(tmp_path: Path) -> None:
    one = probe(tmp_path, TEXT.replace("float[2, ?, 16] state", "float[2, 5, 16] state"))
    with pytest.raises(Exception, match="broadcast"):
        one.run_random(0, {})


def test_an_input_of_which_there_is_no_sample(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 16]> g (string[n] words) => (string[n] same) { same = Identity (words) }'
    with pytest.raises(ValueError, match=r"'words' takes tensor\(string\)"):
        probe(tmp_path, text).run_random(0, {})


def test_token_types_are_of_the_first_kind(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 16]>
    g (int64[batch, seq] token_type_ids) => (float[batch, seq, 2] y) <float[2, 2] table = {1, 2, 3, 4}>
    { y = Gather (table, token_type_ids) }"""
    outputs = probe(tmp_path, text).run_random(0, {})
    assert (outputs["y"] == [1, 2]).all()
