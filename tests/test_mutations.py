"""The list of benchmarks/mutations.py fits the code, and covers every fusion rule; running it is another matter."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import mutations  # noqa: E402

LEAST = 3
GUARDS = [*sorted((ROOT / "passes" / "fusion").glob("[!_]*.py")), *(ROOT / "compiler").glob("fusing.py")]
SILENT = {"DROPPED SCALE", "DROPPED WINDOW", "IGNORED MASK", "WRONG LENGTHS"}


def test_every_old_text_occurs_once_and_is_changed() -> None:
    for one in mutations.mutations():
        assert one.obstacle() is None
        assert one.old != one.new
        assert all((ROOT / test).is_file() for test in one.tests), one


def test_a_text_that_rots_is_told(tmp_path: Path) -> None:
    one = mutations.Mutation("twice", "file.py", "x = 1", "x = 2", ())
    for text, count in (("", 0), ("x = 1\nx = 1\n", 2)):
        (tmp_path / "file.py").write_text(text)
        assert one.obstacle(tmp_path) == f"file.py: twice: the old text occurs {count} times, expected 1"
    (tmp_path / "file.py").write_text("x = 1\n")
    assert one.obstacle(tmp_path) is None


@pytest.mark.parametrize("path", GUARDS, ids=lambda path: path.stem)
def test_every_rule_is_broken_in_several_ways(path: Path) -> None:
    assert Counter(one.file for one in mutations.mutations())[str(path.relative_to(ROOT))] >= LEAST


def test_names_are_unique_and_the_silent_errors_of_others_are_among_them() -> None:
    names = Counter((one.file, one.name) for one in mutations.mutations())
    assert set(names.values()) == {1}
    assert {name for file, name in names if file == "passes/fusion/fuse_attention.py"} >= SILENT
