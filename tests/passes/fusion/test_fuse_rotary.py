"""FuseRotary: caches follow the graph's own angles, whatever scales them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import check
import graphs
import numpy as np
import onnx_ir as ir
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


OPERATOR = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, 4, seq, 16] x, int64[batch, seq] position_ids) => (float[batch, 4, seq, 16] y)
<float[1, 1, WIDTH] frequencies = {frequencies}, float[32, WIDTH] table = {{{table}}}> {{ {body} }}"""


def operator(body: str, width: int = 8) -> ir.Model:
    """RotaryEmbedding of ai.onnx on [batch, 4 heads, tokens, 16]; `table` holds cosines and sines alike."""
    rng = np.random.default_rng(2)
    frequencies = "{" + ", ".join(str(0.5**i) for i in range(width)) + "}"
    table = ", ".join(f"{number:.4f}" for number in rng.standard_normal(32 * width))
    text = OPERATOR.format(body=body, frequencies=frequencies, table=table).replace("WIDTH", str(width))
    return ir.from_onnx_text(text)


ROWS = """axes = Constant <value_ints = [2]> () p = Cast <to = 1> (position_ids) u = Unsqueeze(p, axes)
a = Mul(u, frequencies) c = Cos(a) s = Sin(a)"""
BODIES = {
    "tables": ("y = RotaryEmbedding(x, table, table, position_ids)", 8),
    "interleaved": ("y = RotaryEmbedding <interleaved = 1> (x, table, table, position_ids)", 8),
    "half of each head": ("y = RotaryEmbedding <rotary_embedding_dim = 8> (x, table, table, position_ids)", 4),
    "a row for each token": (f"{ROWS} y = RotaryEmbedding(x, c, s)", 8),
}


@pytest.mark.parametrize("case", BODIES)
def test_the_operator_of_ai_onnx_is_read(case: str) -> None:
    body, width = BODIES[case]
    model = operator(body, width)
    rng = np.random.default_rng(4)
    feeds = {"x": rng.standard_normal((2, 4, 3, 16)).astype(np.float32), "position_ids": rng.integers(0, 32, (2, 3))}
    before = graphs.run(model, feeds)
    pipeline.run(model, pipeline.parse("simplify(shapes=False), fuse_rotary(max_positions=32)"), Context())
    assert [node.domain for node in model.graph if node.op_type == "RotaryEmbedding"] == ["com.microsoft"]
    check.close(before["y"], graphs.run(model, feeds)["y"])
