"""Every decoder, from every exporter: one attention operator per layer, and the logits that torch gives.

`pytest tests/architectures --update-architectures` writes what is measured into docs/architectures.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import models
from onnxpress.compiler import pipeline
from onnxpress.compiler.errors import UnsupportedModelError
from onnxpress.compiler.pass_ import Context
from onnxpress.models.tiny import tiny

LAYERS, HIDDEN = 3, 128
OPTIMUM = [
    *("bloom", "falcon", "falcon_alibi", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "granite", "llama", "llama3"),
    *("mistral", "mixtral", "olmo2", "opt", "phi3", "phi4", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"),
    "stablelm",
]
DEEPER = ("falcon", "gemma2", "gemma3", "gpt2", "llama", "smollm3")  # layers differ from each other, and a few more
OTHER_OPSETS = ["bloom", "falcon", "gemma3", "gpt_neox", "llama", "opt", "phi4", "smollm3"]
# What may stand between a projection and its attention without being a chain that moves data about.
_FUSED = ("GroupQueryAttention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
_FUSED += ("LayerNormalization", "Sum", "Gelu", "FastGelu", "QuickGelu", "RotaryEmbedding")
_STRAY = ("Transpose", "Expand", "Concat", "Gather", "Slice")
TOLERANCE = 1e-4  # of the largest logit

# (architecture, exporter, opset, attention, layers); an export through dynamo costs seconds, most of them per layer.
Case = tuple[str, str, int, str | None, int]
CASES: list[Case] = [
    *((name, "optimum", 18, None, LAYERS) for name in OPTIMUM),
    # Falcon's eager form adds ALiBi twice, that of GPT-2 hides which sizes are equal.
    *(
        (name, "dynamo", 18, "sdpa" if name in ("falcon_alibi", "gpt2") else "eager", 2 if name in DEEPER else 1)
        for name in OPTIMUM
    ),
    *(
        (name, "dynamo", opset, attention, 2 if name in ("gemma3", "smollm3") else 1)
        for opset, attention in ((20, "eager"), (23, "sdpa"))
        for name in OTHER_OPSETS
        if (name, attention) not in (("bloom", "sdpa"), ("falcon", "sdpa"))
    ),
    ("llama", "dynamo", 18, "sdpa", 1),
    ("falcon", "dynamo", 20, "sdpa", 1),
    # transformers has no sdpa for Bloom, and torch cannot write that of Falcon at opset 23, see below.
    *((name, "dynamo", 23, "eager", 1) for name in ("bloom", "falcon", "llama")),
]

Export = Callable[..., Path]
Feeds = dict[str, np.ndarray]

# (name, batch, lengths of the steps, tokens of padding on the left of the last row)
CONVERSATIONS = (
    ("prompt, past 0", 1, (11,), 0),
    ("decode, past 1", 1, (1, 1), 0),
    ("decode, past 40", 1, (40, 1), 0),
    ("chunks", 1, (11, 6, 6), 0),
    ("batch 2, padded", 2, (11, 1, 1), 4),
)


def steps(batch: int, lengths: tuple[int, ...], padding: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(token ids, mask of all tokens so far, positions of the new ones) of each step."""
    rng = np.random.default_rng(5)
    mask = np.ones((batch, 0), np.int64)
    for number, length in enumerate(lengths):
        new = np.ones((batch, length), np.int64)
        if number == 0:
            new[-1, :padding] = 0
        mask = np.concatenate([mask, new], axis=1)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -length:]
        yield rng.integers(3, 200, (batch, length)), mask, positions


def torch_logits(model: Any, *conversation: Any) -> list[np.ndarray]:
    import inspect

    import torch
    import transformers

    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache, found = transformers.DynamicCache(), []
    with torch.no_grad():
        for ids, mask, positions in steps(*conversation):
            given = {
                "input_ids": ids,
                "attention_mask": mask,
                **({"position_ids": positions} if takes_positions else {}),
            }
            tensors = {name: torch.from_numpy(array) for name, array in given.items()}
            output = model(**tensors, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits.numpy() * mask[:, -ids.shape[1] :, None])
    return found


