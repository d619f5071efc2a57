"""Sources of calibration text: files, folders, datasets, Python's help, the model itself."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoders import VOCABULARY, write_decoder

from onnxpress.compiler.calibration_sources import own_text, read_sources
from onnxpress.compiler.calibration_text import OWN, CalibrationText
from onnxpress.compiler.errors import CalibrationError
from onnxpress.compiler.journal import Journal, Section
from onnxpress.compiler.optimize import optimize
from onnxpress.compiler.probe import Probe, log_softmax
from onnxpress.compiler.sample_text import TOPICS


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "deep" / "c.MD").write_text("third")
    (tmp_path / "a.rst").write_text("first")
    (tmp_path / "code.py").write_text("no text")
    texts, is_self = read_sources([tmp_path, str(tmp_path / "b.txt"), "english", "self"])
    assert [*texts] == [str(tmp_path), str(tmp_path / "b.txt"), TOPICS]
    assert texts[str(tmp_path)] == "first\n\nsecond\n\nthird"
    assert is_self
    assert read_sources(None) == ({}, False)
    assert read_sources(tmp_path / "b.txt") == ({str(tmp_path / "b.txt"): "second"}, False)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("none.txt", "No such file"),
        ("empty.txt", "found nothing"),
        ("binary", "UTF-8"),
        ("folder", "found no file named"),
        ("some/data.txt", "No such file"),
        ("some where", "No such file"),
    ],
)
def test_what_is_no_text_is_named(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CalibrationError, match=found) as caught:
        read_sources(tmp_path / name)
    assert name in str(caught.value)


def hub(rows: list[dict[str, Any]], calls: list[Any]) -> Any:
    def load_dataset(*given: Any, **options: Any) -> Any:
        calls.append((given, options))
        if given[0] == "no/where":
            raise FileNotFoundError("there is no dataset no/where\nand so on")
        return iter(rows)

    return SimpleNamespace(load_dataset=load_dataset)


def test_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    rows = [{"title": "one", "text": "first"}, {"title": "two", "text": "second"}]
    monkeypatch.setitem(sys.modules, "datasets", hub(rows, calls))
    assert read_sources("org/name:part-1@train[:1%]")[0] == {"org/name:part-1@train[:1%]": "first\n\nsecond"}
    read_sources("org/name")
    want = [("org/name", "part-1", "train[:1%]"), ("org/name", None, "train")]
    assert [(*given, options["split"]) for given, options in calls] == want
    assert all(options["streaming"] for _, options in calls)
    with pytest.raises(CalibrationError, match="there is no dataset no/where") as caught:
        read_sources("no/where")
    assert "and so on" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", hub([{"id": 1, "story": "once"}], calls))
    assert read_sources("org/name")[0] == {"org/name": "once"}
    monkeypatch.setitem(sys.modules, "datasets", hub([{"id": 1}], calls))
    with pytest.raises(CalibrationError, match="a column of text, found id"):
        read_sources("org/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="takes the package datasets") as caught:
        read_sources("org/name")
    assert "pip install datasets" in (caught.value.hint or "")


def test_a_long_dataset_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        for number in range(1000):
            if number == 50:
                pytest.fail("read on")
            yield {"text": "x" * 100_000}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows()))
    assert len(read_sources("org/name")[0]["org/name"]) >= 4_000_000


def quiet(items: Any, label: str) -> Any:
    return items


def write(directory: Path, section: Section | None = None, first: int | None = 1, seed: int = 0) -> Any:
    return own_text(
        directory / "model.onnx",
        first=first,
        vocab_size=VOCABULARY,
        seed=seed,
        section=section or Section(),
        track=quiet,
    )


def test_law_own_text_is_as_probable_as_the_model_says(tmp_path: Path) -> None:
    directory = write_decoder(tmp_path / "model")
    model = ir.load(directory / "model.onnx")
    head = model.graph.initializers["head"]
    assert head.const_value is not None
    head.const_value = ir.Tensor(20 * head.const_value.numpy(), name="head")  # sure of what it says
    ir.save(model, directory / "model.onnx")
    ids_WS = write(directory)(40 * 64, 64)
    assert ids_WS.shape == (40, 64)
    assert (ids_WS[:, 0] == 1).all()
    assert len(np.unique(ids_WS[:, 1])) > 10
    log_p = log_softmax(Probe(directory / "model.onnx").logits(ids_WS)[:, :-1])
    seen = np.take_along_axis(log_p, ids_WS[:, 1:, None], axis=-1)
    entropy = -(np.exp(log_p) * log_p).sum(axis=-1)
    # The mean surprise of samples is the entropy; a text of other tokens has more.
    spread = (seen[..., 0] + entropy).std() / seen.size**0.5
    assert abs((-seen[..., 0] - entropy).mean()) < 5 * spread
    shuffled = np.take_along_axis(log_p, ids_WS[::-1, 1:, None], axis=-1)
    assert -shuffled.mean() > entropy.mean() + 0.1


def test_own_text_is_seeded_and_kept(tmp_path: Path) -> None:
    directory = write_decoder(tmp_path / "model")
    journal = Journal(tmp_path / "journal")
    one = write(directory, journal.section("own"))(64, 16)
    assert np.array_equal(one, write(directory)(64, 16))
    assert not np.array_equal(one, write(directory, seed=1)(64, 16))
    assert len({*write(directory, first=None)(64, 8)[:, 0]}) > 1
    assert write(directory)(1000, 1000).shape == (4, 256), "texts are not longer than 256 tokens"
    (directory / "model.onnx").rename(directory / "kept.onnx")
    (directory / "model.onnx").write_bytes((directory / "kept.onnx").read_bytes())
    assert np.array_equal(one, write(directory, journal.section("own"))(64, 16))


def test_own_text_is_of_the_tokenizers_tokens_and_of_this_model(tmp_path: Path) -> None:
    directory, section = write_decoder(tmp_path / "model"), Journal(tmp_path / "journal").section("own")
    path = directory / "model.onnx"
    few = own_text(path, first=1, vocab_size=5, seed=0, section=Section(), track=quiet)(64, 16)
    assert few.max() == 4, "logits beyond the vocabulary are padding"
    model, found = ir.load(path), []
    head = model.graph.initializers["head"]
    matrix = head.const_value.numpy().copy()  # type: ignore[union-attr]
    for sign in (1, -1):
        head.const_value = ir.Tensor(sign * matrix, name="head")
        ir.save(model, path)
        found.append((path.stat().st_size, write(directory, section)(64, 16)))
    (size, one), (other, two) = found
    assert size == other
    assert not np.array_equal(one, two)


def test_the_file_need_not_say_how_large_heads_are(tmp_path: Path) -> None:
    directory = write_decoder(tmp_path / "model")
    want = write(directory)(64, 16)
    model = ir.load(directory / "model.onnx")
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([*value.shape[:3], "head_size"])
    ir.save(model, directory / "model.onnx")
    with pytest.raises(CalibrationError, match="cannot write text of its own") as caught:
        write(directory)(64, 16)
    assert "english" in (caught.value.hint or "")
    made = optimize(directory, output=tmp_path / "made", passes="gptq(tokens=64, length=16, block_size=16)")
    row = next(one for one in made.report["passes"] if one["pass"].startswith("gptq"))
    assert row["calibration"]["text"] == f"64 tokens of {OWN}"
    assert row["calibration"]["sha256"] == hashlib.sha256(want.tobytes()).hexdigest()


def test_sources_are_mixed_evenly(tmp_path: Path) -> None:
    directory = write_decoder(tmp_path / "model")
    tokenizer = directory / "tokenizer.json"
    texts = {"a.txt": "a" * 500, "b.txt": "b" * 5000}
    mixed = CalibrationText(texts=texts, own=write(directory), tokenizer=tokenizer, vocab_size=VOCABULARY)
    ids, facts = mixed.windows(12 * 32, 32)
    assert ids.shape == (12, 32)
    kinds = ["one" if len({*row}) == 1 else "many" for row in ids]
    assert kinds == ["one", "one", "many"] * 4
    assert facts["text"] == f"384 tokens of a.txt, b.txt, {OWN}"
    note = {"a.txt": "a" * 70, "b.txt": "b" * 9}  # the model writes what texts have too little of
    ids, facts = CalibrationText(texts=note, own=write(directory), tokenizer=tokenizer, vocab_size=VOCABULARY).windows(
        12 * 32, 32
    )
    assert [len({*row}) == 1 for row in ids].count(True) == 2
    assert ids.shape == (12, 32)
    assert facts["text"].endswith("left out: b.txt")
    enough = {"a.txt": "a" * 40}  # a text of one window where one is asked for
    ids, facts = CalibrationText(
        texts=enough, own=write(directory), tokenizer=tokenizer, vocab_size=VOCABULARY
    ).windows(32, 32)
    assert facts["text"] == "32 tokens of a.txt"
    alone, facts = CalibrationText(own=write(directory), tokenizer=tokenizer, vocab_size=VOCABULARY).windows(64, 32)
    assert np.array_equal(alone, write(directory)(64, 32))
    assert facts["text"] == f"64 tokens of {OWN}"


def test_an_artifact_from_own_text(tmp_path: Path) -> None:
    directory = write_decoder(tmp_path / "model")
    passes = "gptq(tokens=512, length=64, block_size=16)"
    made = [
        optimize(directory, output=tmp_path / name, passes=passes, calibration=given)
        for name, given in (("own", "self"), ("english", "english"), ("both", ["self", "english"]), ("none", None))
    ]
    rows = [next(one for one in artifact.report["passes"] if one["pass"].startswith("gptq")) for artifact in made]
    sources = [row["calibration"]["text"] for row in rows]
    assert sources == [f"512 tokens of {one}" for one in (OWN, TOPICS, f"{TOPICS}, {OWN}", OWN)]


def test_a_fused_decoder_writes_too(tmp_path: Path) -> None:
    fused = optimize(write_decoder(tmp_path / "model"), output=tmp_path / "fused", recipe="fp32", measure=False)
    model = ir.load(fused.directory / "model.onnx")
    count = ir.Value(
        name="count",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.ones(1, np.int64), name="count"),
    )
    model.graph.inputs.append(count)  # with a default, as fused models have that of how many logits they give
    model.graph.register_initializer(count)
    ir.save(model, fused.directory / "model.onnx")
    made = optimize(fused.directory, output=tmp_path / "out", passes="gptq(tokens=64, length=32, block_size=16)")
    (row,) = (one for one in made.report["passes"] if one["pass"].startswith("gptq"))
    assert row["calibration"]["text"] == f"64 tokens of {OWN}"


def test_a_model_without_a_cache_writes_nothing(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 8, opset_import: ["": 18]> g (int64[b, s] input_ids) => (float[b, s] logits) '
        "{ logits = Cast <to = 1> (input_ids) }"
    )
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(CalibrationError, match="expected a decoder with a cache"):
        write(tmp_path)(16, 8)


def test_texts_of_one_token_and_rows_without_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (write(write_decoder(tmp_path / "model"))(3, 1) == 1).all()
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    monkeypatch.setitem(sys.modules, "datasets", hub(rows, []))
    assert read_sources("org/name")[0] == {"org/name": "one\n\ntwo"}
