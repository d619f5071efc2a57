"""The skeleton says what a full parser says, and refuses what is no model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from decoders import decoder

from onnxpress.compiler.errors import BadModelFileError
from onnxpress.runtime import skeleton


@pytest.mark.parametrize("external", [None, "model.data"])
def test_says_what_a_parser_says(tmp_path, external):
    model = decoder()
    ir.save(model, tmp_path / "model.onnx", external_data=external, size_threshold_bytes=0)
    found = skeleton.read(tmp_path / "model.onnx")
    graph = ir.load(tmp_path / "model.onnx").graph
    assert found.inputs == [value.name for value in graph.inputs]
    assert found.outputs == [value.name for value in graph.outputs]
    assert [(n.op_type, n.domain, n.name) for n in found.nodes] == [(n.op_type, n.domain, n.name) for n in graph]
    for node, real in zip(found.nodes, graph, strict=True):
        assert node.inputs == tuple(value.name if value else "" for value in real.inputs)
        assert node.outputs == tuple(value.name for value in real.outputs)
    assert {name: (tensor.shape, tensor.num_bytes) for name, tensor in found.initializers.items()} == {
        name: (tuple(value.const_value.shape), value.const_value.nbytes) for name, value in graph.initializers.items()
    }
    assert found.types["input_ids"] == ir.DataType.INT64
    skeleton.check_external_data(found)


def test_sees_into_subgraphs(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 18]> g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = a () => (float[2] p) { p = Neg(x) },
                    else_branch = b () => (float[2] q) { q = Abs(x) }>
    }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "if.onnx")
    found = skeleton.read(tmp_path / "if.onnx")
    assert [node.op_type for node in found.consumers("x")] == ["If"]


@pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT16, ir.DataType.BOOL])
def test_counts_bytes_as_stored(tmp_path, dtype):
    array = np.zeros((3, 5), dtype.numpy())
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float x) => (float y) { y = Neg(x) }'
    model = ir.from_onnx_text(text)
    tensor = ir.Tensor(array, dtype=dtype, name="w")
    model.graph.register_initializer(ir.Value(name="w", const_value=tensor, type=ir.TensorType(dtype)))
    ir.save(model, tmp_path / "m.onnx")
    assert skeleton.read(tmp_path / "m.onnx").initializers["w"].num_bytes == tensor.nbytes


def test_refuses_what_is_no_model(tmp_path):
    whole = tmp_path / "model.onnx"
    ir.save(decoder(), whole)
    content = whole.read_bytes()
    cases = {
        "empty": b"",
        "text": b"this is not protobuf at all",
        "cut": content[: len(content) // 2],
        "zeros": bytes(64),
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(BadModelFileError):
            skeleton.read(path)
    with pytest.raises(BadModelFileError, match="found none"):
        skeleton.read(tmp_path / "missing.onnx")


def test_refuses_external_data_that_is_missing_short_or_elsewhere(tmp_path):
    ir.save(decoder(), tmp_path / "model.onnx", external_data="w.data", size_threshold_bytes=0)
    found = skeleton.read(tmp_path / "model.onnx")
    data = tmp_path / "w.data"
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    with pytest.raises(BadModelFileError, match="expected at least"):
        skeleton.check_external_data(found)
    data.unlink()
    with pytest.raises(BadModelFileError, match="missing"):
        skeleton.check_external_data(found)
    for location in ("../w.data", "/etc/w.data"):
        outside = skeleton.Initializer("w", (1,), 1, 4, location)
        with pytest.raises(BadModelFileError, match="below"):
            skeleton.check_external_data(skeleton.Skeleton(tmp_path / "model.onnx", initializers={"w": outside}))
