"""Huge pages: contents stay, and where they are not to be had nothing happens."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnxpress.runtime import pages


def test_contents_stay() -> None:
    array = np.random.default_rng(0).integers(0, 256, 24 << 20, dtype=np.uint8)
    address, sum_ = array.ctypes.data, int(array.sum())
    moved = pages.use_huge_pages()
    assert moved % (2 << 20) == 0
    assert array.ctypes.data == address
    assert int(array.sum()) == sum_


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_large_arrays_are_seen_and_files_are_not(tmp_path: Path) -> None:
    array = np.ones(24 << 20, np.uint8)
    (tmp_path / "file").write_bytes(b"x" * (4 << 20))
    mapped = np.memmap(tmp_path / "file", mode="r+")
    found = list(pages._private_memory())
    assert any(start <= array.ctypes.data < end for start, end in found)
    assert not any(start <= mapped.ctypes.data < end for start, end in found)


@pytest.mark.parametrize("setting", ["always madvise [never]", None])
def test_switched_off_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None) -> None:
    file = tmp_path / "enabled"
    if setting is not None:
        file.write_text(setting)
    monkeypatch.setattr(pages, "_SETTING", file)
    assert pages.use_huge_pages() == 0
