"""Artifacts for CUDA keep every float node on CUDA and copy nothing between devices (planned with stand-ins)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stand_ins

import onnxpress

AUDIT = """
import json, sys
from onnxpress.runtime.placement import audit
print(json.dumps(audit(sys.argv[1], "cuda").to_json()))
"""


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = stand_ins.missing()
    if reason is not None:
        pytest.skip(f"no stand-in CUDA libraries: {reason}")
    directory = tmp_path_factory.mktemp("cuda")
    stand_ins.build(directory)
    return directory


def plan(directory: Path, libraries: Path) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, str(directory)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_float_node_runs_on_cuda(
    tiny_export: Callable[..., Path], libraries: Path, tmp_path: Path, architecture: str, recipe: str
) -> None:
    source = tiny_export(architecture)
    made = onnxpress.optimize(source, output=tmp_path / "made", recipe=recipe, target="cuda", measure=False)
    found = plan(made.directory, libraries)
    assert found["stray"] == []
    assert found["inner_copies"] == []
    assert (
        found["operators"]["CUDAExecutionProvider"]["GroupQueryAttention"]
        == made.report["operators"]["com.microsoft.GroupQueryAttention"]
    )


def test_the_audit_sees_what_is_wrong(tiny_export: Callable[..., Path], libraries: Path, tmp_path: Path) -> None:
    # A float32 graph: GroupQueryAttention has no such kernel on CUDA.
    made = onnxpress.optimize(tiny_export("llama"), output=tmp_path / "made", recipe="fp32", measure=False)
    found = plan(made.directory, libraries)
    assert any("GroupQueryAttention" in one for one in found["stray"])
