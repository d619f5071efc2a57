"""Verbs, JSON, exit codes: what people and programs meet."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from decoders import write_decoder
from rich.console import Console

from onnxpress.compiler import registry
from onnxpress.compiler.cli import main
from onnxpress.compiler.cli.optimize import show_card

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("inspect", path)`: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(scope="module")
def artifact(source: Path) -> Path:
    out = source.parent / "out"
    assert main(["optimize", str(source), "-o", str(out), "--passes", "rtn(bits=8)", "--quiet"]) == 0
    return out


def facts(result: tuple[int, str, str]) -> Any:
    code, out, err = result
    assert code == 0, err
    assert err == ""
    return json.loads(out)


def test_optimize_prints_the_card(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("optimize", source, "-o", tmp_path / "out", "--passes", "rtn(bits=4)", "--verify")
    assert (code, err) == (0, "")
    for word in ("rtn", "lossy", "KL divergence", "of it weights", "28 nodes", str(tmp_path / "out")):
        assert word in out


def test_optimize_json_is_the_card_and_nothing_else(run: Run, source: Path, tmp_path: Path) -> None:
    card = facts(run("optimize", source, "-o", tmp_path / "out", "--passes", "rtn(bits=4)", "--json"))
    assert card["directory"] == str(tmp_path / "out")
    assert card["passes"][0]["pass"] == "rtn"


def test_quiet_says_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    assert run("optimize", source, "-o", tmp_path / "out", "--passes", "rtn", "-q", "--no-measure") == (0, "", "")


def test_export_keeps_the_graph(run: Run, source: Path, tmp_path: Path) -> None:
    found = facts(run("export", source, "-o", tmp_path / "out", "--json"))
    assert found["size"]["nodes_before"] == found["size"]["nodes_after"]
    assert found["pipeline"] == ""


def test_inspect(run: Run, artifact: Path) -> None:
    found = facts(run("inspect", artifact, "--json"))
    assert {"nodes", "operators", "parameters", "bytes", "blocks"} <= found.keys()
    assert found["provenance"]["onnxpress.pipeline"] == found["provenance"]["artifact"]["pipeline"]
    code, out, _ = run("inspect", artifact, "--blocks", "--placement", "cpu")
    assert code == 0
    assert "on CPUExecutionProvider: " in out
    assert "LlamaForCausalLM" in out


def test_inspect_ledger(run: Run, artifact: Path, source: Path) -> None:
    found = facts(run("inspect", artifact, "--ledger", "--json"))
    shares = [row["share"] for row in found["rows"]]
    assert shares == sorted(shares, reverse=True)
    assert {"site", "snr_db", "weight_error", "output_error", "activation_error", "share"} <= found["rows"][0].keys()
    code, out, _ = run("inspect", artifact, "--ledger")
    assert code == 0
    assert out.index(found["rows"][0]["site"]) < out.index(found["rows"][-1]["site"])
    assert "not of the KL" in out
    code, _, err = run("inspect", source, "--ledger")
    assert code == 2
    assert "hint: write one" in err
    code, _, err = run("inspect", artifact, "--ledger", "--blocks")
    assert code == 2
    assert "--ledger" in err


def test_eval_with_a_reference(run: Run, artifact: Path, source: Path, tmp_path: Path) -> None:
    found = facts(run("eval", artifact, "--context", 32, "--tokens", 96, "--json"))
    assert found["tokens"] == 96
    assert found["context"] == 32
    assert found["perplexity"] > 1
    assert "kl" not in found
    (tmp_path / "wiki.txt").write_text("A well @-@ known text , with 1 @,@ 000 words . \n" * 9)
    found = facts(
        run("eval", artifact, "--reference", source, "--text", tmp_path / "wiki.txt", "--context", 32, "--json")
    )
    assert found["detokenized"] is True
    assert 0 <= found["kl"] < 0.1
    assert 0 < found["top1_agreement"] <= 1
    code, out, _ = run("eval", artifact, "--reference", source, "--context", 32, "--tokens", 96)
    assert code == 0
    assert "worst tokens" in out


def test_bench(run: Run, artifact: Path) -> None:
    found = facts(run("bench", artifact, "--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1, "--json"))
    keys = ("load_s", "time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes")
    for key in keys:
        assert found[key] > 0, key
    code, out, _ = run("bench", artifact, "--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1)
    assert code == 0
    assert "tokens per second" in out


def test_run_streams_and_is_repeatable(run: Run, artifact: Path) -> None:
    one = run("run", artifact, "hello", "--max-tokens", 6, "--temperature", 1, "--seed", 3)
    assert one == run("run", artifact, "hello", "--max-tokens", 6, "--temperature", 1, "--seed", 3)
    assert one[0] == 0
    found = facts(run("run", artifact, "hello", "--max-tokens", 6, "--json"))
    assert len(found["tokens"]) <= 6
    assert found["finish_reason"] in ("length", "eos")


def test_run_chats_and_forgets(run: Run, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["hello", "", "/reset", "again", "/exit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    code, out, err = run("run", artifact, "--max-tokens", 3)
    assert code == 0, err
    assert out.count("\n") >= 2


def test_passes_lists_every_pass_by_family(run: Run) -> None:
    found = facts(run("passes", "--json"))
    assert sorted(row["name"] for rows in found.values() for row in rows) == registry.names()
    assert all(row["summary"].endswith(".") for rows in found.values() for row in rows)
    assert "quantization" in run("passes")[1]


@pytest.mark.parametrize("name", registry.names())
def test_explain(run: Run, name: str) -> None:
    found = facts(run("explain", name, "--json"))
    code, out, _ = run("explain", name)
    assert code == 0
    assert f"promise: {found['promise']}" in out
    for option in found["options"]:
        assert option["name"] in out
        assert option["help"], f"{option['name']}: say in a comment what it means"


def test_recipes_and_their_explanation(run: Run) -> None:
    for row in facts(run("recipes", "--json")):
        assert facts(run("explain", row["name"], "--json")) == row if row["name"] not in registry.names() else True
    assert "float16" in run("recipes", "--target", "cuda")[1]


def test_doctor(run: Run) -> None:
    found = facts(run("doctor", "--json"))
    assert found["versions"]["onnxpress"]
    assert isinstance(found["cuda_usable"], bool)
    assert found["cuda_reason"]
    assert found["cpu_kernels"]["MatMulNBits, 4 bits"] == "yes"
    assert "memory bandwidth" in run("doctor")[1]


BAD = [
    (["optimize", "{source}", "-o", "{out}", "--passes", " "], "expected the name of a pass, got nothing"),
    (
        ["optimize", "{source}", "-o", "{out}", "--passes", "rtn(overrides={{'head': {{'scales': 'x'}}}})"],
        "overrides, head: scales must be max or mse, got 'x'",
    ),
    (["eval", "nowhere.onnx"], "onnxpress export"),
    (["optimise"], "did you mean 'optimize'?"),
    (["optimize", "{source}", "-o", "{out}", "--recip", "int4"], "did you mean '--recipe'?"),
    (["optimize", "{source}", "-o", "{out}", "--recipe", "int5"], "did you mean"),
    (["optimize", "{source}", "-o", "{out}", "--passes", "rtm(bits=4)"], "did you mean 'rtn'?"),
    (["optimize", "{source}", "-o", "{out}", "--passes", "rtn(bitz=4)"], "did you mean 'bits'?"),
    (["optimize", "{source}", "-o", "{out}", "--passes", "rtn(bits=5)"], "bits"),
    (["optimize", "{source}", "-o", "{out}", "--passes", "rtn("], "write: fuse"),
    (["optimize", "{source}", "-o", "{out}", "--target", "cudda"], "did you mean 'cuda'?"),
    (["optimize", "{source}", "-o", "{out}", "--calibration", "{source}/none.txt"], "give a text file"),
    (["optimize", "{source}", "-o", "{out}", "--keep-quantization"], "expected a GGUF file, {source} is an ONNX graph"),
    (["optimize", "{source}", "--passes", "rtn"], "see: onnxpress optimize --help"),
    (["optimize", "{out}/missing", "-o", "{out}"], "hint:"),
    (["optimize", "smollm2-135", "-o", "{out}"], "did you mean 'smollm2-135m'?"),
    (["optimize", "{source}/config.json", "-o", "{out}"], "hint:"),
    (["optimize", "{source}", "-o", "{source}"], "choose an empty or new output directory"),
    (["inspect", "{source}/tokenizer.json"], "hint:"),
    (["eval", "{source}", "--text", "{source}/none.txt"], "give a text file"),
    (["eval", "{out}/missing"], "missing"),
    (["run", "{source}", "hi", "--top-p", "7"], "top_p"),
    (["explain", "rtm"], "did you mean 'rtn'?"),
]


@pytest.mark.parametrize("arguments, expected", BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_a_hint(
    run: Run, source: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    before = sorted(path.name for path in source.iterdir())
    out = tmp_path / "out"
    code, stdout, stderr = run(*(one.format(source=source, out=out) for one in arguments))
    assert code == 2, stderr
    assert stdout == ""
    lines = stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert expected.replace("{source}", str(source)) in stderr
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.name for path in source.iterdir()) == before


def test_ctrl_c_leaves_nothing(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxpress.compiler.optimize.write_graph", interrupted)
    code, out, err = run("optimize", source, "-o", tmp_path / "out", "--passes", "rtn")
    assert (code, out, err) == (130, "", "error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxpress.compiler.optimize.write_graph", full)
    code, _, err = run("optimize", source, "-o", tmp_path / "out", "--passes", "rtn")
    assert code == 2
    assert "the disk is full" in err
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_a_short_message_and_a_traceback_only_with_debug(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("onnxpress.compiler.optimize.write_graph", broken)
    arguments = ("optimize", source, "-o", tmp_path / "out", "--passes", "rtn")
    code, _, err = run(*arguments)
    assert code == 1
    assert "ZeroDivisionError: oops" in err
    assert "Traceback" not in err
    assert "Traceback" in run(*arguments, "--debug")[2]


def test_a_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "onnxpress", "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_version_and_help(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("onnxpress 0.")
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("export", "optimize", "inspect", "eval", "bench", "run", "passes", "explain", "recipes", "doctor"):
        assert f"  {verb} " in out
        assert run(verb, "--help")[0] == 0


def test_help_is_quick_and_heavy_packages_stay_out() -> None:
    code = (
        "import sys; from onnxpress.compiler.cli import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnxruntime', 'numpy', 'onnx_ir')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_leaves_early_is_no_error(source: Path) -> None:
    for options in ("--json", "--blocks"):
        command = f"'{sys.executable}' -m onnxpress inspect '{source}' {options} | head -c 1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.stderr == ""


def test_an_encoder_shows_its_cosine_instead_of_a_perplexity() -> None:
    def shown(metrics: dict[str, float], quality: dict[str, Any]) -> str:
        row = {"pass": "rtn(bits=8)", "promise": "lossy", "changed": 1, "skipped": [], "seconds": 0.1, "bytes_after": 1}
        size = {"bytes_before": 2, "bytes_after": 1, "nodes_before": 2, "nodes_after": 1}
        console = Console(width=400, record=True, file=io.StringIO())
        show_card(console, {"name": "m", "passes": [{**row, "metrics": metrics}], "size": size, "quality": quality})
        return console.export_text()

    near = {"cosine_similarity": 0.998765, "output_error": 0.05}
    text = shown(near, {**near, "measured_on": "random inputs"})
    assert re.search(r"weights\s+cosine", text)
    assert text.count("0.99877") == 2  # in the row of the pass and below the table
    assert "cosine similarity of outputs 0.99877, relative output error 5.00e-02 (on random inputs)" in text
    loss = {"kl": 0.01, "top1_agreement": 0.9}
    text = shown({**loss, "kl_added": 0.01}, {**loss, "measured_on": "text"})
    assert "KL added" in text
    assert "cosine" not in text
