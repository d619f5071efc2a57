"""Short forms of weights with zeros: exact, smaller where it is said, read by ONNX Runtime and read back here."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import decoder
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler import pipeline, sparse
from onnxpress.compiler.artifact import write_graph
from onnxpress.compiler.errors import BadModelFileError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.models.onnx_file import load_onnx
from onnxpress.runtime import skeleton
from onnxpress.runtime.benchmark import weight_bytes_per_step

Array = np.ndarray
few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn) -> Array:
    """Matrices with few or many zeros, with rows of zeros, and with runs longer than a byte counts."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    shape = draw(st.tuples(st.integers(1, 9), st.sampled_from([1, 7, 255, 256, 257, 600, 1100])))
    matrix = rng.standard_normal(shape).astype(draw(st.sampled_from([np.float32, np.float16])))
    matrix[rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))] = 0
    if draw(st.booleans()):
        matrix[draw(st.integers(0, shape[0] - 1))] = 0
    return matrix if draw(st.booleans()) else np.ascontiguousarray(matrix.T)


@few
@given(matrices(), st.integers(0, 1))
def test_law_decoding_gives_the_matrix_back_and_takes_what_was_said(matrix: Array, axis: int) -> None:
    steps, values = sparse.encode(matrix, axis)
    np.testing.assert_array_equal(sparse.decode(steps, values, axis, matrix.shape), matrix)
    choice = sparse.choose(matrix, sparse.ROWS)
    if choice.form == sparse.ROWS:
        assert choice.nbytes == sum(one.nbytes for one in sparse.encode(matrix, choice.axis))
    assert choice.nbytes <= matrix.nbytes


@pytest.mark.parametrize(
    ("dtype", "share", "rows", "initializers"),
    [
        (np.float32, 0.2, "dense", "dense"),
        (np.float32, 0.3, "rows", "dense"),
        (np.float32, 0.66, "rows", "dense"),
        (np.float32, 0.7, "rows", "initializers"),
        (np.float16, 0.35, "dense", "dense"),
        (np.float16, 0.4, "rows", "dense"),
        (np.float16, 0.8, "rows", "dense"),
        (np.float16, 0.83, "rows", "initializers"),
    ],
)
def test_from_which_share_of_zeros_on_a_form_pays(dtype: Any, share: float, rows: str, initializers: str) -> None:
    matrix = np.ones((8, 100), dtype)
    matrix[:, : round(100 * share)] = 0
    assert sparse.choose(matrix, "rows").form == rows
    assert sparse.choose(matrix, "initializers").form == initializers


def pruned(passes: str) -> ir.Model:
    model = decoder()
    pipeline.run(model, pipeline.parse(passes), Context())
    return model


def answers(path: Path, level: Any = ort.GraphOptimizationLevel.ORT_ENABLE_ALL) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, 200, (1, 12))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for one in session.get_inputs():
        if "past" in one.name:
            feeds[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0]


def held(model: ir.Model) -> tuple[list[str], dict[str, bytes]]:
    """Nodes, and weights by name."""
    proto = ir.to_proto(model)
    return [str(node) for node in proto.graph.node], {one.name: one.raw_data for one in proto.graph.initializer}


CASES = {
    "rows at a half": ("magnitude(exclude=('head',)), store_sparse", "ScatterElements"),
    "N:M": ("magnitude(pattern='2:4'), store_sparse", "ScatterElements"),
    "initializers": ("magnitude(sparsity=0.8)", "sparse"),
    "initializers, asked for": ("magnitude(sparsity=0.8), store_sparse(form='initializers')", "sparse"),
    "rows at four fifths": ("magnitude(sparsity=0.8), store_sparse", "ScatterElements"),
}


