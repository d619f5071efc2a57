"""PEFT directories: what is read, and one clear error for each way in which one can be bad."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from adapters import PREFIX, factors, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.compiler import safetensors_file
from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError, UserError
from onnxpress.compiler.peft import Update, is_peft, read_peft, write_peft

Q = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


@pytest.mark.parametrize(
    "config, scale",
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"q_proj": 8}}, 4.0),
        ({"lora_alpha": 6, "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 8}}, 4.0),
        ({"lora_alpha": 6, "alpha_pattern": {"proj": 8}}, 3.0),  # no whole part of the path
        ({"lora_alpha": 6, "rank_pattern": {"k_proj": 7}}, 3.0),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {Q: 2}}, 3.0),
    ],
)
def test_scale_is_in_b(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    a, b = factors((8, 6))
    found = read_peft(write_adapter(tmp_path, {Q: (a, b)}, **config)).updates[Q]
    assert (found.rank, found.shape, found.is_table) == (2, (8, 6), False)
    assert np.allclose(found.delta(), scale * b @ a, atol=1e-6)
    assert np.allclose(found.delta(np.array([3, 1])), scale * (b @ a)[[3, 1]], atol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F64"])
def test_other_float_types(kind: str, tmp_path: Path) -> None:
    dtype: Any = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}[kind]
    a, b = factors((8, 6))
    directory = write_adapter(tmp_path, {Q: (a, b)})
    raw = [array.astype(dtype).tobytes() for array in (a, b)]
    header, offset = {}, 0
    for name, array, data in zip((A, B), (a, b), raw, strict=True):
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    _write(directory, header, b"".join(raw))
    assert np.allclose(read_peft(directory).updates[Q].a_RK, a.astype(dtype).astype(np.float32))


def test_tables_magnitudes_and_copies_of_the_base(tmp_path: Path) -> None:
    table = f"{PREFIX}model.embed_tokens"
    a, b = factors((4, 10))
    arrays = {f"{table}.lora_embedding_A": a, f"{table}.lora_embedding_B": b}
    arrays |= {f"{table}.base_layer.weight": np.ones((10, 4), np.float32)}
    arrays |= {f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(8, np.float32)}
    found = read_peft(write_adapter(tmp_path, {Q: (8, 6)}, arrays=arrays)).updates
    assert found["model.embed_tokens"].is_table
    assert found["model.embed_tokens"].shape == (4, 10)
    assert found[Q].magnitude_N is not None
    assert set(found) == {Q, "model.embed_tokens"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    updates = [
        Update(Q, *factors((8, 6))),
        Update("lm_head", *factors((10, 6), rank=1)),
        Update("wte", *factors((6, 10)), is_table=True),
    ]
    write_peft(tmp_path, updates, base="some/model", rank=2)
    found = read_peft(tmp_path)
    assert (found.base, found.rank) == ("some/model", 2)
    for one in updates:
        assert np.array_equal(found.updates[one.module].delta(), one.delta())
        assert found.updates[one.module].is_table == one.is_table
    assert is_peft(tmp_path)
    assert not is_peft(tmp_path.parent)


def test_law_the_digest_sees_weights_and_settings(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", {Q: (8, 6)})
    same = write_adapter(tmp_path / "same", {Q: (8, 6)})
    other = write_adapter(tmp_path / "other", {Q: (8, 6)}, lora_alpha=4)
    third = write_adapter(tmp_path / "third", {Q: factors((8, 6), seed=9)})
    digests = [read_peft(path).digest for path in (one, same, other, third)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def _write(directory: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        write_adapter(directory, {Q: (8, 6)}, **changes)

    return change


def _arrays(*pairs: tuple[str, np.ndarray]) -> Callable[[Path], None]:
    return lambda directory: write_adapter(directory, {}, arrays=dict(pairs)) and None


def _raw(header: Any, data: bytes = b"") -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        write_adapter(directory, {Q: (8, 6)})
        _write(directory, header, data)

    return change


def _pickle(directory: Path) -> None:
    write_adapter(directory, {Q: (8, 6)})
    (directory / "adapter_model.safetensors").unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb()))


def _long(directory: Path) -> None:
    write_adapter(directory, {Q: (8, 6)})
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 62))


class _Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


def _text(name: str, text: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        write_adapter(directory, {Q: (8, 6)})
        (directory / name).write_text(text)

    return change


def _gone(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        write_adapter(directory, {Q: (8, 6)})
        (directory / name).unlink()

    return change


PLAIN_A, PLAIN_B = factors((8, 6))
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
BAD: list[tuple[str, Callable[[Path], Any], type[UserError], str]] = [
    ("no config", _gone("adapter_config.json"), BadModelFileError, "found no adapter_config.json"),
    ("no weights", _gone("adapter_model.safetensors"), BadModelFileError, "expected adapter_model.safetensors"),
    ("pickle", _pickle, UnsupportedModelError, "a pickle, which can run code"),
    ("config is no JSON", _text("adapter_config.json", "{r: 2"), BadModelFileError, "expected JSON"),
    ("config is a list", _text("adapter_config.json", "[]"), BadModelFileError, "expected a JSON object, found list"),
    ("deep JSON", _text("adapter_config.json", "[" * 100_000), BadModelFileError, "expected JSON"),
    ("large config", _text("adapter_config.json", " " * (1 << 21)), BadModelFileError, "expected at most"),
    ("another method", _config(peft_type="IA3"), UnsupportedModelError, "expected peft_type 'LORA', found 'IA3'"),
    ("biases", _config(bias="all"), UnsupportedModelError, "expected bias 'none', found 'all'"),
    ("whole modules", _config(modules_to_save=["lm_head"]), UnsupportedModelError, "modules_to_save"),
    ("biases of its own", _config(lora_bias=True), UnsupportedModelError, "lora_bias"),
    ("base changed", _config(init_lora_weights="pissa_niter_4"), UnsupportedModelError, "changed the base weights"),
    ("rank is a word", _config(r="two"), BadModelFileError, "expected r of at least 1, found 'two'"),
    ("another rank", _config(r=3), BadModelFileError, r"expected rank 3 .* lora_A \[2, 6\] and lora_B \[8, 2\]"),
    ("alpha is a word", _config(lora_alpha="big"), BadModelFileError, "expected a number as lora_alpha, found 'big'"),
    ("alpha is infinite", _config(lora_alpha=float("inf")), BadModelFileError, "expected a number as lora_alpha"),
    ("patterns are a list", _config(rank_pattern=["q"]), BadModelFileError, "expected rank_pattern as an object"),
    ("a slow pattern", _config(alpha_pattern={"(a+)+b": 1}), UnsupportedModelError, "simple patterns"),
    ("no pattern", _config(alpha_pattern={"[q": 1}), UnsupportedModelError, "expected a pattern"),
    ("no magnitudes", _config(use_dora=True), BadModelFileError, "expected a magnitude vector"),
    ("no arrays", _arrays(), BadModelFileError, "found no arrays"),
    ("no lora_B", _arrays((A, PLAIN_A)), BadModelFileError, "found no lora_B"),
    ("a strange key", _arrays((f"{PREFIX}{Q}.weight", PLAIN_A)), BadModelFileError, "expected keys as"),
    ("flat", _arrays((A, PLAIN_A[0]), (B, PLAIN_B)), UnsupportedModelError, "expected matrices"),
    ("two names", _arrays((A, PLAIN_A), (A[len(PREFIX):], PLAIN_A)), BadModelFileError, "found two"),
    ("NaN", _arrays((A, PLAIN_A * np.nan), (B, PLAIN_B)), BadModelFileError, "expected finite numbers"),
    ("empty", _raw(b""), BadModelFileError, "expected a header"),
    ("a long header", _long, BadModelFileError, "expected a header within its 8 bytes"),
    ("no JSON", _raw(b"{"), BadModelFileError, "expected a header of JSON"),
    ("deep header", _raw(b"[" * 100_000), BadModelFileError, "expected a header of JSON"),
    ("a list", _raw([]), BadModelFileError, "a header that is a JSON object"),
    ("no type", _raw({A: {}}), BadModelFileError, "expected a known type"),
    ("integers", _raw({A: {**ENTRY, "dtype": "I32"}}, b" " * 24), BadModelFileError, "in a float type, found int32"),
    ("negative", _raw({A: {**ENTRY, "shape": [-2, -3]}}, b" " * 24), BadModelFileError, "as whole numbers"),
    ("beyond the end", _raw({A: ENTRY}, b" " * 20), BadModelFileError, "24 bytes .* among 20"),
    ("another size", _raw({A: {**ENTRY, "shape": [2, 4]}}, b" " * 24), BadModelFileError, "32 bytes"),
    ("shared bytes", _raw({A: ENTRY, B: ENTRY}, b" " * 24), BadModelFileError, "in the same bytes"),
]  # fmt: skip


@pytest.mark.parametrize("make, kind, text", [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_ones_are_told(make: Callable[[Path], Any], kind: type[UserError], text: str, tmp_path: Path) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    make(directory)
    with pytest.raises(kind, match=text) as caught:
        read_peft(directory)
    assert "\n" not in caught.value.message
    assert str(directory) in caught.value.message or "adapter_config.json" in caught.value.message


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadModelFileError, match="no such directory"):
        read_peft(tmp_path / "gone")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_law_damaged_files_are_told_or_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("damaged") / "adapter_model.safetensors"
    safetensors_file.write(path, {A: PLAIN_A, B: PLAIN_B})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = safetensors_file.read(path)
    except BadModelFileError:
        return
    assert all(isinstance(array.tobytes(), bytes) for array in found.values())
