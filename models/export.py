"""Runs an export apart from this process, so that torch and its copies of the weights never count as ours.

An exporter holds the weights three or four times over and imports torch, transformers and optimum; a child process
gives all of it back when it ends, keeps their noise away from the terminal, and cannot take the caller down with it.
`run` starts the child; `exporters.perform` is the work itself.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from onnxpress.compiler import errors
from onnxpress.compiler.errors import OnnxpressError, OptionError, UserError

logger = logging.getLogger(__name__)

Exporter = Literal["optimum", "dynamo"]
EXPORTERS: tuple[Exporter, ...] = ("optimum", "dynamo")
INSTALL_OPTIMUM = "pip install '.[optimum]' in the repository"

_RESULT, _LOG = "result.json", "export.log"
_NO_ROOM = 1 << 20  # bytes of free space below which a failed export is taken to have lacked room


@dataclass(frozen=True)
class Job:
    """An export: what is read, and where `model.onnx` with its configs and tokenizer files goes.

    Attributes:
        kind: "huggingface" (source is a directory) or "gguf" (source is a file).
        source: what is read.
        out: an empty directory.
        exporter: "optimum" or "dynamo".
        opset: `ai.onnx` opset of the graph.
        attention: "eager" or "sdpa", as transformers calls them; None for what suits the exporter.
    """

    kind: Literal["huggingface", "gguf"]
    source: str
    out: str
    exporter: Exporter
    opset: int
    attention: Literal["eager", "sdpa"] | None = None


def has_optimum() -> bool:
    """Whether optimum's exporter is installed; it is asked for by name, since importing it takes seconds."""
    try:
        return bool(importlib.metadata.version("optimum-onnx"))
    except importlib.metadata.PackageNotFoundError:
        return False


def choose(exporter: Exporter | None) -> tuple[Exporter, str]:
    """(exporter, why) of an export: the one asked for, else optimum where it is installed, else dynamo.

    The reason is empty unless dynamo stands in for optimum; the user is told.

    Raises:
        OptionError: optimum was asked for and is not installed.
    """
    if exporter is None:
        return ("optimum", "") if has_optimum() else ("dynamo", "optimum is not installed")
    if exporter == "optimum" and not has_optimum():
        raise OptionError(
            "exporter 'optimum' needs optimum-onnx, which is not installed",
            hint=f"{INSTALL_OPTIMUM}, or exporter 'dynamo'",
        )
    return exporter, ""


def hint_optimum() -> str:
    """How to reach optimum from here."""
    return "use exporter 'optimum'" if has_optimum() else f"{INSTALL_OPTIMUM} and use exporter 'optimum'"


def make_out(work_dir: Path) -> Path:
    """A fresh directory below `work_dir` for one export."""
    return Path(tempfile.mkdtemp(prefix="export-", dir=work_dir))


def run(job: Job, *, isolate: bool | None = None) -> dict[str, Any]:
    """Exports, and returns facts for the card: versions, exporter, and what the source said of itself.

    Args:
        job: what to export.
        isolate: whether to use a child process. By default so, unless the caller has imported torch already, when a
            second import would cost more than it saves.

    Raises:
        UserError: whatever `exporters.perform` found wrong with the model, or the child was killed.
        OSError: the disk is full.
    """
    if isolate is None:
        isolate = "torch" not in sys.modules
    if not isolate:
        from onnxpress.models import exporters

        return exporters.perform(job)
    out = Path(job.out)
    with (out / _LOG).open("wb") as log:
        command = [sys.executable, "-m", "onnxpress.models.export", json.dumps(dataclasses.asdict(job))]
        # The child must not prefer files of the current directory to installed packages; and needs no network.
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            if child.stdin:
                child.stdin.close()
    said = (out / _LOG).read_text(encoding="utf-8", errors="replace").strip()
    logger.debug("export of %s said:\n%s", job.source, said)
    has_result = not code and (out / _RESULT).is_file()
    result = json.loads((out / _RESULT).read_text(encoding="utf-8")) if has_result else {}
    if "facts" not in result and _is_full(out, f"{said} {result.get('error')}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
    if not has_result:
        raise _died(job, code, said)
    for name in (_RESULT, _LOG):
        (out / name).unlink()
    if failure := result.get("error"):
        raise _error(failure)
    return cast("dict[str, Any]", result["facts"])


def _is_full(out: Path, words: str) -> bool:
    """Whether a failed export ran out of disk space: it says so, or there was no room to say it."""
    return os.strerror(errno.ENOSPC) in words or shutil.disk_usage(out).free < _NO_ROOM


def _died(job: Job, code: int, said: str) -> OnnxpressError:
    if code < 0:
        return UserError(
            f"{job.source}: the export was killed by signal {-code}",
            hint="most often memory ran out; use a larger machine",
        )
    last = (said.splitlines() or ["it said nothing"])[-1]
    return OnnxpressError(f"{job.source}: the export ended with status {code}: {last}", hint="see the debug log")


def _error(failure: dict[str, Any]) -> OnnxpressError:
    """The child's error, of its own class again."""
    cls = getattr(errors, failure["type"], OnnxpressError)
    if not (isinstance(cls, type) and issubclass(cls, OnnxpressError)):
        cls = OnnxpressError
    return cls(failure["message"], hint=failure["hint"])


def _main(text: str) -> None:
    """The child: performs the job and writes facts or error to the result file."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = Job(**json.loads(text))
    result: dict[str, Any]
    try:
        from onnxpress.models import exporters

        result = {"facts": exporters.perform(job)}
    except OnnxpressError as error:
        result = {"error": {"type": type(error).__name__, "message": error.message, "hint": error.hint}}
    Path(job.out, _RESULT).write_text(json.dumps(result), encoding="utf-8")


def _end_with_parent() -> None:
    """Ends this process when the parent is gone: its end of the pipe is then closed, and reading returns."""
    # Not sys.stdin, whose lock this thread would still hold when the interpreter shuts down.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    _main(sys.argv[1])
