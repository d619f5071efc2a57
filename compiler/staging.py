"""Writes a directory beside its final name and renames it when it is complete; cleans up after runs that were killed.

While a run lives it holds a lock on its own staging directory, `.<name>.onnxpress-<pid>-<random>`. So a staging
directory without a lock belongs to a dead run and is removed, and one with a lock means that the output is in use. No
lock file is left behind. Where the kernel can exchange two directories in one step (Linux, `renameat2`), there is no
moment without a complete output; elsewhere the old one is moved aside first, and the next run moves it back if the
process died in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onnxpress.compiler.errors import OutputError

logger = logging.getLogger(__name__)

# A directory with this file in it was written by onnxpress, which may replace it.
MANIFEST = "onnxpress.json"

_WORK = ".work"
_OLD = "-old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@dataclass(frozen=True)
class Stage:
    """A directory under construction.

    Attributes:
        path: becomes the final directory.
        work: scratch folder for intermediate models; removed before the final directory appears.
    """

    path: Path
    work: Path


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Stage]:
    """Yields an empty directory that takes the place of `directory` when the block ends without an exception.

    Args:
        directory: final place; must not exist, be empty, or hold nothing but what onnxpress wrote. Missing parents are
            created. A symbolic link is followed.

    Raises:
        OutputError: `directory` holds files of somebody else, is in use by another run, or cannot be written; the disk
            is full.
    """
    final = Path(os.path.realpath(directory))
    check_replaceable(final, shown=directory)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        stage, lock = _open_stage(final, directory)
    except OSError as error:
        raise _cannot_write(directory, error) from error
    try:
        work = stage / _WORK
        work.mkdir()
        try:
            yield Stage(stage, work)
            shutil.rmtree(work, ignore_errors=True)
            check_replaceable(final, shown=directory)
            _swap(stage, final)
        except OSError as error:
            if _is_full(error) or error.errno == errno.EROFS:
                raise _cannot_write(directory, error) from error
            raise
    finally:
        _remove(stage)
        os.close(lock)


def check_replaceable(final: Path, *, shown: Path | None = None) -> None:
    """Raises OutputError unless `final` is missing, empty, or a directory in which onnxpress wrote every file."""
    shown = shown or final
    if not final.exists():
        return
    if not final.is_dir():
        raise OutputError(f"{shown}: expected a directory, found a file", hint="choose another output directory")
    try:
        names = sorted(entry.name for entry in final.iterdir())
    except OSError as error:
        raise _cannot_write(shown, error) from error
    if not names:
        return
    if MANIFEST not in names:
        raise OutputError(
            f"{shown}: holds files that onnxpress did not write ({_some(names)})",
            hint="choose an empty or new output directory",
        )
    foreign = [name for name in names if name not in _written(final / MANIFEST)]
    if foreign:
        raise OutputError(
            f"{shown}: an artifact, but with files that onnxpress did not write ({_some(foreign)})",
            hint="move them away, or choose another output directory",
        )


def _written(manifest: Path) -> set[str]:
    """The files that a manifest accounts for."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {MANIFEST, *files}
    except (OSError, ValueError, KeyError, TypeError):
        return {MANIFEST}


def _open_stage(final: Path, shown: Path) -> tuple[Path, int]:
    """Clears what dead runs left, then makes and locks a staging directory."""
    with _locked_parent(final.parent):
        _recover(final, shown)
        stage = final.parent / f".{final.name}.onnxpress-{os.getpid()}-{secrets.token_hex(4)}"
        stage.mkdir()
        descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY)
        _try_lock(descriptor)
    return stage, descriptor


@contextlib.contextmanager
def _locked_parent(parent: Path) -> Iterator[None]:
    """One run at a time looks for leftovers; held for milliseconds."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: the check for living runs is lost, no more
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _recover(final: Path, shown: Path) -> None:
    """Removes staging directories of dead runs; an old output that was moved aside and never replaced comes back."""
    pattern = re.compile(re.escape(f".{final.name}.onnxpress-") + r"(\d+)-[0-9a-f]{8}(-old)?")
    for entry in sorted(final.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or not entry.is_dir() or entry.is_symlink():
            continue
        descriptor = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not _try_lock(descriptor):
                raise OutputError(
                    f"{shown}: in use by another run of onnxpress (process {match[1]})",
                    hint="wait for it, or choose another output directory",
                )
            if match[2] and not final.exists():
                logger.warning("%s: restored after an interrupted run", shown)
                os.rename(entry, final)
            else:
                logger.info("removing %s, left by an interrupted run", entry)
                _remove(entry)
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether the directory is ours now; a file system that knows no locks counts as ours."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _BUSY
    return True


def _swap(stage: Path, final: Path) -> None:
    """Lets `stage` become `final`; what was there before is removed."""
    if not final.exists() or not any(final.iterdir()):
        os.rename(stage, final)  # an empty directory is replaced in one step
        return
    if _exchange(stage, final):
        return  # the old output is now the staging directory, which the caller removes
    backup = stage.with_name(stage.name + _OLD)
    os.rename(final, backup)
    os.rename(stage, final)
    _remove(backup)


def _exchange(one: Path, two: Path) -> bool:
    """Exchanges two directories in one step; False where the kernel or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    code: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), ctypes.c_uint(_RENAME_EXCHANGE))
    return code == 0


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _is_full(error: OSError) -> bool:
    """Whether a write found no room; numpy reports a short write without an error number, only in words."""
    return error.errno in _FULL or (
        error.errno is None and re.search(r"\d+ requested and \d+ written", str(error)) is not None
    )


def _cannot_write(directory: Path, error: OSError) -> OutputError:
    if _is_full(error):
        return OutputError(f"{directory}: the disk is full", hint=f"free space on the file system of {directory}")
    reason = error.strerror or type(error).__name__
    return OutputError(f"{directory}: cannot be written: {reason}", hint="choose another output directory")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
