"""SplitProjections: the columns that execution names, in every way to pack, and what must stay together."""

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
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.split_projections import SplitProjections, read_part

WIDTH, HEADS, SIZE = 16, 4, 8
INNER = HEADS * SIZE


def places(batch: int = 2, sequence: int = 3, width: int = 48) -> np.ndarray:
    return np.arange(batch * sequence * width).reshape(batch, sequence, width)


def test_any_choice_of_columns_is_read() -> None:
    chosen = np.random.default_rng(0).permutation(48)[:20]
    part = read_part(places(), places()[..., chosen])
    assert part is not None
    assert not part.is_turned
    assert np.array_equal(part.columns, chosen)


@pytest.mark.parametrize("heads", [2, 3, 6])  # as many heads as tokens: the rows tell them apart
def test_turned_heads_are_told_from_others(heads: int) -> None:
    apart = places().reshape(2, 3, heads, 48 // heads)
    for is_turned in (False, True):
        part = read_part(places(), apart.swapaxes(1, 2) if is_turned else apart)
        assert part is not None
        assert part.is_turned is is_turned
        assert np.array_equal(part.columns, np.arange(48).reshape(heads, -1))


@pytest.mark.parametrize("wrong", ["rows swapped", "batches swapped", "one row differs", "rank 2"])
def test_more_than_a_choice_is_not_read(wrong: str) -> None:
    part = places().copy()
    if wrong == "rows swapped":
        part = part[:, ::-1]
    elif wrong == "batches swapped":
        part = part[::-1]
    elif wrong == "one row differs":
        part[1, 2] = part[1, 2, ::-1]
    else:
        part = part[:, 0]
    assert read_part(places(), part) is None


def packed(kind: str, *, guard: str = "") -> ir.Model:
    """(q k) v, element by element, of a projection [16, 96] that is packed as `kind` says."""
    builder = graphs.Builder(WIDTH, 96, 0)
    table = builder.weight(96, WIDTH, name="table")
    x = builder.op("Gather", table, builder.ids, width=WIDTH, axis=0)
    weight = builder.weight(WIDTH, 3 * INNER)
    product = builder.op("MatMul", x, weight, width=3 * INNER)
    if guard == "weight read twice":
        x = builder.op("MatMul", builder.op("MatMul", x, weight, width=3 * INNER), builder.weight(3 * INNER, WIDTH))
        x.shape = ir.Shape(["batch", "sequence", WIDTH])
    product = builder.op("Add", product, builder.weight(3 * INNER), width=3 * INNER)

    def cut(value: ir.Value, start: int, stop: int, axis: int) -> ir.Value:
        return builder.op("Slice", value, builder.axes(start), builder.axes(stop), builder.axes(axis))

    def flat(value: ir.Value, width: int = INNER) -> ir.Value:
        return builder.op("Reshape", value, builder.axes(0, 0, width), width=width)

    if kind == "below each other":
        parts = [cut(product, place * INNER, (place + 1) * INNER, 2) for place in range(3)]
    elif kind == "by head":
        apart = builder.op("Reshape", product, builder.axes(0, 0, HEADS, 3 * SIZE))
        parts = [flat(cut(apart, place * SIZE, (place + 1) * SIZE, 3)) for place in range(3)]
    elif kind == "by head, turned":
        apart = builder.op("Transpose", builder.op("Reshape", product, builder.axes(0, 0, HEADS, 3 * SIZE)))
        apart.producer().attributes["perm"] = ir.AttrInt64s("perm", [0, 2, 1, 3])
        parts = [cut(apart, place * SIZE, (place + 1) * SIZE, 3) for place in range(3)]
        for part in parts:
            part.shape = ir.Shape(["batch", HEADS, "sequence", SIZE])
    elif kind == "in any order":
        order = np.random.default_rng(1).permutation(3 * INNER).reshape(3, INNER)
        index = [builder.const(one.astype(np.int64), f"at{place}") for place, one in enumerate(order)]
        parts = [builder.op("Gather", product, one, axis=2, width=INNER) for one in index]
    else:  # gathered
        apart = builder.op("Reshape", product, builder.axes(0, 0, HEADS, 3, SIZE))
        index = [builder.const(np.array(place, np.int64), f"at{place}") for place in range(3)]
        parts = [flat(builder.op("Gather", apart, one, axis=3)) for one in index]
    if guard == "shared columns":
        parts[2] = cut(product, INNER, 2 * INNER, 2)
    if guard == "whole read":
        parts[2] = builder.op("Add", parts[2], builder.op("ReduceMean", product, builder.axes(-1), keepdims=1))
    for part in parts:
        part.shape = part.shape or ir.Shape(["batch", "sequence", INNER])
    q, k, v = parts
    joined = builder.op("Add", builder.op("Mul", q, k), v)
    if kind == "by head, turned":
        joined = builder.op("Transpose", joined, perm=[0, 2, 1, 3])
        joined = flat(joined)
    joined.shape = ir.Shape(["batch", "sequence", INNER])
    last = builder.op("MatMul", joined, builder.weight(INNER, WIDTH), width=WIDTH)
    if guard == "weight read twice":
        last = builder.op("Add", last, x, width=WIDTH)
    return builder.finish(last, False, table)


@pytest.mark.parametrize("kind", ["below each other", "by head", "by head, turned", "gathered", "in any order"])
def test_each_part_becomes_a_product(kind: str) -> None:
    model = packed(kind)
    before = graphs.run(model)["logits"]
    whole = find_linears(model)[0]
    rows = {row.tobytes() for row in whole.w_NK()}
    report = SplitProjections().run(model, Context())
    assert len(report.changed) == 3, report.reasons()
    found = [one for one in find_linears(model) if one.num_in == WIDTH and one.num_out == INNER]
    assert len(found) == 3
    assert {row.tobytes() for one in found for row in one.w_NK()} == rows
    assert all(one.bias is not None for one in found)
    left = [node.op_type for node in model.graph]
    assert not {"Slice", "Split"} & set(left)
    assert left.count("Gather") == 1  # the embedding
    check.close(before, graphs.run(model)["logits"])
    assert not SplitProjections().run(model, Context()).changed


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        ("shared columns", "parts share columns: apart, these would be stored twice"),
        ("weight read twice", "other nodes read the packed weight too"),
        ("whole read", None),
    ],
)
def test_what_stays_together(guard: str, reason: str | None) -> None:
    model = packed("below each other", guard=guard)
    before = graphs.text(model)
    report = SplitProjections().run(model, Context())
    assert not report.changed
    assert set(report.reasons()) == ({reason} if reason else set())
    assert graphs.text(model) == before


def test_a_part_that_the_graph_gives_away_stays() -> None:
    model = packed("below each other")
    part = next(node for node in model.graph if node.op_type == "Slice").outputs[0]
    model.graph.outputs.append(part)
    report = SplitProjections().run(model, Context())
    assert not report.changed
    assert set(report.reasons()) == {"a part is an output of the graph"}


@pytest.mark.parametrize("architecture", ["falcon", "gpt2", "gpt_neox", "phi3"])
def test_packed_decoders_get_all_roles(tiny_export: Callable[..., Path], tmp_path: Path, architecture: str) -> None:
    source = models.load(tiny_export(architecture), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("fuse"), Context(config=source.config))
    kinds = {one.kind for one in find_linears(source.model) if one.block == 0}
    assert {"q", "k", "v"} <= kinds
    assert architecture != "phi3" or {"gate", "up"} <= kinds
