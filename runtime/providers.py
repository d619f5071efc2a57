"""Which execution provider runs a model, and why: CUDA if it really computes, else the CPU, said aloud.

ONNX Runtime lists CUDA as available whenever its wheel contains it, and falls back to the CPU without an error when a
library is missing. So availability is tried, not read: the libraries are opened, the driver is asked for devices, and a
small graph is computed and its result compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from onnxpress.compiler.errors import OptionError, ProviderError, near_miss

logger = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
POLICIES = ("auto", "cpu", "cuda")

_STREAM_BYTES = 96 << 20  # per thread; beyond the last-level cache of most machines
_STREAM_SECONDS = 0.5


@dataclass(frozen=True)
class Choice:
    """The provider that was picked: `provider` is cpu or cuda, `providers` what ONNX Runtime is given."""

    provider: str
    providers: tuple[str, ...]
    reason: str


def choose(policy: str = "auto", *, strict: bool = False) -> Choice:
    """Picks the execution provider.

    Args:
        policy: `auto` takes CUDA if it works, `cpu` and `cuda` ask for one.
        strict: fail where CUDA was asked for and does not work, instead of taking the CPU with a warning.

    Raises:
        OptionError: there is no such policy.
        ProviderError: `strict`, and CUDA does not work here.
    """
    if policy not in POLICIES:
        raise OptionError(f"provider: expected auto, cpu or cuda, got {policy!r}", hint=near_miss(policy, POLICIES))
    if policy == "cpu":
        return Choice("cpu", (CPU,), "the CPU was asked for")
    obstacle = cuda_obstacle()
    if obstacle is None:
        return Choice("cuda", (CUDA, CPU), "CUDA computed a test graph rightly")
    if policy == "cuda":
        if strict:
            raise ProviderError(f"provider: expected a working CUDA, got none: {obstacle}", hint="use --provider cpu")
        logger.warning("CUDA was asked for and does not work (%s): running on the CPU", obstacle)
    else:
        logger.info("running on the CPU: %s", obstacle)
    return Choice("cpu", (CPU,), obstacle)


@functools.cache
def cuda_obstacle() -> str | None:
    """Why CUDA cannot be used in this process, in one line; None if a test graph came out right on it."""
    if CUDA not in ort.get_available_providers():
        return "this onnxruntime was built without CUDA; the package onnxruntime-gpu has it"
    missing = missing_cuda_libraries()
    if missing:
        return f"not found: {', '.join(missing)}"
    try:
        session = ort.InferenceSession(
            _probe_model(), providers=[CUDA], provider_options=[{}], enable_fallback=0, sess_options=_quiet_options()
        )
        if CUDA not in session.get_providers():
            return "ONNX Runtime refused the CUDA provider and took the CPU"
        values = np.arange(1024, dtype=np.float32)
        (result,) = session.run(None, {"x": values})
    except _ort_errors() as error:
        return f"CUDA session failed: {str(error).splitlines()[0][:200]}"
    if not np.array_equal(result, values + values):
        return "a CUDA session starts, but computes wrong numbers"
    return None


def missing_cuda_libraries() -> list[str]:
    """The CUDA libraries that ONNX Runtime needs and the loader does not find, the driver's included."""
    names = _cuda_libraries()
    missing = [name for name in names if not _opens(name)]
    if missing and missing != names[:1]:
        # The pip packages nvidia-* are not on the loader's path; ONNX Runtime knows where they lie.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls(cudnn=False)
        missing = [name for name in names if not _opens(name)]
    return missing


def _cuda_libraries() -> list[str]:
    try:
        from onnxruntime.capi import build_and_package_info

        major = str(getattr(build_and_package_info, "cuda_version", "")).split(".")[0]
    except ImportError:
        major = ""
    major = major or "13"
    return ["libcuda.so.1", *(f"lib{part}.so.{major}" for part in ("cudart", "cublas", "cublasLt")), "libcurand.so.10"]


def _opens(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _quiet_options() -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def _ort_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ["EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile"]
    names += ["NotImplemented", "RuntimeException", "EngineError"]
    found = [getattr(state, name) for name in names if hasattr(state, name)]
    return (*found, RuntimeError, ValueError)


ORT_ERRORS = _ort_errors()


def _probe_model() -> bytes:
    import onnx_ir as ir  # here, for a process that measures the memory of a model

    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]> g (float[N] x) => (float[N] y) { y = Add(x, x) }'
    )
    return bytes(ir.to_proto(model).SerializeToString())


@functools.cache
def memory_bandwidth() -> float:
    """Bytes per second that all cores together read from memory; measured once per process, for half a second.

    Decoding one token reads every weight once, so this number divided by the bytes of a model bounds its speed.
    """
    threads = os.cpu_count() or 1
    buffers = [np.ones(_STREAM_BYTES // 8, np.int64) for _ in range(threads)]
    counts = [0] * threads
    deadline = time.perf_counter() + _STREAM_SECONDS

    def read(index: int) -> None:
        buffer = buffers[index].reshape(8, -1)  # eight looks at the clock per sweep
        while True:
            for part in buffer:
                part.max()  # the reduction of numpy that is fastest, and it gives up the interpreter lock
                counts[index] += part.nbytes
                if time.perf_counter() > deadline:
                    return

    started = time.perf_counter()
    _run_in_threads(read, threads)
    return sum(counts) / (time.perf_counter() - started)


def _run_in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory of this machine, in bytes; zeros where it cannot be read."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0, 0
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)


def cpu_features() -> tuple[str, list[str]]:
    """(name of the CPU, those of its instruction sets that the kernels of ONNX Runtime use)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
    present = set(flags.group(1).split()) if flags else set()
    return (name.group(1) if name else platform.machine()), [flag for flag in known if flag in present]


def explain() -> dict[str, Any]:
    """What `doctor` tells about this machine: versions, providers, why CUDA is or is not used, CPU and memory.

    Sizes are bytes, the bandwidth bytes per second.
    """
    name, features = cpu_features()
    total, available = memory_bytes()
    obstacle = cuda_obstacle()
    return {
        "onnxruntime": ort.__version__,
        "available_providers": list(ort.get_available_providers()),
        "provider": "cpu" if obstacle else "cuda",
        "cuda_usable": obstacle is None,
        "cuda_reason": obstacle or "a test graph came out right on CUDA",
        "cpu": name,
        "cpu_features": features,
        "cores": os.cpu_count() or 1,
        "memory_bytes": total,
        "memory_available_bytes": available,
        "memory_bandwidth_bytes_per_s": memory_bandwidth(),
    }
