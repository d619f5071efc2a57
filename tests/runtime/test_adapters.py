"""Adapters at run time: each request its own, switched by address, and never a cache that another one made."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from adapters import write_adapter
from decoders import write_decoder

from onnxpress.compiler.errors import BadModelFileError, OnnxpressError, OptionError, UnsupportedModelError
from onnxpress.compiler.lora_slots import Slot, value_of
from onnxpress.compiler.lora_slots import write_adapter as write_file
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.low_rank.lora_slots import LoraSlots
from onnxpress.passes.low_rank.merge_lora import MergeLora
from onnxpress.runtime.adapters import find_slots
from onnxpress.runtime.generate import Generator
from onnxpress.runtime.model import Model, load
from onnxpress.runtime.sampling import GenerationOptions
from onnxpress.runtime.session import DecoderSession

MODULES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.down_proj": (32, 64)}
PROMPT = [5, 17, 99, 42, 7, 8, 120]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with slots, two adapters, and the model with each merged."""
    root = tmp_path_factory.mktemp("adapters")
    for name, scale in (("one", 4), ("two", -6)):
        write_adapter(root / name, MODULES, lora_alpha=scale)
        write_decoder(root / f"merged-{name}")
        model = ir.load(root / f"merged-{name}" / "model.onnx")
        MergeLora(path=str(root / name)).run(model, Context())
        ir.save(model, root / f"merged-{name}" / "merged.onnx")
    write_decoder(root / "plain")
    write_decoder(root / "slots")
    model = ir.load(root / "slots" / "model.onnx")
    LoraSlots().run(model, Context())
    ir.save(model, root / "slots" / "model.onnx")
    return root


@pytest.fixture
def session(place: Path) -> DecoderSession:
    found = DecoderSession(place / "slots", provider="cpu", threads=1)
    for name in ("one", "two"):
        assert found.load_adapter(place / name) == name
    return found


def merged(place: Path, name: str) -> DecoderSession:
    path = place / "plain" if not name else place / f"merged-{name}" / "merged.onnx"
    return DecoderSession(path, provider="cpu", threads=1)


@pytest.mark.parametrize("name", ["", "one", "two"])
def test_whole_sequences_prompts_and_steps(name: str, session: DecoderSession, place: Path) -> None:
    other = merged(place, name)
    assert np.allclose(session.run_logits([PROMPT], adapter=name), other.run_logits([PROMPT]), atol=1e-4)
    mine, theirs = session.begin(1, 32, name), other.begin(1, 32)
    assert np.allclose(mine.prefill([PROMPT]), theirs.prefill([PROMPT]), atol=1e-4)
    for token in (3, 9, 200):
        assert np.allclose(mine.step(token), theirs.step(token), atol=1e-4)


def test_texts_with_different_adapters_run_side_by_side(session: DecoderSession, place: Path) -> None:
    names = ("one", "", "two")
    mine = [session.begin(1, 32, name) for name in names]
    theirs = [merged(place, name).begin(1, 32) for name in names]
    for one, two in zip(mine, theirs, strict=True):
        assert np.allclose(one.prefill([PROMPT]), two.prefill([PROMPT]), atol=1e-4)
    for token in (3, 9):
        for one, two in zip(mine, theirs, strict=True):
            assert np.allclose(one.step(token), two.step(token), atol=1e-4)


def test_a_cache_is_reused_by_the_same_adapter_only(session: DecoderSession, place: Path) -> None:
    generator = Generator(session)
    wanted = {name: Generator(merged(place, name)).generate(PROMPT, _options()).tokens for name in ("", "one", "two")}
    assert wanted[""] != wanted["one"] != wanted["two"], "the adapters say the same"
    for name, reused in (("one", 0), ("one", 6), ("two", 0), ("", 0), ("", 6), ("one", 0)):
        found = generator.generate(PROMPT, _options(adapter=name))
        assert found.tokens == wanted[name]
        assert found.reused_tokens == reused
    # One of the same name that was read anew is another one.
    session.load_adapter(place / "two", "one")
    found = generator.generate(PROMPT, _options(adapter="one"))
    assert (found.tokens, found.reused_tokens) == (wanted["two"], 0)


def test_batches(session: DecoderSession, place: Path) -> None:
    found = Generator(session).generate_batch([PROMPT, PROMPT[::-1]], _options(adapter="one"))
    wanted = Generator(merged(place, "one")).generate_batch([PROMPT, PROMPT[::-1]], _options())
    assert [one.tokens for one in found] == [one.tokens for one in wanted]


def _options(**settings: Any) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=8, ignore_eos=True, **settings)


def test_a_model_takes_adapters_by_name(place: Path) -> None:
    model: Model = load(place / "slots", provider="cpu", threads=1)
    name = model.load_adapter(place / "one", "mine")
    other = Model(merged(place, "one"))
    settings = {"max_new_tokens": 8, "ignore_eos": True}
    assert model.generate(PROMPT, adapter=name, **settings).tokens == other.generate(PROMPT, **settings).tokens
    text = np.random.default_rng(0).integers(3, 200, 40).tolist()
    with_it, without = (model.evaluate(text, context=20, adapter=one).nll for one in (name, None))
    assert with_it == pytest.approx(other.evaluate(text, context=20).nll, abs=1e-5)
    assert with_it != pytest.approx(without, abs=1e-3)
    assert model.session.adapters.default is None


