"""Adapters trained with PEFT, and repairs: the same logits in torch, merged, in slots, and in onnxruntime-genai."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.compiler.adapters import add_slots, convert_adapter, extract_adapter, merge_adapters
from onnxpress.compiler.artifact import Artifact
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.optimize import optimize
from onnxpress.runtime.session import DecoderSession

pytest.importorskip("peft")
from adapters import trained

TOLERANCE = 1e-5  # of the largest logit
_GATED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FOUR_H = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
# (architecture, settings of the adapter); the odd ones are of different kinds on purpose.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": _GATED, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    ("qwen2", {"target_modules": _GATED, "use_rslora": True}),
    ("gemma", {"target_modules": _GATED}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    ("gpt_neox", {"target_modules": _FOUR_H}),
    ("falcon_alibi", {"target_modules": _FOUR_H}),
    ("opt", {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
]


def logits(directory: Path, ids: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    session = DecoderSession(directory, provider="cpu", threads=1)
    if adapter is not None:
        session.adapters.default = session.load_adapter(adapter)
    return session.run_logits(ids).copy()


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


class Trained:
    """A model, an adapter, and what torch makes of both."""

    def __init__(self, checkpoint: Path, export: Path, work: Path, **config: Any) -> None:
        self.checkpoint, self.export, self.adapter = checkpoint, export, work / "adapter"
        self.ids, self.logits, self.merged = trained(checkpoint, self.adapter, **config)

    def artifact(self, work: Path, passes: str) -> Artifact:
        return optimize(self.export, output=work, passes=passes, measure=False)


@pytest.fixture(scope="module")
def train(tiny_export: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    found: dict[str, Trained] = {}

    def make(name: str, key: str = "", exporter: str = "optimum", **config: Any) -> Trained:
        export = tiny_export(name, exporter)
        key = key or f"{name}-{exporter}"
        if key not in found:
            checkpoint = next(one / name for one in export.parents if (one / name / "config.json").exists())
            found[key] = Trained(checkpoint, export, tmp_path_factory.mktemp(key), **config)
        return found[key]

    return make


@pytest.mark.parametrize("passes", ["", "fuse", "fp32"])
@pytest.mark.parametrize("name, config", CASES, ids=[name for name, _ in CASES])
def test_merged_and_in_slots_as_in_torch(
    name: str, config: dict[str, Any], passes: str, train: Callable[..., Trained], tmp_path: Path
) -> None:
    given = train(name, **config)
    assert difference(given.merged, given.logits) < TOLERANCE
    plain = given.artifact(tmp_path / "plain", passes)
    before = logits(plain.directory, given.ids)
    assert difference(before, given.logits) > 0.01, "the adapter does nothing"
    merged = merge_adapters(plain.directory, given.adapter, tmp_path / "merged")
    assert difference(logits(merged.directory, given.ids), given.logits) < TOLERANCE
    slots = add_slots(plain.directory, tmp_path / "slots")
    assert difference(logits(slots.directory, given.ids), before) < 1e-6
    assert difference(logits(slots.directory, given.ids, given.adapter), given.logits) < TOLERANCE
    file = tmp_path / "one.onnx_adapter"
    convert_adapter(given.adapter, slots.directory, file)
    assert difference(logits(slots.directory, given.ids, file), given.logits) < TOLERANCE


@pytest.mark.parametrize("passes", ["", "fp32"])
def test_of_another_exporter(passes: str, train: Callable[..., Trained], tmp_path: Path) -> None:
    given = train("llama", exporter="dynamo", target_modules=_GATED)
    plain = given.artifact(tmp_path / "plain", passes)
    merged = merge_adapters(plain.directory, given.adapter, tmp_path / "merged")
    assert difference(logits(merged.directory, given.ids), given.logits) < TOLERANCE
    slots = add_slots(plain.directory, tmp_path / "slots")
    assert difference(logits(slots.directory, given.ids, given.adapter), given.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_head_and_table_tied_or_not(name: str, train: Callable[..., Trained], tmp_path: Path) -> None:
    given = train(name, f"{name}-ends", target_modules=["embed_tokens", "lm_head", "q_proj"])
    plain = given.artifact(tmp_path / "plain", "fp32")
    merged = merge_adapters(plain.directory, given.adapter, tmp_path / "merged")
    assert difference(logits(merged.directory, given.ids), given.logits) < TOLERANCE
    slots = add_slots(plain.directory, tmp_path / "slots", also=("head", "embedding"))
    assert difference(logits(slots.directory, given.ids, given.adapter), given.logits) < TOLERANCE


@pytest.mark.parametrize("name, modules", [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])])
def test_dora_is_merged_and_has_no_slot(
    name: str, modules: list[str], train: Callable[..., Trained], tmp_path: Path
) -> None:
    given = train(name, f"{name}-dora", target_modules=modules, use_dora=True, fan_in_fan_out=name == "gpt2")
    plain = given.artifact(tmp_path / "plain", "fp32")
    merged = merge_adapters(plain.directory, given.adapter, tmp_path / "merged")
    assert difference(logits(merged.directory, given.ids), given.logits) < TOLERANCE
    slots = add_slots(plain.directory, tmp_path / "slots")
    with pytest.raises(UnsupportedModelError, match="DoRA scales the rows"):
        logits(slots.directory, given.ids, given.adapter)


@pytest.mark.parametrize("bits, loss", [(8, 0.1), (4, 0.5)])
def test_quantized_is_as_near_as_its_base(
    bits: int, loss: float, train: Callable[..., Trained], tmp_path: Path
) -> None:
    given = train("llama", **CASES[0][1])
    passes = f"fuse, rtn(bits={bits}, block_size=16), pack"
    small = given.artifact(tmp_path / "small", passes)
    rounded = optimize(
        given.export,
        output=tmp_path / "late",
        passes=f"merge_lora(path={str(given.adapter)!r}), {passes}",
        measure=False,
    )
    best = difference(logits(rounded.directory, given.ids), given.logits)
    merged = merge_adapters(small.directory, given.adapter, tmp_path / "merged")
    assert 0 < merged.report["passes"][0]["metrics"]["update_error"] < loss
    assert difference(logits(merged.directory, given.ids), given.logits) < 2 * best
    slots = add_slots(small.directory, tmp_path / "slots")
    assert difference(logits(slots.directory, given.ids, given.adapter), given.logits) < 2 * best


@pytest.mark.parametrize("name, config", [CASES[0], CASES[3]], ids=["llama", "gpt2"])
def test_extraction_recovers_what_was_merged(
    name: str, config: dict[str, Any], train: Callable[..., Trained], tmp_path: Path
) -> None:
    from onnxpress.compiler.peft import read_peft

    given = train(name, **config)
    plain = given.artifact(tmp_path / "plain", "fp32")
    merged = merge_adapters(given.export, given.adapter, tmp_path / "merged")
    found = extract_adapter(merged.directory, plain.directory, tmp_path / "found", rank=4)
    assert found.error < 1e-4
    assert not found.left_out
    before, after = read_peft(given.adapter), read_peft(tmp_path / "found")
    assert set(before.updates) == set(after.updates)
    for module, update in before.updates.items():
        wanted = update.delta()
        assert np.abs(after.updates[module].delta() - wanted).max() < 1e-5, module
    again = merge_adapters(plain.directory, tmp_path / "found", tmp_path / "again")
    assert difference(logits(again.directory, given.ids), given.logits) < TOLERANCE
    if name == "llama":  # PEFT reads what was written
        import peft
        import torch
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(given.checkpoint, torch_dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, str(tmp_path / "found")).eval()
        with torch.no_grad():
            assert difference(model(input_ids=torch.tensor(given.ids)).logits.numpy(), given.logits) < TOLERANCE


def test_onnxruntime_alone_takes_the_file(train: Callable[..., Trained], tmp_path: Path) -> None:
    import onnxruntime as ort

    given = train("llama", **CASES[0][1])
    plain = given.artifact(tmp_path / "plain", "fp32")
    slots = add_slots(plain.directory, tmp_path / "slots")
    file = tmp_path / "one.onnx_adapter"
    convert_adapter(given.adapter, slots.directory, file)
    session = ort.InferenceSession(str(slots.model_path), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": given.ids, "attention_mask": np.ones_like(given.ids)}
    feeds["position_ids"] = np.arange(given.ids.shape[1])[None]
    for one in session.get_inputs():
        if one.name.startswith("past"):
            feeds[one.name] = np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
    names = {one.name for one in session.get_inputs()}
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(str(file))
    options.add_active_adapter(adapter)
    (found,) = session.run(["logits"], {key: value for key, value in feeds.items() if key in names}, options)
    assert difference(found, given.logits) < TOLERANCE


_GENAI = """
import sys, numpy, onnxruntime_genai as og
model = og.Model(sys.argv[1])
adapters = og.Adapters(model)
adapters.load(sys.argv[2], "one")
ids = numpy.load(sys.argv[3])
found = []
for name in (None, "one", None):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=32)
    generator = og.Generator(model, parameters)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(ids[0].astype(numpy.int32))
    found.append(numpy.array(generator.get_output("logits")))
