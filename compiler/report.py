"""The card of an artifact: what was done, what was skipped and why, what it cost; a dictionary for programs.

`onnxpress.json` holds it. Tables for people are drawn by the CLI from the same dictionary.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import resource
import sys
from typing import Any

import onnx_ir as ir

from onnxpress.compiler.pass_ import Pass, Report

CARD_FORMAT = 1
_MAX_SITES = 40  # skipped sites named per reason; the count is always complete
_PACKAGES = ("onnxpress", "onnxruntime-gpu", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy")

# The first ONNX Runtime that knows each opset of `ai.onnx`, from its compatibility table.
_RUNTIME_OF_OPSET = {18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.20", 23: "1.22", 24: "1.23", 25: "1.24"}

Card = dict[str, Any]


def pass_row(pass_: Pass, report: Report) -> dict[str, Any]:
    """What one pass did, ready for JSON."""
    sites: dict[str, list[str]] = {}
    for skip in report.skipped:
        sites.setdefault(skip.reason, []).append(skip.site)
    return {
        "pass": str(pass_),
        "promise": pass_.promise.value,
        "changed": len(report.changed),
        "skipped": [
            {"reason": reason, "count": len(names), "sites": names[:_MAX_SITES]} for reason, names in sites.items()
        ],
        "metrics": {name: float(value) for name, value in report.metrics.items()},
        "seconds": round(report.seconds, 3),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "ledger": report.ledger,
        **({"calibration": report.calibration} if report.calibration else {}),
        **({"notes": report.notes} if report.notes else {}),
    }


def operators(model: ir.Model) -> dict[str, int]:
    """Operator types with their counts, most frequent first; sub-graphs included."""
    counts: dict[str, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def requirements(model: ir.Model) -> dict[str, Any]:
    """What a runtime must know to load the model."""
    opset = model.opset_imports.get("", 0)
    tried = installed("onnxruntime-gpu") or installed("onnxruntime")
    newest = max(_RUNTIME_OF_OPSET)
    return {
        "ir_version": model.ir_version,
        "opset_imports": dict(model.opset_imports),
        # com.microsoft operators are not versioned: below the version that was tried, nothing is known of them.
        "minimum_onnxruntime": tried
        if model.opset_imports.get("com.microsoft")
        else _RUNTIME_OF_OPSET.get(min(max(opset, 18), newest), tried),
        "tried_onnxruntime": tried,
    }


def versions() -> dict[str, str]:
    """Installed versions of what takes part."""
    found = {name: installed(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def installed(name: str) -> str | None:
    """Version of an installed distribution, None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """The machine that numbers were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def now() -> str:
    """UTC time in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, file-backed pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    """Marketing name of the processor, from the system's own table where there is one."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
