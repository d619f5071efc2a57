"""The journal of long work: whole records or none, and never those of other work."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from onnxpress.compiler.journal import Journal

UNIT = {"codes": np.arange(6, dtype=np.uint8).reshape(2, 3), "number": np.array(0.25)}


def test_round_trip(tmp_path: Path) -> None:
    Journal(tmp_path).section("gptq", "a").write("0", "digest", UNIT)
    section = Journal(tmp_path).section("gptq", "a")
    found = section.read("0", "digest")
    assert found is not None
    assert found.keys() == UNIT.keys()
    np.testing.assert_array_equal(found["codes"], UNIT["codes"])
    assert found["codes"].dtype == np.uint8
    assert section.read("0", "other digest") is None
    assert section.read("1", "digest") is None
    assert Journal(tmp_path).section("gptq", "b").read("0", "digest") is None


def test_a_damaged_record_does_not_count(tmp_path: Path) -> None:
    section = Journal(tmp_path).section("work")
    section.write("0", "digest", UNIT)
    (record,) = tmp_path.rglob("*.npz")
    whole = record.read_bytes()
    for part in (b"", whole[:40], whole[:-30], b"x" * len(whole)):
        record.write_bytes(part)
        assert section.read("0", "digest") is None


def test_clear_removes_what_was_used(tmp_path: Path) -> None:
    Journal(tmp_path).section("other").write("0", "digest", UNIT)
    journal = Journal(tmp_path)
    journal.section("mine").write("0", "digest", UNIT)
    journal.clear()
    assert Journal(tmp_path).section("mine").read("0", "digest") is None
    assert Journal(tmp_path).section("other").read("0", "digest") is not None


def test_what_nobody_came_back_for_is_removed(tmp_path: Path) -> None:
    Journal(tmp_path).section("old").write("0", "digest", UNIT)
    Journal(tmp_path).section("new").write("0", "digest", UNIT)
    section = Journal(tmp_path).section("old")
    folder = min((one.parent for one in tmp_path.rglob("0.npz")), key=lambda one: one.stat().st_ctime_ns)
    past = time.time() - 8 * 24 * 3600
    os.utime(folder, (past, past))
    Journal(tmp_path).section("any")
    assert section.read("0", "digest") is None
    assert Journal(tmp_path).section("new").read("0", "digest") is not None


def test_work_goes_on_without_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    section = Journal(tmp_path / "file").section("work")
    section.write("0", "digest", UNIT)
    section.write("1", "digest", UNIT)
    assert len(caplog.records) == 1
    assert section.read("0", "digest") is None
    Journal().section("work").write("0", "digest", UNIT)


def test_there_need_be_no_home_directory(caplog: pytest.LogCaptureFixture) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    journal = Journal(nowhere)
    assert not caplog.records
    journal.section("work").write("0", "digest", UNIT)
    assert len(caplog.records) == 1
