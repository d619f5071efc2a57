"""`onnxpress lora` and `--adapter`: what a shell sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapters import write_adapter
from decoders import write_decoder

from onnxpress.compiler.cli import main

SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (64, 32)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    write_decoder(root / "plain")
    write_adapter(root / "mine", SHAPES, lora_alpha=16)
    assert main(["lora", "slots", str(root / "plain"), "-o", str(root / "slots"), "--quiet"]) == 0
    return root


def test_the_way_round(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, merged, found = (str(tmp_path / name) for name in ("mine.onnx_adapter", "merged", "found"))
    assert main(["lora", "convert", str(place / "mine"), str(place / "slots"), "-o", file]) == 0
    assert "2 modules, 2 slots, rank 2" in capsys.readouterr().out
    assert main(["lora", "merge", str(place / "plain"), str(place / "mine"), "-o", merged, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passes"][0]["changed"] == 2
    assert main(["lora", "extract", merged, str(place / "plain"), "-o", found, "--rank", "1"]) == 0
    shown = capsys.readouterr().out
    assert "2 matrices differ" in shown
    assert "model.layers.0.self_attn.q_proj" in shown
    assert main(["lora", "extract", merged, str(place / "plain"), "-o", f"{found}2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] < 1e-5

    texts = []
    for extra in (["--adapter", file], ["--adapter", str(place / "mine")], []):
        command = ["run", str(place / "slots"), "hello", "--max-tokens", "12", "--no-chat", "--json", *extra]
        assert main(command) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert main(["run", merged, "hello", "--max-tokens", "12", "--no-chat", "--json"]) == 0
    assert texts[0] == texts[1] == json.loads(capsys.readouterr().out)["tokens"]
    assert texts[2] != texts[0]


def test_eval_and_bench_take_an_adapter(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--context", "32", "--tokens", "64", "--json"]
    found = []
    for extra in (["--adapter", str(place / "mine")], []):
        assert main(["eval", str(place / "slots"), *numbers, *extra]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[0] != found[1]
    few = ["--prompt-tokens", "4", "--new-tokens", "4", "--rounds", "1", "--json"]
    assert main(["bench", str(place / "slots"), *few, "--adapter", str(place / "mine")]) == 0
    assert json.loads(capsys.readouterr().out)["decode_tokens_per_s"] > 0
    assert main(["bench", str(place / "plain"), *few, "--adapter", str(place / "mine")]) == 2
    assert "a graph with slots for adapters, found none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["lora", "mrge"], "error: there is no command 'lora mrge'\nhint: did you mean 'lora merge'?\n"),
        (["loar"], "hint: did you mean 'lora'?\n"),
        (["lora"], "Usage: onnxpress lora"),
        (["lora", "convert", "x"], "hint: see: onnxpress lora convert --help\n"),
        (["lora", "merge", "x", "y", "-o", "z", "--max-los", "1"], "hint: did you mean '--max-loss'?\n"),
    ],
)
def test_mistakes(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


def test_a_bad_adapter_is_one_line_and_a_hint(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_adapter(tmp_path / "bad", SHAPES, bias="all")
    assert main(["lora", "merge", str(place / "plain"), str(bad), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2
    assert "expected bias 'none', found 'all'" in error
    assert not (tmp_path / "out").exists()
