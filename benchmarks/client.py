"""The parent's half of the benchmark protocol: starts workers, asks one, and sees that no other computes meanwhile."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from terminal import BenchmarkError

HERE = Path(__file__).resolve().parent

# Settings of the caller's shell that would reach into one engine and not into another.
_THREAD_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ORT_", "GGML_", "LLAMA_", "PYTHON")

# How long a worker may be silent before it counts as hung, in seconds; one reply covers at most 1,024 tokens.
_PATIENCE_S = 900.0


def clean_environment() -> dict[str, str]:
    """The caller's environment without thread settings and without a way to a model hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_THREAD_SETTINGS)}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Worker:
    """A process that holds one engine with one model loaded; use it as a context manager.

    Attributes:
        name: what the tables call it.
        command: Python and script with arguments.
        log: file that takes what the engine prints.
    """

    name: str
    command: list[str]
    log: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _unread: bytes = field(default=b"", init=False, repr=False)

    def __enter__(self) -> Worker:
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=clean_environment(),
                bufsize=0,
            )
        return self

    def __exit__(self, *_: object) -> None:
        process = self._running()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def ask(self, op: str, **arguments: Any) -> Any:
        """Sends one request and waits for its result.

        Raises:
            BenchmarkError: the worker reports an error, ends, or stays silent.
        """
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            raise self._died() from None
        reply = json.loads(self._read_line())
        if not reply["ok"]:
            raise BenchmarkError(f"{self.name}: {op} failed: {reply['error']}", hint=f"see {self.log}")
        return reply["result"]

    def cpu_s(self) -> float:
        """Processor time this worker has used so far, all threads, in seconds."""
        times = psutil.Process(self._running().pid).cpu_times()
        return float(times.user + times.system)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process

    def _read_line(self) -> bytes:
        stdout = self._running().stdout
        assert stdout is not None
        deadline = time.monotonic() + _PATIENCE_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BenchmarkError(f"{self.name}: no reply within {_PATIENCE_S:.0f} s", hint=f"see {self.log}")
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                raise self._died()
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _died(self) -> BenchmarkError:
        code = self._running().wait()
        tail = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-8:])
        return BenchmarkError(f"{self.name}: the worker ended with status {code}\n{tail}", hint=f"see {self.log}")


def settle(workers: Iterable[Worker], *, quiet_s: float = 0.2, patience_s: float = 10.0) -> None:
    """Waits until no worker has used the processor for `quiet_s` seconds.

    The thread pools of the engines spin for a while after a run; the next engine must not pay for that.

    Raises:
        BenchmarkError: a worker is still busy after `patience_s` seconds.
    """
    crew = list(workers)
    deadline = time.monotonic() + patience_s
    while True:
        before = [worker.cpu_s() for worker in crew]
        time.sleep(quiet_s)
        busy = [worker.name for worker, used in zip(crew, before, strict=True) if worker.cpu_s() - used > 0.02]
        if not busy:
            return
        if time.monotonic() > deadline:
            raise BenchmarkError(f"still computing after {patience_s:.0f} s without a request: {', '.join(busy)}")


class Foreign:
    """Share of the machine's processor time that went to others while one worker was asked; a context manager.

    Attributes:
        share: 0.0 to 1.0 of all processors, known after the block. Time stolen by a hypervisor counts.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.share = 0.0

    def __enter__(self) -> Foreign:
        self._before = (psutil.cpu_times(), self._worker.cpu_s())
        return self

    def __exit__(self, *_: object) -> None:
        now, own = psutil.cpu_times(), self._worker.cpu_s()
        then, own_before = self._before
        # Guest time is part of user time already.
        spent = {name: getattr(now, name) - getattr(then, name) for name in now._fields if "guest" not in name}
        whole = sum(spent.values())
        idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
        if whole > 0:
            self.share = max(0.0, (whole - idle - (own - own_before)) / whole)
