"""merge, slots, convert and extract of whole models: what is written, and what is told when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from adapters import factors, write_adapter
from decoders import decoder, write_decoder

from onnxpress.compiler.adapters import add_slots, convert_adapter, extract_adapter, merge_adapters
from onnxpress.compiler.errors import OnnxpressError, OptionError, OutputError, UnsupportedModelError
from onnxpress.compiler.peft import read_peft
from onnxpress.runtime.session import DecoderSession

Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (32, 32), UP: (64, 32), DOWN: (32, 64)}
IDS = np.random.default_rng(0).integers(3, 200, (1, 9))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), SHAPES, lora_alpha=5)


def logits(path: Path, adapter: Path | None = None) -> np.ndarray:
    session = DecoderSession(path, provider="cpu", threads=1)
    session.adapters.default = None if adapter is None else session.load_adapter(adapter)
    return session.run_logits(IDS).copy()


def test_several_adapters_are_added_and_a_pipeline_follows(plain: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", {Q: factors((32, 32), seed=5)})
    both = merge_adapters(plain, [adapter, other], tmp_path / "both", passes="rtn(bits=8, block_size=16)")
    names = [row["pass"].partition("(")[0] for row in both.report["passes"]]
    assert names == ["merge_lora", "merge_lora", "rtn"]
    first = merge_adapters(plain, adapter, tmp_path / "first")
    second = merge_adapters(first.directory, other, tmp_path / "second")
    exact = logits(second.directory)
    assert np.abs(logits(both.directory) - exact).max() < 0.05 * np.abs(exact).max()
    again = merge_adapters(second.directory, other, tmp_path / "again")
    assert again.report["passes"][0]["changed"] == 0, "merged twice"


def test_files_and_directories_say_the_same(plain: Path, adapter: Path, tmp_path: Path) -> None:
    slots = add_slots(plain, tmp_path / "slots", passes="pack_qkv")
    found = convert_adapter(adapter, slots.directory, tmp_path / "new" / "one.onnx_adapter")
    assert (found.modules, found.slots, found.rank) == (3, 3, 2)
    assert found.nbytes == Path(found.path).stat().st_size
    assert np.array_equal(logits(slots.directory, Path(found.path)), logits(slots.directory, adapter))
    merged = merge_adapters(plain, adapter, tmp_path / "merged")
    assert np.allclose(logits(slots.directory, adapter), logits(merged.directory), atol=1e-4)


@pytest.mark.parametrize("is_file", [False, True])
def test_law_extraction_recovers_what_was_merged(is_file: bool, plain: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge_adapters(plain, adapter, tmp_path / "merged")
    path = tmp_path / ("found.onnx_adapter" if is_file else "found")
    found = extract_adapter(merged.directory, plain, path, rank=2)
    assert found.error < 1e-5
    assert [row["rank"] for row in found.modules] == [2, 2, 2]
    assert found.unchanged == 2 * 6 + 1 + 1 - 3
    assert found.left_out == []
    slots = add_slots(plain, tmp_path / "slots")
    assert np.allclose(logits(slots.directory, path), logits(merged.directory), atol=1e-4)
    if not is_file:
        updates = read_peft(path).updates
        for module, update in read_peft(adapter).updates.items():
            assert np.abs(updates[module].delta() - update.delta()).max() < 1e-5


def test_law_a_lower_rank_leaves_out_what_it_says(plain: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge_adapters(plain, adapter, tmp_path / "merged")
    found = extract_adapter(merged.directory, plain, tmp_path / "found", rank=1)
    lost = whole = 0.0
    for module, update in read_peft(adapter).updates.items():
        sizes = np.linalg.svd(update.delta().astype(np.float64), compute_uv=False) ** 2
        (row,) = (one for one in found.modules if one["module"] == module)
        assert row["error"] == pytest.approx(float(np.sqrt(sizes[1:].sum() / sizes.sum())), rel=1e-3)
        lost, whole = lost + sizes[1:].sum(), whole + sizes.sum()
    assert found.error == pytest.approx(float(np.sqrt(lost / whole)), rel=1e-3)


def test_tables_and_other_weights(plain: Path, tmp_path: Path) -> None:
    model = decoder()
    a, b = factors((32, 259))
    table = model.graph.initializers["embed"]
    assert table.const_value is not None
    table.const_value = ir.tensor(table.const_value.numpy() + (b @ a).T, name="embed")
    changed = write_decoder(tmp_path / "changed")
    ir.save(model, changed / "model.onnx")
    found = extract_adapter(changed, plain, tmp_path / "found", rank=2)
    assert [row["module"] for row in found.modules] == ["model.embed_tokens"]
    merged = merge_adapters(plain, tmp_path / "found", tmp_path / "merged")
    assert np.allclose(logits(merged.directory), logits(changed), atol=1e-4)


def test_what_differs_and_is_no_matrix_is_named(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 18]>
    g (float[1, 8] x) => (float[1, 4] y) <float[8, 4] w = {%s}, float[4] b = {%s}> { h = MatMul(x, w) y = Add(h, b) }"""
    for name, w, b in (("old", 1, 2), ("new", 3, 5)):
        model = ir.from_onnx_text(text % (", ".join([f"{w}.0"] * 32), ", ".join([f"{b}.0"] * 4)))
        ir.save(model, tmp_path / f"{name}.onnx")
    found = extract_adapter(tmp_path / "new.onnx", tmp_path / "old.onnx", tmp_path / "found", rank=1)
    assert found.left_out == ["b"]
    assert found.error < 1e-6


