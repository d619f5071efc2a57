"""merge_lora: sums of floats, rounding of codes, wider pairs; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest
from adapters import factors, write_adapter
from decoders import decoder

from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import OnnxpressError, OptionError, UnsupportedModelError
from onnxpress.compiler.linears import find_embeddings, find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.low_rank.merge_lora import MergeLora, add_update, update_norm

Q, UP, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"
SHAPES = {Q: (32, 32), UP: (64, 32), HEAD: (259, 32)}
NAMES = {Q: "block0.q", UP: "block1.up", HEAD: "head"}


def matrices(model: ir.Model) -> dict[str, np.ndarray]:
    return {one.name: one.w_NK().copy() for one in find_linears(model)}


def merge(model: ir.Model, path: Path, **options: Any) -> Report:
    return MergeLora(path=str(path), **options).run(model, Context())


def updates() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {module: factors(shape, seed=number) for number, (module, shape) in enumerate(SHAPES.items())}


def test_law_zero_changes_nothing_and_dora_sets_lengths() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 7)).astype(np.float32)
    zero = np.zeros_like(w)
    assert np.array_equal(add_update(w, zero), w)
    lengths = rng.random(5).astype(np.float32) + 1
    found = add_update(w, rng.standard_normal((5, 7)).astype(np.float32), lengths)
    assert np.allclose(np.linalg.norm(found, axis=1), lengths, rtol=1e-6)
    assert np.array_equal(add_update(zero, zero, lengths), zero)


def test_law_the_norm_needs_no_product() -> None:
    a, b = factors((9, 7), rank=3)
    assert update_norm(a, b) == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-6)


def test_floats_get_the_sum_and_nothing_else_changes(tmp_path: Path) -> None:
    model = decoder()
    before, given = matrices(model), updates()
    report = merge(model, write_adapter(tmp_path, given, lora_alpha=4))
    after = matrices(model)
    assert sorted(report.changed) == sorted(NAMES.values())
    assert report.metrics == {"update_error": 0.0}
    for name, matrix in before.items():
        module = next((one for one, known in NAMES.items() if known == name), None)
        wanted = matrix if module is None else matrix + 2 * given[module][1] @ given[module][0]
        assert np.allclose(after[name], wanted, atol=1e-6), name


def test_the_same_adapter_is_merged_once(tmp_path: Path) -> None:
    model = decoder()
    path = write_adapter(tmp_path / "one", updates())
    merge(model, path)
    text = graphs.text(model)
    report = merge(model, path)
    assert not report.modified
    assert "in the weights already" in next(iter(report.reasons()))
    assert graphs.text(model) == text
    assert merge(model, write_adapter(tmp_path / "two", updates(), lora_alpha=3)).modified


@pytest.mark.parametrize("passes", ["pack_qkv", "rtn(bits=8, block_size=16), pack_qkv", "rtn(bits=8, block_size=16)"])
def test_rows_of_others_stay_bit_for_bit(passes: str, tmp_path: Path) -> None:
    model = decoder()
    pipeline.run(model, pipeline.parse(passes), Context())
    before = matrices(model)
    given = updates()
    report = merge(model, write_adapter(tmp_path, {Q: given[Q]}))
    after = matrices(model)
    name = "block0.qkv" if "pack" in passes else "block0.q"
    delta = given[Q][1] @ given[Q][0]
    assert report.changed == [name]
    assert np.abs(after[name][:32] - before[name][:32] - delta).max() < (0.01 if "rtn" in passes else 1e-6)
    assert np.array_equal(after[name][32:], before[name][32:])
    assert all(np.array_equal(after[one], before[one]) for one in before if one != name)
    if "rtn" in passes:
        assert 0 < report.metrics["update_error"] < 0.05


@pytest.mark.parametrize("kind, start, rows", [("q", 0, 32), ("k", 32, 16), ("v", 48, 16)])
def test_each_part_of_a_packed_matrix_gets_its_own(kind: str, start: int, rows: int, tmp_path: Path) -> None:
    model = decoder()
    pipeline.run(model, pipeline.parse("pack_qkv"), Context())
    before = matrices(model)["block0.qkv"]
    a, b = factors((rows, 32))
    merge(model, write_adapter(tmp_path, {f"model.layers.0.self_attn.{kind}_proj": (a, b)}))
    before[start : start + rows] += b @ a
    assert np.allclose(matrices(model)["block0.qkv"], before, atol=1e-6)


def test_a_pair_gets_wider_and_stays_exact(tmp_path: Path) -> None:
    model = decoder()
    pipeline.run(model, pipeline.parse("svd(rank=4, kinds=('q',))"), Context())
    before = matrices(model)["block0.q"]
    given = updates()
    merge(model, write_adapter(tmp_path, {Q: given[Q]}))
    (pair,) = (one for one in find_linears(model) if one.name == "block0.q")
    assert pair.factors is not None
    assert pair.factors[0].num_out == 4 + 2
    assert np.allclose(pair.w_NK(), before + given[Q][1] @ given[Q][0], atol=1e-5)


@pytest.mark.parametrize("bits", [None, 8])
def test_tables(bits: int | None, tmp_path: Path) -> None:
    model = decoder()
    if bits:
        pipeline.run(model, pipeline.parse("rtn(bits=8, block_size=16)"), Context())
    before = find_embeddings(model)[0].table_VH().copy()
    a, b = factors((32, 259))
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    merge(model, write_adapter(tmp_path, {}, arrays={f"{name}A": a, f"{name}B": b}))
    after = find_embeddings(model)[0].table_VH()
    assert np.abs(after - before - (b @ a).T).max() < (0.02 if bits else 1e-6)


def test_an_update_that_rounding_swallows_is_refused(tmp_path: Path) -> None:
    models = [decoder(), decoder()]
    for model in models:
        pipeline.run(model, pipeline.parse("rtn(bits=4, block_size=32)"), Context())
    path = write_adapter(tmp_path, {Q: factors((32, 32), scale=1e-3)})
    with pytest.raises(UnsupportedModelError, match="swallows 100% of the update") as caught:
        merge(models[0], path)
    assert caught.value.hint is not None
    assert "before quantizing" in caught.value.hint
    report = merge(models[1], path, max_loss=1.0)
    assert report.metrics["update_error"] == pytest.approx(1, abs=1e-3)


def _run(passes: str) -> Callable[[ir.Model], None]:
    return lambda model: pipeline.run(model, pipeline.parse(passes), Context()) and None


def _after_smooth(model: ir.Model) -> None:
    model.metadata_props["onnxpress.pipeline"] = "fuse_rmsnorm, smooth, rtn(bits=8)"


REFUSED: list[tuple[str, Callable[[ir.Model], None], dict[str, tuple[int, int]], str]] = [
    ("another shape", lambda _: None, {Q: (32, 16)}, r"block0.q \[32, 32\] \[out, in\], found one of \[32, 16\]"),
    ("no such block", lambda _: None, {"model.layers.7.self_attn.q_proj": (32, 32)}, "block7.q"),
    ("no such module", lambda _: None, {"model.strange": (32, 32)}, "model.strange: expected a matrix"),
    ("numbers moved about", _after_smooth, {Q: (32, 32)}, "found those that smooth has changed"),
    ("columns of int8", _run("dynamic_int8(tokens=0)"), {Q: (32, 32)}, "it is stored by DynamicQuantizeMatMul"),
    (
        "a quantized pair",
        _run("svd(rank=8, kinds=('q',)), rtn(bits=8, block_size=16)"),
        {Q: (32, 32)},
        "a pair of low rank with quantized factors",
    ),
]


@pytest.mark.parametrize("prepare, modules, text", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_merged_is_told_and_nothing_changes(
    prepare: Callable[[ir.Model], None], modules: dict[str, tuple[int, int]], text: str, tmp_path: Path
) -> None:
    model = decoder()
    prepare(model)
    before = graphs.text(model)
    with pytest.raises(OnnxpressError, match=text):
        # The first module is a good one: it must not be merged alone.
        merge(model, write_adapter(tmp_path, {"model.layers.1.self_attn.q_proj": (32, 32), **modules}))
    assert graphs.text(model) == before


def test_a_pass_before_is_remembered(tmp_path: Path) -> None:
    context = Context(history=["rtn(bits=8)", "rotate(seed=1)"])
    with pytest.raises(UnsupportedModelError, match="rotate has changed"):
        MergeLora(path=str(write_adapter(tmp_path, {Q: (32, 32)}))).run(decoder(), context)


def test_short_floats_tell_what_they_swallow(tmp_path: Path) -> None:
    model = decoder()
    linear = find_linears(model)[0]
    short = linear.w_NK().astype(ir.DataType.BFLOAT16.numpy())
    linear.weight.const_value = ir.tensor(np.ascontiguousarray(short.T if linear.is_turned() else short))
    linear.weight.dtype = ir.DataType.BFLOAT16
    a, b = factors(linear.shape, scale=0.005)
    path = write_adapter(tmp_path / "fine", {linear.name: (a, b)})
    before = linear.w_NK().copy()
    report = merge(model, path, max_loss=2.0)
    after = find_linears(model)[0].w_NK()
    lost = np.linalg.norm(after - before - b @ a) / np.linalg.norm(b @ a)
    assert lost > 0.1
    assert report.metrics["update_error"] == pytest.approx(lost, rel=0.02)


def test_two_modules_of_one_matrix_are_refused(tmp_path: Path) -> None:
    model = decoder()
    linear = next(one for one in find_linears(model) if one.kind == "q")
    names = ["model.layers.0.self_attn.q_proj", "other.layers.0.self_attn.q_proj"]
    path = write_adapter(tmp_path / "twice", dict.fromkeys(names, linear.shape))
    with pytest.raises(UnsupportedModelError, match=r"expected one module for block0\.q, found model"):
        merge(model, path)


def test_the_word_smooth_in_a_path_is_no_pass(tmp_path: Path) -> None:
    model = decoder()
    linear = find_linears(model)[0]
    for number, name in enumerate(("my-smooth-talker", "other")):
        path = write_adapter(tmp_path / name, {linear.name: factors(linear.shape, seed=number)})
        passes = pipeline.parse(f"merge_lora(path={str(path)!r})")
        ((_, report),) = pipeline.run(
            model, passes, Context(history=[f"merge_lora(path='{tmp_path}/my-smooth-talker')"])
        )
        assert report.changed


def test_options() -> None:
    with pytest.raises(OptionError, match="path must be the directory"):
        MergeLora()
    with pytest.raises(OptionError, match="max_loss must be more than 0"):
        MergeLora(path="x", max_loss=0.0)