@pytest.mark.parametrize(("passes", "kind"), CASES.values(), ids=CASES)
def test_a_file_is_smaller_and_computes_the_same(passes: str, kind: str, tmp_path: Path) -> None:
    model = pruned(passes)
    graph = held(model)
    path = write_graph(model, tmp_path)
    assert held(model) == graph, "writing changed the graph"
    plain = pruned(passes)
    plain.metadata_props.pop(sparse.KEY)
    (tmp_path / "plain").mkdir()
    dense = write_graph(plain, tmp_path / "plain")
    sizes = [sum(file.stat().st_size for file in one.glob("model.onnx*")) for one in (tmp_path, tmp_path / "plain")]
    assert sizes[0] < 0.93 * sizes[1]
    proto = onnx.load(path, load_external_data=False)
    found = Counter(node.op_type for node in proto.graph.node)
    assert (found["ScatterElements"] > 0) == (kind == "ScatterElements")
    assert (len(proto.graph.sparse_initializer) > 0) == (kind == "sparse")
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
        np.testing.assert_array_equal(answers(path, level), answers(dense, level))
    assert weight_bytes_per_step(skeleton.read(path)) == weight_bytes_per_step(skeleton.read(dense))


@pytest.mark.parametrize(("passes", "kind"), CASES.values(), ids=CASES)
def test_what_is_read_back_can_be_pruned_quantized_and_written_again(passes: str, kind: str, tmp_path: Path) -> None:
    model = pruned(passes)
    again = load_onnx(write_graph(model, tmp_path))
    before = {one.name: one.w_NK() for one in find_linears(model)}
    after = {one.name: one.w_NK() for one in find_linears(again)}
    assert before.keys() == after.keys()
    for name, matrix in before.items():
        np.testing.assert_array_equal(after[name], matrix)
    assert again.metadata_props[sparse.KEY] == model.metadata_props[sparse.KEY]
    assert not any(node.op_type in ("ScatterElements", "CumSum", sparse.OPERATOR) for node in again.graph)
    (tmp_path / "again").mkdir()
    written = write_graph(again, tmp_path / "again")
    assert written.stat().st_size == (tmp_path / "model.onnx").stat().st_size
    more = pipeline.run(again, pipeline.parse("magnitude(sparsity=0.9), rtn(bits=4)"), Context())
    assert all(report.changed for _, report in more)


def with_sparse(indices: Array, values: Array, shape: tuple[int, int]) -> onnx.ModelProto:
    """A foreign model: y = x w with a sparse w."""
    helper, tensors = onnx.helper, onnx.numpy_helper  # noqa: TID251  (a foreign file, not one of ours)
    weight = helper.make_sparse_tensor(tensors.from_array(values, "w"), tensors.from_array(indices, "i"), list(shape))
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", size])
        for name, size in zip("xy", shape, strict=True)
    )
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], sparse_initializer=[weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("large", [False, True])
def test_sparse_initializers_of_others_are_read(rank: int, large: bool, tmp_path: Path) -> None:
    shape = (80, 60) if large else (4, 6)
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    w[np.random.default_rng(1).random(shape) < 0.6] = 0
    indices = np.flatnonzero(w) if rank == 1 else np.argwhere(w)
    path = tmp_path / "model.onnx"
    onnx.save(with_sparse(indices.astype(np.int64), w[w != 0], shape), path)
    (linear,) = find_linears(load_onnx(path))
    np.testing.assert_array_equal(linear.w_NK(), w.T)
    assert skeleton.read(path).initializers["w"].num_bytes == w.nbytes


@pytest.mark.parametrize(
    ("indices", "values", "why"),
    [
        (np.array([0, 24], np.int64), np.ones(2, np.float32), "out of range"),
        (np.array([-1, 3], np.int64), np.ones(2, np.float32), "out of range"),
        (np.array([[0, 6]], np.int64), np.ones(1, np.float32), "out of range"),
        (np.array([0, 1, 2], np.int64), np.ones(2, np.float32), "expected values"),
        (np.array([0, 1], np.float32), np.ones(2, np.float32), "expected values"),
    ],
)
def test_damaged_sparse_initializers_are_refused(indices: Array, values: Array, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = with_sparse(np.array([0, 1], np.int64), np.ones(2, np.float32), (4, 6))
    proto.graph.sparse_initializer[0].indices.CopyFrom(onnx.numpy_helper.from_array(indices))
    proto.graph.sparse_initializer[0].values.CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(BadModelFileError, match=why):
        find_linears(load_onnx(path))[0].w_NK()


def test_steps_beyond_the_end_are_refused() -> None:
    with pytest.raises(BadModelFileError, match="beyond its end"):
        sparse.decode(np.full((1, 3), 9, np.uint8), np.ones((1, 3), np.float32), 1, (1, 20))
