"""Arrays in files: the same numbers, whatever they were read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxpress.compiler.mapped import on_disk


def test_law_an_array_comes_back_also_from_its_own_file(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
    first = on_disk(array, tmp_path)
    assert isinstance(first, np.memmap)
    again = on_disk(first, tmp_path)
    np.testing.assert_array_equal(again, array)
    np.testing.assert_array_equal(first, array)
    assert len(list(tmp_path.iterdir())) == 1
    assert on_disk(array, None) is array
