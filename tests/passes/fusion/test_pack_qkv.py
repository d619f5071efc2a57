"""PackQkv: one matrix, rows in the order the operator wants, and the guards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.fusion.pack_qkv import PackQkv

UNPACKED = "simplify, fuse_rmsnorm, fuse_rotary, fuse_attention"


def test_rows_are_queries_keys_values(tiny_export: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("llama", "optimum"), work_dir=tmp_path)
    context = Context(config=source.config)
    pipeline.run(source.model, pipeline.parse(UNPACKED), context)
    parts = {linear.kind: linear.w_NK().copy() for linear in find_linears(source.model) if linear.block == 0}
    report = PackQkv().run(source.model, context)
    assert len(report.changed) == source.config["num_hidden_layers"]
    assert report.bytes_after == report.bytes_before
    packed = next(linear for linear in find_linears(source.model) if linear.name == "block0.qkv")
    assert np.array_equal(packed.w_NK(), np.concatenate([parts["q"], parts["k"], parts["v"]]))


def test_normalized_heads_cannot_be_packed(tiny_export: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = models.load(tiny_export("qwen3", "optimum"), work_dir=tmp_path)
    context = Context(config=source.config)
    pipeline.run(source.model, pipeline.parse(UNPACKED), context)
    report = PackQkv().run(source.model, context)
    assert not report.changed
    assert set(report.reasons()) == {"queries, keys or values do not come straight from a projection"}
