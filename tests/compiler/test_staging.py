"""The output directory appears whole or not at all, whatever happens to the run that writes it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from decoders import write_decoder

from onnxpress.compiler import staging
from onnxpress.compiler.errors import OutputError
from onnxpress.compiler.staging import MANIFEST, staged


def fill(directory: Path, mark: str) -> None:
    (directory / "model.onnx").write_text(mark)
    (directory / MANIFEST).write_text(json.dumps({"files": {"model.onnx": {}}}))


def write(directory: Path, mark: str) -> None:
    with staged(directory) as stage:
        (stage.work / "scratch").write_text("gone afterwards")
        fill(stage.path, mark)


def siblings(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.parent.iterdir())


def test_writes_a_new_directory_and_replaces_its_own(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out, "one")
    assert sorted(entry.name for entry in out.iterdir()) == ["model.onnx", MANIFEST]
    write(out, "two")
    assert (out / "model.onnx").read_text() == "two"
    assert siblings(out) == ["out"]


def test_replaces_without_an_exchange_of_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda one, two: False)
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "model.onnx").read_text() == "two"
    assert siblings(tmp_path / "out") == ["out"]


def test_an_empty_directory_and_a_link_to_one_are_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "model.onnx").read_text() == "one"


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failed_run_leaves_the_old_output_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    out = tmp_path / "out"
    write(out, "old")

    def run() -> None:
        with staged(out) as stage:
            fill(stage.path, "new")
            raise failure

    with pytest.raises(type(failure)):
        run()
    assert (out / "model.onnx").read_text() == "old"
    assert siblings(out) == ["out"]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="disk is full"), staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_short_write_of_an_array_is_a_full_disk(tmp_path: Path) -> None:
    # numpy gives no error number for it, only a sentence.
    with (
        pytest.raises(OutputError, match="disk is full"),
        staged(tmp_path / "out"),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        np.zeros(1 << 20).tofile(full)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out"):
        raise FileNotFoundError("the source went away")


@pytest.mark.parametrize("add", ["beside an artifact", "alone"])
def test_files_of_others_are_never_destroyed(tmp_path: Path, add: str) -> None:
    out = tmp_path / "out"
    if add == "alone":
        out.mkdir()
    else:
        write(out, "old")
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"thesis\.txt") as caught:
        write(out, "new")
    assert caught.value.hint
    assert (out / "thesis.txt").read_text() == "years of work"
    assert siblings(out) == ["out"]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="found a file"):
        write(tmp_path / "out", "new")


def test_a_directory_that_another_run_writes_is_in_use(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as stage:
        fill(stage.path, "first")
        with pytest.raises(OutputError, match="in use"):
            write(out, "second")
    assert (out / "model.onnx").read_text() == "first"


def test_leftovers_of_dead_runs_are_removed_and_only_those(tmp_path: Path) -> None:
    dead, foreign = tmp_path / ".out.onnxpress-123-0123abcd", tmp_path / ".other.onnxpress-123-0123abcd"
    for directory in (dead, foreign):
        directory.mkdir()
        (directory / "model.onnx").write_text("half")
    write(tmp_path / "out", "new")
    assert siblings(tmp_path / "out") == [foreign.name, "out"]


def test_an_output_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    out.rename(tmp_path / ".out.onnxpress-123-0123abcd-old")
    with pytest.raises(RuntimeError), staged(out):
        raise RuntimeError
    assert (out / "model.onnx").read_text() == "old"


def test_killed_at_random_moments_the_old_output_stays_whole(tmp_path: Path) -> None:
    """Real runs of the command line, killed without a chance to clean up."""
    source, out = write_decoder(tmp_path / "source"), tmp_path / "out"
    command = [sys.executable, "-m", "onnxpress", "optimize", str(source), "-o", str(out), "--passes", "rtn(bits=4)"]
    start = time.monotonic()
    subprocess.run([*command, "--quiet"], check=True)
    duration = time.monotonic() - start
    dice = random.Random(0)
    for _ in range(6):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        process = subprocess.Popen([*command, "--quiet"])
        time.sleep(dice.uniform(0.4, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = {path.name: path.read_bytes() for path in out.iterdir()}
        card = json.loads(after[MANIFEST])
        assert {MANIFEST, *card["files"]} == set(after)
        if after != before:  # it was killed after the swap
            assert after["model.onnx.data"] == before["model.onnx.data"]
    subprocess.run([*command, "--quiet"], check=True)
    assert siblings(out) == ["out", "source"]


def test_reads_from_the_directory_it_replaces(tmp_path: Path) -> None:
    from onnxpress.compiler.optimize import optimize

    out = write_decoder(tmp_path / "out")
    optimize(out, output=tmp_path / "first", passes="rtn(bits=8)", measure=False)
    shutil.rmtree(out)
    again = optimize(tmp_path / "first", output=tmp_path / "first", passes="", measure=False)
    assert again.report["history"] == ["rtn(bits=8)"]
    assert again.report["source"]["kind"] == "artifact"
    assert siblings(tmp_path / "first") == ["first"]
