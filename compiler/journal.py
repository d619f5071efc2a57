"""Finished units of long work, kept so that a run that was killed can go on where it stopped.

A section is one piece of long work: a pass with its options, on one model and one text. Its units are files, each
written whole or not at all, with a digest of everything the unit was computed from; one whose digest differs does not
count. The journal is a convenience: when its folder cannot be written, work goes on without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
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
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            self._folder = None


class Journal:
    """All sections below one folder, which is looked at when a section is asked for."""

    def __init__(self, root: Path | Callable[[], Path] | None = None) -> None:
        """Opens the journal at `root`, or where `root` says when it is needed; without one nothing is kept."""
        self._root = root
        self._used: list[Path] = []

    def section(self, *identity: str) -> Section:
        """The section of the work that `identity` describes."""
        if self._root is None:
            return Section()
        try:
            root = self._root() if callable(self._root) else self._root
            _remove_old(root)
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            logger.warning("there is no journal (%s): a run that is killed will begin anew", error)
            return Section()
        folder = root / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
        self._used.append(folder)
        return Section(folder)

    @property
    def is_used(self) -> bool:
        """Whether something is kept for a later run."""
        return any(folder.is_dir() for folder in self._used)

    def clear(self) -> None:
        """Removes the sections that were used: their results have arrived."""
        for folder in self._used:
            shutil.rmtree(folder, ignore_errors=True)
        self._used.clear()


def _remove_old(root: Path) -> None:
    limit = time.time() - _KEPT_SECONDS
    for old in root.iterdir() if root.is_dir() else ():
        try:
            is_old = old.stat().st_mtime < limit
        except OSError:  # another run has just removed it
            continue
        if is_old:
            shutil.rmtree(old, ignore_errors=True)