def test_switching_costs_less_than_a_millisecond(session: DecoderSession) -> None:
    generator = Generator(session)

    def median(names: tuple[str, ...]) -> float:
        times = []
        for number in range(61):
            options = GenerationOptions(max_new_tokens=1, adapter=names[number % len(names)])
            # Prompts that share no beginning: what is left is the cost of the switch.
            prompt = [3 + number, *PROMPT]
            started = time.perf_counter()
            generator.generate(prompt, options)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    median(("one", "two"))
    assert median(("one", "two")) - median(("one",)) < 1e-3


def test_unknown_adapters_are_told_before_anything_runs(session: DecoderSession) -> None:
    for call in (
        lambda: Generator(session).generate(PROMPT, _options(adapter="on")),
        lambda: session.begin(1, 8, "on"),
        lambda: Generator(session).generate_batch([PROMPT], _options(adapter="on")),
    ):
        with pytest.raises(OptionError, match="expected the name of a loaded one, got 'on'") as caught:
            call()
        assert caught.value.hint == "did you mean 'one'?"
    with pytest.raises(OptionError, match="expected a name"):
        session.load_adapter("x", "")


def test_a_graph_without_slots_is_told(place: Path) -> None:
    plain = DecoderSession(place / "plain", provider="cpu", threads=1)
    assert plain.adapters.slots == {}
    with pytest.raises(UnsupportedModelError, match="a graph with slots for adapters, found none"):
        plain.load_adapter(place / "one")


def slots_of(session: DecoderSession) -> dict[str, Slot]:
    return find_slots(session.ort)


A, B = "block0.q.lora_A", "block0.q.lora_B"
F32 = np.float32


def _file(arrays: dict[str, np.ndarray]) -> Callable[[Path], None]:
    return lambda path: write_file(path, arrays)


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _cut(path: Path) -> None:
    write_file(path, {A: np.zeros((32, 2), F32), B: np.zeros((2, 32), F32)})
    path.write_bytes(path.read_bytes()[:-200])


def _sizes(path: Path) -> None:
    """Sizes that promise more than the bytes hold."""
    write_file(path, {A: np.zeros((32, 2), F32), B: np.zeros((2, 32), F32)})
    content, sizes = path.read_bytes(), np.array([32, 2], np.int64).tobytes()
    assert sizes in content
    path.write_bytes(content.replace(sizes, np.array([32, 2000], np.int64).tobytes()))


BAD: list[tuple[str, Callable[[Path], None], type[OnnxpressError], str]] = [
    ("missing", lambda _: None, BadModelFileError, "no such file"),
    ("empty", _bytes(b""), BadModelFileError, "found another format"),
    ("a pickle", _bytes(b"\x80\x04K\x01." * 4), BadModelFileError, "found another format"),
    (
        "only a beginning",
        _bytes(b"\x0c\0\0\0TORT" + b"\xff" * 60),
        BadModelFileError,
        "damaged, ONNX Runtime cannot read it: [A-Z]",
    ),
    ("cut", _cut, BadModelFileError, "damaged, ONNX Runtime cannot read it: [A-Z]"),
    ("sizes beyond the bytes", _sizes, BadModelFileError, "damaged, ONNX Runtime cannot read it: [A-Z]"),
    ("no parameters", _file({}), BadModelFileError, "found none"),
    ("another name", _file({"block0.qq.lora_A": np.zeros((32, 2), F32)}), UnsupportedModelError, "'block0.qq.lora_A'"),
    ("no slot", _file({"input_ids": np.zeros((32, 2), F32)}), UnsupportedModelError, "'input_ids'"),
    (
        "another shape",
        _file({A: np.zeros((31, 2), F32)}),
        UnsupportedModelError,
        r"\[32, rank\], found \[31, 2\]",
    ),
    ("turned", _file({B: np.zeros((32, 2), F32)}), UnsupportedModelError, r"expected \[rank, 32\], found \[32, 2\]"),
    ("another type", _file({A: np.zeros((32, 2), np.float16)}), UnsupportedModelError, r"expected tensor\(float\)"),
    ("half", _file({A: np.zeros((32, 2), F32)}), BadModelFileError, "found lora_A of rank 2"),
    (
        "two ranks",
        _file({A: np.zeros((32, 2), F32), B: np.zeros((3, 32), F32)}),
        BadModelFileError,
        "lora_A of rank 2 and lora_B of rank 3",
    ),
    ("NaN", _file({A: np.full((32, 2), np.nan, F32), B: np.zeros((2, 32), F32)}), BadModelFileError, "finite numbers"),
]


@pytest.mark.parametrize("make, kind, text", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_files_are_told(
    make: Callable[[Path], None], kind: type[OnnxpressError], text: str, session: DecoderSession, tmp_path: Path
) -> None:
    path = tmp_path / "bad.onnx_adapter"
    make(path)
    with pytest.raises(kind, match=text) as caught:
        session.load_adapter(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert session.adapters.names == ["one", "two"]


def test_a_directory_without_an_adapter_is_told(session: DecoderSession, tmp_path: Path) -> None:
    with pytest.raises(BadModelFileError, match="found no adapter_config"):
        session.load_adapter(tmp_path)


def test_an_adapter_for_linears_without_a_slot_is_told(session: DecoderSession, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "head", {"lm_head": (259, 32)})
    with pytest.raises(UnsupportedModelError, match=r"lm_head: expected a slot .* none of kind 'head'") as caught:
        session.load_adapter(path)
    assert caught.value.hint == "make them: onnxpress lora slots MODEL --also head"


def test_bfloat16_values_are_of_that_type() -> None:
    import ml_dtypes

    value = value_of(np.ones((2, 3), ml_dtypes.bfloat16))
    assert isinstance(value, ort.OrtValue)
    assert value.data_type() == "tensor(bfloat16)"
