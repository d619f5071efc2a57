"""Finished units of long work, kept so that a run that was killed can go on where it stopped.

A section is one piece of long work: a pass with its options, on one model and one text. Its units are files, each
written whole or not at all, with a digest of everything the unit was computed from; one whose digest differs does not
count. The journal is a convenience: when its folder cannot be written, work goes on without it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

_DIGEST = "digest"
_KEPT_SECONDS = 7 * 24 * 3600.0  # what nobody came back for


class Section:
    """The finished units of one piece of work; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        """Opens `folder`, which is made with the first unit."""
        self._folder = folder

    def read(self, unit: str, digest: str) -> dict[str, Array] | None:
        """What `write` was given for this unit and digest, None when there is no such record.

        Args:
            unit: a name without slashes.
            digest: of what the unit is computed from.
        """
        if self._folder is None:
            return None
        try:
            with np.load(self._folder / f"{unit}.npz", allow_pickle=False) as record:
                if str(record[_DIGEST]) != digest:
                    return None
                return {name: record[name] for name in record.files if name != _DIGEST}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # as numpy finds damage
            return None

    def write(self, unit: str, digest: str, arrays: Mapping[str, Array]) -> None:
        """Keeps the results of a unit; a folder that cannot be written is not tried again."""
        if self._folder is None:
            return
        draft = self._folder / f".{unit}-{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                np.savez(file, **{_DIGEST: np.array(digest)}, **arrays)  # type: ignore[arg-type]
            os.replace(draft, self._folder / f"{unit}.npz")
        except OSError as error:
            logger.warning("the journal cannot be written (%s): a run that is killed will begin anew", error)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class Journal:
    """All sections below one folder."""

    def __init__(self, root: Path | None = None) -> None:
        """Opens the journal at `root`; without one nothing is kept."""
        self._root = root
        self._used: list[Path] = []
        if root is not None and root.is_dir():
            limit = time.time() - _KEPT_SECONDS
            for old in root.iterdir():
                if old.stat().st_mtime < limit:
                    shutil.rmtree(old, ignore_errors=True)

    def section(self, *identity: str) -> Section:
        """The section of the work that `identity` describes."""
        if self._root is None:
            return Section()
        folder = self._root / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
        self._used.append(folder)
        return Section(folder)

    def clear(self) -> None:
        """Removes the sections that were used: their results have arrived."""
        for folder in self._used:
            shutil.rmtree(folder, ignore_errors=True)
        self._used.clear()