numpy.save(sys.argv[4], numpy.stack(found))
"""


def genai_python() -> str | None:
    """A Python that has onnxruntime-genai: that of $ONNXPRESS_GENAI_PYTHON, or this one."""
    for python in filter(None, (os.environ.get("ONNXPRESS_GENAI_PYTHON"), sys.executable)):
        if subprocess.run([python, "-c", "import onnxruntime_genai"], capture_output=True, check=False).returncode == 0:
            return python
    return None


@pytest.mark.parametrize("passes", ["fp32", "fuse, rtn(bits=8), pack"])
def test_in_onnxruntime_genai(passes: str, train: Callable[..., Trained], tmp_path: Path) -> None:
    given = train("llama", **CASES[0][1])
    plain = given.artifact(tmp_path / "plain", passes)
    slots = add_slots(plain.directory, tmp_path / "slots")
    file = tmp_path / "one.onnx_adapter"
    convert_adapter(given.adapter, slots.directory, file)
    second = switched_in_genai(slots.directory, file, given.ids, tmp_path)
    if passes == "fp32":
        assert difference(second, given.logits) < TOLERANCE


def test_a_repair_in_onnxruntime_genai(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    passes = "fuse, pack, compensate(rank=16, tokens=128, length=32, rounds=0, form='adapter')"
    place = tmp_path / "out"
    optimize(tiny_export("llama"), output=place, passes=passes, calibration="english", measure=False)
    ids = np.random.default_rng(0).integers(3, 200, (1, 9))
    found = switched_in_genai(place, place / "repair.onnx_adapter", ids, tmp_path)
    assert difference(found, logits(place, ids)) > 0.01


def switched_in_genai(directory: Path, file: Path, ids: np.ndarray, work: Path) -> np.ndarray:
    """Logits with the adapter, after a look at those before and after it."""
    python = genai_python()
    if python is None:
        pytest.skip("onnxruntime-genai is not installed; ONNXPRESS_GENAI_PYTHON may name a Python that has it")
    np.save(work / "ids.npy", ids)
    command = [python, "-c", _GENAI, str(directory), str(file), str(work / "ids.npy")]
    done = subprocess.run([*command, str(work / "out.npy")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, third = np.load(work / "out.npy")
    before = logits(directory, ids)
    assert difference(first, before) < TOLERANCE
    assert difference(second, logits(directory, ids, file)) < TOLERANCE
    assert difference(third, before) < TOLERANCE
    return np.asarray(second)
