"""PackAttention: the same outputs from one operator, what it must not swallow, and that it comes apart again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest
from self_attention import feeds, self_attention

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.compiler.target import target
from onnxpress.passes.fusion.pack_attention import PackAttention
from onnxpress.passes.fusion.unpack_attention import UnpackAttention


def packed(model: ir.Model) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    before = graphs.run(model, feeds(model))
    report = PackAttention().run(model, Context())
    return report, before, graphs.run(model, feeds(model))


CASES: dict[str, dict[str, Any]] = {
    "biases": {},
    "no biases": {"biases": ()},
    "one bias for all": {"one_bias": True},
    "a bias of the queries alone": {"biases": "q"},
    "a score bias": {"score_bias": True},
    "padding": {"padding": True},
    "both": {"score_bias": True, "padding": True},
    "a scale": {"scale": 0.7},
    "causal": {"unidirectional": 1},
    "a mild mask": {"padding": True, "mask_filter_value": -1.0},
    "values of another width": {"value_width": 20},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_outputs_from_one_operator_and_back(case: str, seed: int) -> None:
    model = self_attention(seed=seed, **CASES[case])
    report, before, after = packed(model)
    assert len(report.changed) == 1
    assert not report.skipped
    assert report.bytes_after - report.bytes_before <= 3 * 20 * 4, "at most biases"
    assert Counter(node.op_type for node in model.graph) == {"Attention": 1, "MatMul": 1}
    for name, want in before.items():
        check.close(want, after[name], tolerance=1e-5)
    linears = len(find_linears(model))
    assert not UnpackAttention().run(model, Context()).skipped
    assert len(find_linears(model)) == linears + 3
    again = graphs.run(model, feeds(model))
    for name, want in before.items():
        check.close(want, again[name], tolerance=1e-5)


KEPT: dict[str, tuple[dict[str, Any], str]] = {
    "keys of another input": ({"keys_of": "y"}, "the projections do not share their input"),
    "keys without projection": (
        {"keys_of": "direct"},
        "queries, keys or values do not come straight from a projection",
    ),
    "a bias of its own": ({"own_bias": True}, "attention has a cache or a bias of its own"),
    "a cache": ({"cache": True}, "attention has a cache or a bias of its own"),
    "keys are read": ({"reads": "Tanh"}, "other nodes read queries, keys or values too"),
    "a weight is shared": ({"shared": True}, "other nodes read a weight too: joined, it would be stored twice"),
    "the size of another width": (
        {"reads": "Shape", "width": 16},
        "other nodes read queries, keys or values too",
    ),
    "float16": ({"dtype": ir.DataType.FLOAT16}, "not float32 [batch, sequence, width]"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_stays(case: str) -> None:
    options, reason = KEPT[case]
    model = self_attention(**options)
    text = graphs.text(model)
    report = PackAttention().run(model, Context())
    assert not report.changed
    assert list(report.reasons()) == [reason]
    assert graphs.text(model) == text


def test_quantized_projections_stay() -> None:
    model = self_attention(width=32, heads=2)
    pipeline.run(model, pipeline.parse("rtn(bits=4, block_size=16)"), Context())
    report = PackAttention().run(model, Context())
    assert list(report.reasons()) == ["the projections are quantized"]


def test_other_targets_keep_it() -> None:
    model = self_attention()
    report = PackAttention().run(model, Context(target=target("cuda")))
    assert list(report.reasons()) == ["the operator pays on the CPU alone"]


def test_who_asks_for_the_size_asks_the_input() -> None:
    model = self_attention(reads="Shape")
    report, before, after = packed(model)
    assert len(report.changed) == 1
    for name, want in before.items():
        check.close(want, after[name], tolerance=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "vit"])
def test_encoders(tiny_export: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    if architecture == "vit":
        size = source.config["image_size"]
        pixels = np.random.default_rng(0).standard_normal((2, source.config["num_channels"], size, size))
        given = {"pixel_values": pixels.astype(np.float32)}
    else:
        given = {str(one.name): np.ones((2, 5), np.int64) for one in source.model.graph.inputs}
        given["input_ids"] = np.arange(10).reshape(2, 5)
        given["attention_mask"][1, 3:] = 0
    before = graphs.run(source.model, given)
    report = PackAttention().run(source.model, Context())
    assert len(report.changed) == 2
    assert not report.skipped
    for name, want in graphs.run(source.model, given).items():
        check.close(before[name], want, tolerance=1e-5)