def _call(name: str, *arguments: Any, **options: Any) -> None:
    {"merge": merge_adapters, "slots": add_slots, "convert": convert_adapter, "extract": extract_adapter}[name](
        *arguments, **options
    )


def test_what_cannot_be_done_is_told(plain: Path, adapter: Path, tmp_path: Path) -> None:
    larger = write_decoder(tmp_path / "larger", layers=3)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    file = tmp_path / "x.onnx_adapter"
    rows: list[tuple[tuple[Any, ...], dict[str, Any], type[OnnxpressError], str]] = [
        (("convert", adapter, plain, file), {}, UnsupportedModelError, "a graph with slots for adapters, found none"),
        (("convert", adapter, plain, tmp_path / "x.bin"), {}, OptionError, r"ends in .onnx_adapter, got 'x.bin'"),
        (("convert", adapter, plain, full), {}, OutputError, "expected a file to write, found a directory"),
        (("extract", plain, plain, tmp_path / "x"), {}, OptionError, "found the same matrices"),
        (("extract", larger, plain, tmp_path / "x"), {}, UnsupportedModelError, "found block2.down in .*larger only"),
        (("extract", plain, plain, full), {}, OutputError, "expected a new or empty directory, found files"),
        (("extract", plain, plain, tmp_path / "x"), {"rank": 0}, OptionError, "rank: expected at least 1, got 0"),
        (("merge", plain, tmp_path / "gone", tmp_path / "y"), {}, OnnxpressError, "gone: no such directory"),
        (("slots", plain, tmp_path / "y"), {"kinds": ("quer",)}, OptionError, "kinds must be among"),
    ]
    for arguments, options, kind, text in rows:
        with pytest.raises(kind, match=text) as caught:
            _call(*arguments, **options)
        assert "\n" not in caught.value.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "larger"], "something was left behind"


def test_numbers_moved_by_an_artifacts_pipeline_are_refused(plain: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    add_slots(plain, folder)
    card = (folder / "onnxpress.json").read_text()
    (folder / "onnxpress.json").write_text(card.replace('"pass": "lora_slots"', '"pass": "smooth"'))
    with pytest.raises(UnsupportedModelError, match="smooth has changed"):
        merge_adapters(folder, adapter, tmp_path / "merged")
