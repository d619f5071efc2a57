"""The benchmark measures in a process of its own and counts bytes as decoding reads them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from decoders import FFN, HEADS, HIDDEN, KV_HEADS, VOCABULARY

from onnxpress.compiler.errors import BadModelFileError, OptionError
from onnxpress.runtime.benchmark import benchmark, weight_bytes_per_step
from onnxpress.runtime.skeleton import read


def test_measures_what_programs_rely_on(decoder_path):
    found = benchmark(decoder_path("lengths"), prompt_tokens=8, new_tokens=4, rounds=1, batch=2, threads=1)
    facts = found.to_json()
    for key in ("load_s", "time_to_first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes"):
        assert facts[key] > 0
    assert found.peak_memory_bytes >= found.base_memory_bytes
    assert found.prefill_tokens_per_s == pytest.approx(16 / found.time_to_first_token_s)
    head_size = HIDDEN // HEADS
    assert found.cache_bytes_per_token == 2 * 2 * KV_HEADS * head_size * 4
    cache = found.cache_bytes_per_token * (8 + 2)
    assert found.bytes_read_per_token == found.weight_bytes_per_step // 2 + cache


def test_weights_count_once_and_tables_by_the_row(decoder_path):
    found = weight_bytes_per_step(read(decoder_path("lengths") / "model.onnx"))
    kv = KV_HEADS * (HIDDEN // HEADS)
    layer = HIDDEN * (HIDDEN + 2 * kv + HIDDEN + 2 * FFN)
    floats = HIDDEN + 2 * layer + HIDDEN * VOCABULARY
    small = 3 * 8  # two int64 constants, and up to one more
    assert 4 * floats <= found <= 4 * floats + small


def test_a_table_that_is_also_multiplied_counts_whole(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 18]> g (int64[N] i, float[1, 10] x) => (float[N, 4] a, float[1, 4] b)
    <float[10, 4] w = {0}, int64[2] s = {10, 4}> { v = Reshape(w, s)  a = Gather(v, i) @B }"""
    for body, rows in (("", 10), ("b = MatMul(x, w)", 1)):
        source = text.replace("@B", body)
        source = source if body else source.replace(", float[1, 4] b", "")
        source = source.replace("float[10, 4] w = {0}", "float[10, 4] w = {" + ",".join(["0"] * 40) + "}")
        ir.save(ir.from_onnx_text(source), tmp_path / "m.onnx")
        assert weight_bytes_per_step(read(tmp_path / "m.onnx")) == 160 // rows + 16


def test_errors_of_the_measuring_process_are_ours(decoder_path, tmp_path):
    with pytest.raises(OptionError, match="at most"):
        benchmark(decoder_path("lengths"), prompt_tokens=500, new_tokens=500)
    with pytest.raises(OptionError, match="new_tokens"):
        benchmark(decoder_path("lengths"), new_tokens=1)
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(BadModelFileError):
        benchmark(tmp_path)
