"""The plan of a session: what strays to the CPU is named, without a GPU and without running anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import onnx_ir as ir
import pytest
import stand_ins

from onnxpress.compiler.errors import OptionError, ProviderError
from onnxpress.runtime import providers
from onnxpress.runtime.placement import audit

PLAN = """
import json, sys
from onnxpress.runtime.placement import audit
print(json.dumps(audit(sys.argv[1], "cuda").to_json()))
"""

GOOD = """<ir_version: 10, opset_import: ["" : 18]> g (float16[N, 4] x) => (float16[N, 4] y) {
    h = Neg(x)  t = Tanh(h)
    s = Shape(x)  i = Constant<value = int64 {0}>()  n = Gather(s, i)  m = Cast<to = 6>(n)  k = Cast<to = 7>(m)
    a = Constant<value = int64[1] {0}>()  u = Unsqueeze(k, a)  f = Constant<value = int64[1] {4}>()
    r = Concat<axis = 0>(u, f)  y = Reshape(t, r)
}"""
# CUDA has no float DynamicQuantizeLinear: the node and its neighbours pay for two copies.
STRAY = """<ir_version: 10, opset_import: ["" : 18]> g (float[N, 4] x) => (float[N, 4] y) {
    h = Tanh(x)  q, scale, zero = DynamicQuantizeLinear(h)  d = DequantizeLinear(q, scale, zero)  y = Tanh(d)
}"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """`plan(model)`: the plan for CUDA, made in a process that has stand-in CUDA libraries."""
    reason = stand_ins.missing()
    if reason:
        pytest.skip(f"no stand-in CUDA libraries: {reason}")
    libraries = tmp_path_factory.mktemp("cuda")
    stand_ins.build(libraries)

    def run(text):
        path = libraries / "model.onnx"
        ir.save(ir.from_onnx_text(text), path)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
        done = subprocess.run([sys.executable, "-c", PLAN, str(path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_float_nodes_on_cuda_are_clean(plan):
    found = plan(GOOD)
    assert found["stray"] == []
    assert found["inner_copies"] == []
    assert sum(found["operators"][providers.CUDA].values()) >= 2


def test_float_nodes_on_the_cpu_are_named(plan):
    found = plan(STRAY)
    assert any(name.startswith("DynamicQuantizeLinear") for name in found["stray"])
    assert found["copies"] >= 1
    assert found["inner_copies"]


def test_on_the_cpu_everything_is_where_it_belongs(decoder_path):
    found = audit(decoder_path("fused"), "cpu", strict=True)
    assert found.is_clean
    assert found.copies == 0
    assert found.operators[providers.CPU]["GroupQueryAttention"] == 2
    assert found.to_json()["provider"] == "cpu"


@pytest.mark.skipif(not providers.missing_cuda_libraries(), reason="CUDA libraries are here")
def test_without_cuda_there_is_no_plan_for_it(decoder_path):
    with pytest.raises(ProviderError, match="not found"):
        audit(decoder_path("fused"), "cuda")


def test_providers_are_checked(decoder_path):
    with pytest.raises(OptionError, match="cpu or cuda"):
        audit(decoder_path("fused"), "gpu")
