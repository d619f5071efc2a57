"""Artifacts for CUDA keep every float node on CUDA and copy nothing between devices (planned with stand-ins).

Only planned: kernels that exist and copies that are inserted are ONNX Runtime's own answer, numbers are not computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from test_decoders import OPTIMUM
from test_encoders import ENCODERS

import onnxpress

# Plans one directory per line of input: to start ONNX Runtime for each takes longer than the plan.
_AUDITOR = """
import json, sys
from onnxpress.runtime.placement import audit
for line in sys.stdin:
    print(json.dumps(audit(line.strip(), "cuda").to_json()), flush=True)
"""

Export = Callable[..., Path]
Plan = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    """`plan(directory)`: where the nodes of its graph would run."""
    reason = stand_ins.missing()
    if reason is not None:
        pytest.skip(f"no stand-in CUDA libraries: {reason}")
    libraries = tmp_path_factory.mktemp("cuda")
    stand_ins.build(libraries)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
    command = [sys.executable, "-c", _AUDITOR]
    with (libraries / "log").open("w") as log:
        child = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
    assert child.stdin is not None
    assert child.stdout is not None

    def ask(directory: Path) -> dict[str, Any]:
        child.stdin.write(f"{directory}\n")  # type: ignore[union-attr]
        child.stdin.flush()  # type: ignore[union-attr]
        answer = child.stdout.readline()  # type: ignore[union-attr]
        assert answer, (libraries / "log").read_text()[-2000:]
        return json.loads(answer)

    yield ask
    child.stdin.close()
    child.wait(60)
    child.stdout.close()


def attention_on_cuda(found: dict[str, Any]) -> int:
    operators = found["operators"]["CUDAExecutionProvider"]
    return operators.get("GroupQueryAttention", 0) + operators.get("MultiHeadAttention", 0)


@pytest.mark.parametrize("target", ["cuda", "cuda-bf16"])
@pytest.mark.parametrize("architecture", [*OPTIMUM, *ENCODERS])
def test_every_float_node_runs_on_cuda(
    big_tiny_export: Export,
    plan: Plan,
    tmp_path: Path,
    placements: dict[tuple[str, str], str],
    architecture: str,
    target: str,
) -> None:
    source = big_tiny_export(architecture, "optimum")
    made = onnxpress.optimize(source, output=tmp_path / "made", recipe="fp32", target=target, measure=False)
    found = plan(made.directory)
    strays = sorted({name.partition(" ")[0] for name in found["stray"]})
    wrong = [*strays, *(["copies"] if found["inner_copies"] else [])]
    column = {"cuda": "cuda fp16", "cuda-bf16": "cuda bf16"}[target]
    placements[architecture, column] = f"not {', '.join(wrong)}" if wrong else "all on CUDA"
    assert found["stray"] == []
    assert found["inner_copies"] == []
    assert attention_on_cuda(found) == 3  # layers
    operators = found["operators"]["CUDAExecutionProvider"]
    skips = sum(count for name, count in operators.items() if name.startswith("Skip"))
    assert skips >= (1 if architecture == "olmo2" else 3), "OLMo 2 has its norms before the addition"


@pytest.mark.parametrize(
    ("architecture", "recipe", "target"),
    [
        *(
            ("llama", recipe, target)
            for recipe in ("int8", "kv8", "int4-rtn", "int4-small")
            for target in ("cuda", "cuda-bf16")
        ),
        ("qwen2", "int4-rtn", "cuda"),
        ("qwen3_moe", "int4-rtn", "cuda-bf16"),
    ],
)
def test_quantized_nodes_run_on_cuda(
    big_tiny_export: Export, plan: Plan, tmp_path: Path, architecture: str, recipe: str, target: str
) -> None:
    source = big_tiny_export(architecture, "optimum")
    made = onnxpress.optimize(source, output=tmp_path / "made", recipe=recipe, target=target, measure=False)
    found = plan(made.directory)
    assert (found["stray"], found["inner_copies"]) == ([], [])
    assert found["operators"]["CUDAExecutionProvider"]["MatMulNBits"] > 3


def test_the_audit_sees_what_is_wrong(big_tiny_export: Export, plan: Plan, tmp_path: Path) -> None:
    # A float32 graph: GroupQueryAttention has no such kernel on CUDA.
    source = big_tiny_export("llama", "optimum")
    made = onnxpress.optimize(source, output=tmp_path / "made", recipe="fp32", measure=False)
    assert any("GroupQueryAttention" in one for one in plan(made.directory)["stray"])
