"""CastFloat16: the laws of rounding, float32 islands, and a decoder that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization.cast_float16 import LARGEST, CastFloat16, to_float16

HALF = 6e-3  # of the largest logit: some ten float16 roundings in a row


def test_law_finite_numbers_stay_finite_and_others_stay() -> None:
    numbers = np.array([1e30, -1e30, 3.0, np.inf, -np.inf, 65504.0], np.float32)
    assert np.array_equal(to_float16(numbers).astype(np.float32), [LARGEST, -LARGEST, 3.0, np.inf, -np.inf, LARGEST])
    assert np.isnan(to_float16(np.array([np.nan], np.float32)))[0]


def test_law_relative_error() -> None:
    numbers = np.random.default_rng(0).uniform(6.2e-5, 65504, 10_000).astype(np.float32)
    assert (np.abs(to_float16(numbers).astype(np.float32) - numbers) / numbers).max() <= 2**-11


def test_a_network_halves_and_stays_near() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    model = builder.finish(builder.step("gated", builder.step("silu", x, x), x), True, table)
    before = graphs.run(model)
    report = CastFloat16().run(model, Context())
    assert report.bytes_after * 2 == report.bytes_before
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert 0 < report.metrics["weight_error"] < 2**-11
    check.close(before["logits"], graphs.run(model)["logits"], tolerance=HALF)


@pytest.mark.parametrize("text", ["fuse", "simplify"])
def test_a_decoder_runs_and_its_angles_stay_float32(
    tiny_export: Callable[[str, str], Path], tmp_path: Path, text: str
) -> None:
    source = models.load(tiny_export("llama", "optimum"), work_dir=tmp_path)
    ids = np.random.default_rng(1).integers(3, 200, (2, 7))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(7), (2, 1))}
    for value in source.model.graph.inputs:
        if value.shape is not None and len(value.shape) == 4:
            feeds[str(value.name)] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
    before = graphs.run(source.model, feeds)
    pipeline.run(source.model, pipeline.parse(f"{text}, cast_float16"), Context(config=source.config))
    cosines = [node.outputs[0].dtype for node in source.model.graph if node.op_type in ("Cos", "Sin")]
    assert set(cosines) == {ir.DataType.FLOAT}
    half = {name: array.astype(np.float16) if array.dtype == np.float32 else array for name, array in feeds.items()}
    check.close(before["logits"], graphs.run(source.model, half)["logits"], tolerance=HALF)


def test_numbers_beyond_the_range_are_said() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    huge = builder.const(np.full(32, 1e6, np.float32), "huge")
    model = builder.finish(builder.op("Add", x, huge, width=32), False, table)
    report = CastFloat16().run(model, Context())
    assert [skip.site for skip in report.skipped] == ["huge"]
