"""FuseRotary: caches follow the graph's own angles, whatever scales them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OptionError
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.fuse_rotary import FuseRotary

Export = Callable[[str, str], Path]
TEXT = "simplify, fuse_rotary"


@pytest.mark.parametrize("exporter", ["optimum", "dynamo"])
def test_two_per_layer_and_no_angle_is_stored(tiny_export: Export, tmp_path: Path, exporter: str) -> None:
    source = models.load(tiny_export("llama", exporter), work_dir=tmp_path)
    before = sum(value.const_value.nbytes for value in source.model.graph.initializers.values() if value.const_value)
    done = pipeline.run(source.model, pipeline.parse(TEXT), Context(config=source.config))
    layers = source.config["num_hidden_layers"]
    assert len(done[1][1].changed) == 2 * layers, done[1][1].reasons()
    ops = Counter(node.op_type for node in source.model.graph)
    assert ops["RotaryEmbedding"] == 2 * layers
    assert ops["Cos"] == ops["Sin"] == 1
    assert done[1][1].bytes_after < before + 8192


def test_the_cache_has_as_many_positions_as_asked(tiny_export: Export, tmp_path: Path) -> None:
    source = models.load(tiny_export("llama", "optimum"), work_dir=tmp_path)
    pipeline.run(source.model, pipeline.parse("simplify, fuse_rotary(max_positions=40)"), Context(config=source.config))
    node = next(node for node in source.model.graph if node.op_type == "RotaryEmbedding")
    model = source.model
    model.graph.outputs.append(node.inputs[2])  # type: ignore[arg-type]
    feeds = {
        value.name: np.zeros([size if isinstance(size, int) else 1 for size in value.shape], value.dtype.numpy())
        for value in model.graph.inputs
    }
    feeds["attention_mask"] = np.ones((1, 2), np.int64)  # one token in the cache, one new
    table = list(graphs.run(model, feeds).values())[-1]
    assert table.shape[0] == 40
    assert np.allclose(table[0], 1.0), "the angle of position 0 is 0"


def test_plain_additions_do_not_fire() -> None:
    builder = graphs.Builder(32, 96, 0)
    table = builder.weight(96, 32)
    x = builder.op("Gather", table, builder.ids, width=32, axis=0)
    model = builder.finish(builder.op("Add", x, builder.step("linear", x, x), width=32), False, table)
    assert not FuseRotary().run(model, Context()).modified


def test_a_length_that_is_no_number_is_refused() -> None:
    with pytest.raises(OptionError, match="max_positions"):
        pipeline.parse("fuse_rotary(max_positions='long')")