def onnx_logits(session: Any, graph: ir.Graph, *conversation: Any) -> list[np.ndarray]:
    batch = conversation[0]
    caches: Feeds = {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
        for value in graph.inputs
        if value.name is not None and value.shape is not None and len(value.shape) == 4
    }
    inputs, outputs = {one.name for one in session.get_inputs()}, [one.name for one in session.get_outputs()]
    found = []
    for ids, mask, positions in steps(*conversation):
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches}
        results = dict(
            zip(outputs, session.run(None, {name: feeds[name] for name in feeds if name in inputs}), strict=True)
        )
        caches = {
            name.replace("present", "past_key_values"): array for name, array in results.items() if "present" in name
        }
        found.append(results["logits"] * mask[:, -ids.shape[1] :, None])
    return found


def stray_nodes(graph: ir.Graph) -> Counter[str]:
    """Operators that move data between the projections and the attention of a layer."""
    found: Counter[str] = Counter()
    for node in graph:
        if node.op_type != "GroupQueryAttention":
            continue
        queue, seen = list(node.inputs[:3]), set()
        while queue:
            value = queue.pop()
            above = None if value is None else value.producer()
            if above is None or id(above) in seen or above.op_type in ("MatMul", "Gemm"):
                continue
            seen.add(id(above))
            found[above.op_type] += above.op_type in _STRAY
            queue += above.inputs[:1]
    return +found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case if part))
def test_decoder(tiny_export: Export, tmp_path: Path, case: Case, architectures: list[dict[str, Any]]) -> None:
    architecture, exporter, opset, attention, layers = case
    options = {"opset": opset, "attention": attention, "num_layers": layers, "hidden_size": HIDDEN}
    source = models.load(tiny_export(architecture, exporter, **options), work_dir=tmp_path)
    assert source.model.opset_imports[""] == opset
    before = len(source.model.graph)
    done = pipeline.run(source.model, pipeline.parse("fp32"), Context(config=source.config))
    reasons = [reason for _, report in done for reason in report.reasons()]
    ops = Counter(node.op_type for node in source.model.graph)
    torch_model = tiny(architecture, num_layers=layers, hidden_size=HIDDEN)
    session = graphs.session(source.model)
    differences = {}
    for name, *conversation in CONVERSATIONS:
        worst = 0.0
        for want, got in zip(
            torch_logits(torch_model, *conversation),
            onnx_logits(session, source.model.graph, *conversation),
            strict=True,
        ):
            worst = max(worst, float(np.abs(want - got).max() / np.abs(want).max()))
        differences[name] = worst
    architectures.append(
        {
            "model": architecture,
            "exporter": exporter,
            "opset": opset,
            "attention": attention or "its own",
            "layers": layers,
            "nodes": (before, len(source.model.graph)),
            "operators": {name: ops[name] / layers for name in _FUSED if ops[name]},
            "stray": stray_nodes(source.model.graph),
            "differences": differences,
        }
    )
    routers = layers if "moe" in architecture or architecture == "mixtral" else 0  # a Softmax over experts in each
    assert (ops["GroupQueryAttention"], ops["Softmax"]) == (layers, routers), reasons
    assert "the operands differ in size" not in reasons
    assert not stray_nodes(source.model.graph)
    assert all(difference <= TOLERANCE for difference in differences.values()), differences


def test_what_torch_cannot_write_is_refused_with_the_reason(tiny_export: Export) -> None:
    """Falcon's queries share one head of keys, of which torch's sdpa at opset 23 knows nothing."""
    with pytest.raises(UnsupportedModelError, match=r"FalconForCausalLM.*with dynamo: .*num_heads") as refused:
        tiny_export("falcon", "dynamo", opset=23, attention="sdpa", num_layers=1, hidden_size=HIDDEN)
    assert len(refused.value.message.splitlines()) == 1
