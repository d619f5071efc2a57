"""FuseRotary: parts of heads, counted positions, and frequencies that a table cannot hold."""

from __future__ import annotations

from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import genai, pipeline
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.models.tiny import save_tiny
from onnxpress.passes.fusion.fuse_attention import FuseAttention
from onnxpress.passes.fusion.fuse_rotary import FuseRotary

HEADS, WIDTH, LENGTH = 2, 16, 64


def rotary(
    turned: int,
    *,
    swapped: bool = False,
    by_longest: bool = False,
    counted: bool = False,
    shifted: bool = False,
    rest: str = "behind",
) -> ir.Model:
    """x [batch, heads, tokens, width] of which the first columns are turned.

    Args:
        turned: columns that are turned.
        swapped: the halves are exchanged, which no kernel does.
        by_longest: another base once any position is above 16.
        counted: positions are 0, 1, ... [1, tokens], of a symbolic batch size.
        shifted: another input of integers is added to the positions.
        rest: where the columns that are not turned go, "behind" or "in front"; or "of another" value.
    """
    x = ir.val("x", ir.DataType.FLOAT, ["batch", HEADS, "tokens", WIDTH])
    ids = ir.val("position_ids", ir.DataType.INT64, ["batch", "tokens"])
    tokens = ir.val("input_ids", ir.DataType.INT64, ["batch", "tokens"])
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []

    def const(array: object, dtype: type = np.int64) -> ir.Value:
        tensor = ir.tensor(np.array(array, dtype), name=f"c{len(weights)}")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        weights.append(value)
        return value

    def op(kind: str, *inputs: ir.Value, shape: list[object], dtype: int = 1, **attributes: int) -> ir.Value:
        node = ir.Node("", kind, list(inputs), [ir.AttrInt64(key, number) for key, number in attributes.items()])
        value = node.outputs[0]
        value.name, value.shape = f"v{len(nodes)}", ir.Shape(shape)
        value.type = ir.TensorType(ir.DataType(dtype))
        nodes.append(node)
        return value

    def columns(value: ir.Value, start: int, end: int) -> ir.Value:
        return op(
            "Slice", value, const([start]), const([end]), const([3]), shape=["batch", HEADS, "tokens", end - start]
        )

    positions = ids
    if counted:
        size = op("Gather", op("Shape", tokens, shape=[2], dtype=7), const(1), shape=[], dtype=7, axis=0)
        row = op("Range", const(0), size, const(1), shape=["tokens"], dtype=7)
        positions = op("Unsqueeze", row, const([0]), shape=["rows", "tokens"], dtype=7)
    if shifted:
        positions = op("Add", positions, tokens, shape=["batch", "tokens"], dtype=7)
    base = 1e4 ** (-np.arange(turned // 2) / (turned // 2))
    frequencies = const(base, np.float32)
    if by_longest:
        longest = op("ReduceMax", positions, shape=[1, 1], dtype=7)
        is_long = op("Greater", longest, const(16), shape=[1, 1], dtype=9)
        frequencies = op("Where", is_long, const(base / 4, np.float32), frequencies, shape=[1, turned // 2])
    floats = op("Unsqueeze", op("Cast", positions, shape=["b", "tokens"], to=1), const([2]), shape=["b", "tokens", 1])
    angles = op("Mul", floats, frequencies, shape=["b", "tokens", turned // 2])
    full = op("Concat", angles, angles, shape=["b", "tokens", turned], axis=-1)
    shape = ["b", 1, "tokens", turned]
    cos = op("Unsqueeze", op("Cos", full, shape=["b", "tokens", turned]), const([1]), shape=shape)
    sin = op("Unsqueeze", op("Sin", full, shape=["b", "tokens", turned]), const([1]), shape=shape)
    part = columns(x, 0, turned) if turned < WIDTH else x
    like = ["batch", HEADS, "tokens", turned]
    half = turned // 2
    first, second = columns(part, 0, half), columns(part, half, turned)
    if swapped:
        first, second = second, first
    other = op("Concat", op("Neg", second, shape=like), first, shape=like, axis=-1)
    result = op("Add", op("Mul", part, cos, shape=like), op("Mul", other, sin, shape=like), shape=like)
    if turned < WIDTH:
        source = op("Neg", x, shape=["batch", HEADS, "tokens", WIDTH]) if rest == "of another" else x
        parts = [result, columns(source, turned, WIDTH)]
        parts = parts[::-1] if rest == "in front" else parts
        result = op("Concat", *parts, shape=["batch", HEADS, "tokens", WIDTH], axis=-1)
    result.name = "y"
    graph = ir.Graph(
        [x, ids, tokens], [result], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="rotary"
    )
    return ir.Model(graph, ir_version=10)


def fuse(model: ir.Model) -> Report:
    return FuseRotary().run(model, Context(config={"max_position_embeddings": LENGTH}))


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, HEADS, 5, WIDTH)).astype(np.float32)
    return {"x": x, "position_ids": np.arange(5)[None].repeat(2, 0), "input_ids": np.zeros((2, 5), np.int64)}


@pytest.mark.parametrize("turned", [8, WIDTH])
@pytest.mark.parametrize("counted", [False, True])
def test_whole_and_partial_heads(turned: int, counted: bool) -> None:
    model = rotary(turned, counted=counted)
    before = graphs.run(model, feeds())["y"]
    assert len(fuse(model).changed) == 1
    assert [node.op_type for node in model.graph if node.op_type in ("RotaryEmbedding", "Neg")] == ["RotaryEmbedding"]
    check.close(before, graphs.run(model, feeds())["y"])


@pytest.mark.parametrize("turned", [8, WIDTH])
def test_exchanged_halves_stay_and_the_graph_as_it_was(turned: int) -> None:
    model = rotary(turned, swapped=True)
    before = graphs.text(model)
    report = fuse(model)
    assert not report.changed
    assert report.skipped
    assert graphs.text(model) == before


def test_frequencies_that_depend_on_the_longest_position_stay() -> None:
    model = rotary(WIDTH, by_longest=True)
    report = fuse(model)
    assert not report.changed
    assert report.skipped


@pytest.mark.parametrize("case", ["in front", "of another", "an output"])
def test_a_part_that_is_not_joined_with_its_own_rest_is_turned_alone(case: str) -> None:
    model = rotary(8, rest=case)
    part = next(node.outputs[0] for node in model.graph if node.op_type == "Add")
    name = part.name
    if case == "an output":
        model.graph.outputs.append(part)
    before = graphs.run(model, feeds())
    assert fuse(model).changed == [name]
    assert [node.op_type for node in model.graph].count("RotaryEmbedding") == 1
    assert model.graph.outputs[0].producer().op_type == "Concat"
    for key, got in graphs.run(model, feeds()).items():
        check.close(before[key], got)


def test_angles_that_depend_on_more_than_positions_stay() -> None:
    """Other integers are zeros in a sample: only the graph tells that they matter."""
    report = fuse(rotary(WIDTH, shifted=True))
    assert report.reasons() == {"the angles also depend on input_ids": 1}


def test_the_number_of_heads_must_be_known_for_a_part() -> None:
    model = rotary(8)
    model.graph.inputs[0].shape = ir.Shape(["batch", "heads", "tokens", WIDTH])
    reason = "a part of each head is turned, and the number or width of heads is unknown"
    assert fuse(model).reasons() == {reason: 1}


def test_the_table_is_as_long_as_the_config_says() -> None:
    model = rotary(WIDTH)
    fuse(model)
    (node,) = (node for node in model.graph if node.op_type == "RotaryEmbedding")
    model.graph.outputs.append(node.inputs[2])  # type: ignore[arg-type]
    assert list(graphs.run(model, feeds()).values())[-1].shape == (LENGTH, WIDTH // 2)


def test_a_part_that_the_kernel_cannot_turn_stays_outside_of_attention(tmp_path: Path) -> None:
    """Heads of 24: the kernel wants a table whose width is a multiple of 8. Its cache must not be shared then."""
    checkpoint = save_tiny("gemma", tmp_path / "gemma", head_dim=24)
    source = models.load(checkpoint, work_dir=tmp_path)
    done = pipeline.run(source.model, pipeline.parse("fp32"), Context(config=source.config))
    ledger = next(report.ledger for pass_, report in done if isinstance(pass_, FuseAttention))
    assert len(ledger) == 2
    assert all(row["rotary"].startswith("stays outside: ") for row in ledger)
    ops = [node.op_type for node in source.model.graph]
    assert ops.count("RotaryEmbedding") == 4
    cache = genai.find_cache(source.model)
    assert cache is not None
    assert not cache.is_shareable
