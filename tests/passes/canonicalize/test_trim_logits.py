"""The count in front of the head: all logits by default, the last ones when asked."""

from __future__ import annotations

import graphs
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import decoder as random_decoder

from onnxpress.compiler import pipeline
from onnxpress.compiler.pass_ import Context
from onnxpress.runtime.session import DecoderSession


@pytest.fixture
def trimmed():
    model = random_decoder()
    pipeline.run(model, pipeline.parse("trim_logits"), Context())
    return model


def test_the_count_is_a_weight_that_a_feed_may_override(trimmed, tmp_path):
    ir.save(trimmed, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_overridable_initializers()] == ["logits_to_keep"]
    assert DecoderSession(tmp_path / "model.onnx", provider="cpu").interface.keep == "logits_to_keep"


def test_simplify_leaves_the_count_alone(trimmed):
    pipeline.run(trimmed, pipeline.parse("simplify"), Context())
    assert trimmed.graph.inputs[-1].name == "logits_to_keep"
    assert trimmed.graph.inputs[-1].consumers()[0].op_type == "Neg"


def test_a_second_time_changes_nothing(trimmed):
    before = len(trimmed.graph)
    pipeline.run(trimmed, pipeline.parse("trim_logits"), Context())
    assert len(trimmed.graph) == before


def test_an_encoder_is_none_of_its_business():
    builder = graphs.Builder(64, 96, 0)
    table = builder.weight(96, 64)
    model = builder.finish(builder.op("Gather", table, builder.ids, width=64, axis=0), False, table)
    ((_, report),) = pipeline.run(model, pipeline.parse("trim_logits"), Context())
    assert (report.changed, report.skipped) == ([], [])
