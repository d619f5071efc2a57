"""Arrays that wait in files: results for all matrices together are a model, which memory need not hold."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def on_disk(array: npt.NDArray[Any], folder: Path | None) -> npt.NDArray[Any]:
    """The same array, read-only from a file named after its content.

    Args:
        array: may be one that this function gave: its file is not written over while it is read.
        folder: for the file; None keeps the array as it is.
    """
    if folder is None:
        return array
    path = folder / f"array-{hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:24]}-{array.dtype}.npy"
    if not path.exists():
        np.save(path, array)
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return mapped
