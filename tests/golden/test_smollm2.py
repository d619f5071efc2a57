"""The real model: golden numbers of every recipe, greedy equality with transformers, and the other loaders.

Regenerate the golden files with `pytest --update-golden`; a change that only moves code leaves them alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnxpress
from onnxpress.compiler.artifact import Artifact

pytestmark = pytest.mark.model
HERE = Path(__file__).parent
TEXT = (
    "A lighthouse keeper once noticed that the birds which rested on his railing always left before a storm. He began "
    "to write down the hour at which they went, and the hour at which the first wind came, and after three winters he "
    "could tell the fishermen of the village half a day ahead when to stay at home. They paid him in herring. When "
    "the harbour office sent a young man with a barometer, the keeper showed him the notebook, and the young man, who "
    "was honest, compared the two for a year. The birds were wrong four times, the barometer six. In the report to the "
    "ministry he recommended that both be kept, since they were wrong on different days, and that the keeper be given "
    "a second notebook. Nobody answered. The keeper went on writing in the margins of the first one, in smaller and "
    "smaller letters, and taught the method to his daughter, who later measured something else entirely: how long it "
    "takes for a rumour to walk from one end of a town to the other. She found that it walks faster on market days, "
    "that it gains weight on the way, and that it is seldom stopped by the truth coming from the opposite direction."
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a small",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first man",
    "To bake bread, you need",
    "The opposite of hot is",
    "List the planets of the solar system:",
    "Dear Sir or Madam,",
)


@pytest.fixture(scope="session")
def exported(real_model: Artifact) -> Artifact:
    """The model as optimum exports it."""
    return real_model


@pytest.fixture(scope="session")
def artifact(exported: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """`artifact(recipe)`, made once."""
    made: dict[str, Artifact] = {}
    folder = tmp_path_factory.mktemp("smollm2")

    def make(recipe: str) -> Artifact:
        if recipe not in made:
            output = folder / recipe
            # Not text that the model writes: it differs from processor to processor.
            made[recipe] = onnxpress.optimize(
                exported.directory, output=output, recipe=recipe, calibration="english", measure=False
            )
        return made[recipe]

    return make


def greedy(artifact: Artifact, prompt: str, count: int) -> list[int]:
    model = artifact.load(threads=2)
    ids = model.tokenizer.encode(prompt)
    return list(model.generate(ids, max_new_tokens=count).tokens)


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4-rtn"])
def test_golden(artifact: Callable[[str], Artifact], exported: Artifact, request: Any, recipe: str) -> None:
    made = artifact(recipe)
    graph = ir.load(made.model_path).graph
    found = made.evaluate(TEXT, reference=exported, context=256, tokens=256)
    facts = {
        "nodes": len(graph),
        "operators": dict(sorted(Counter(node.op_type for node in graph).items())),
        "megabytes": round(made.nbytes / 1e6, 1),
        "kl": float(f"{found.kl:.3g}") if found.kl > 1e-6 else 0.0,
        "greedy": greedy(made, PROMPTS[0], 16),
    }
    path = HERE / f"smollm2-135m.{recipe}.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps(facts, indent=1) + "\n")
    golden = json.loads(path.read_text())
    kl, golden_kl = facts.pop("kl"), golden.pop("kl")
    tokens, golden_tokens = facts.pop("greedy"), golden.pop("greedy")
    assert facts == golden
    # Kernels of other processors round otherwise; 3 % of a divergence, and the first words, hold on all of them.
    assert kl == pytest.approx(golden_kl, rel=0.03, abs=1e-6)
    assert tokens[:4] == golden_tokens[:4]


def test_sizes_and_node_counts(artifact: Callable[[str], Artifact]) -> None:
    operators = Counter(node.op_type for node in ir.load(artifact("fp32").model_path).graph)
    assert sum(operators.values()) <= 400
    assert operators["GroupQueryAttention"] == 30
    assert operators["SkipSimplifiedLayerNormalization"] == 60
    assert artifact("int8").nbytes <= 150e6
    assert artifact("int4-rtn").nbytes <= 97e6


def test_greedy_equals_transformers(artifact: Callable[[str], Artifact], exported: Artifact) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from onnxpress.models.zoo import fetch

    gguf = Path(fetch("smollm2-135m"))
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ours = artifact("fp32").load(threads=2)
    for prompt in PROMPTS:
        ids = list(ours.tokenizer.encode(prompt))
        got = list(ours.generate(ids, max_new_tokens=64).tokens)
        # What transformers would choose after each of these beginnings: one pass instead of a step for each token.
        with torch.no_grad():
            logits = theirs(torch.tensor([ids + got])).logits[0, len(ids) - 1 : -1]
        assert len(logits) == len(got) > 0
        best = logits.max(dim=-1).values
        chosen = logits[torch.arange(len(got)), torch.tensor(got)]
        behind = (best - chosen).tolist()
        # More than 0 is a tie within rounding.
        assert max(behind) < 1e-3, f"{prompt!r}: token {behind.index(max(behind))} differs"
        assert len(got) == 64 or got[-1] in np.atleast_1d(theirs.generation_config.eos_token_id), prompt


def test_loads_in_optimum(artifact: Callable[[str], Artifact]) -> None:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    made = artifact("int4-rtn")
    tokenizer = AutoTokenizer.from_pretrained(made.directory)
    model = ORTModelForCausalLM.from_pretrained(made.directory, provider="CPUExecutionProvider")
    ids = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        theirs = model.generate(**ids, do_sample=False, max_new_tokens=16)[0, ids["input_ids"].shape[1] :].tolist()
    assert theirs == greedy(made, PROMPTS[0], len(theirs))


def test_left_padded_batch_equals_single(artifact: Callable[[str], Artifact]) -> None:
    session = artifact("fp32").session(threads=2)
    rng = np.random.default_rng(0)
    short, long = rng.integers(3, 4000, 5), rng.integers(3, 4000, 9)
    batch = np.zeros((2, 9), np.int64)
    batch[0, 4:], batch[1] = short, long
    mask = np.ones((2, 9), np.int64)
    mask[0, :4] = 0
    logits = session.run_logits(batch, mask)[:, -1].copy()
    for row, ids in enumerate((short, long)):
        alone = session.run_logits(ids[None])[0, -1]
        assert np.abs(logits[row] - alone).max() < 1e-3


def test_golden_errors_of_fitted_matrices(artifact: Callable[[str], Artifact], tmp_path: Path, request: Any) -> None:
    """What gptq leaves of the first two blocks' outputs; the whole model takes minutes (`benchmarks/quality.py`)."""
    others = "exclude=('block[2-9].*', 'block[12][0-9].*', 'head', 'embedding')"
    made = onnxpress.optimize(
        artifact("fp32").directory,
        output=tmp_path / "fitted",
        passes=f"gptq(bits=4, block_size=32, tokens=2048, length=512, {others})",
        calibration="english",
        measure=False,
    )
    rows = made.report["passes"][-1]["ledger"]
    facts = {row["site"]: float(f"{row['output_error']:.3g}") for row in rows}
    path = HERE / "smollm2-135m.gptq.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps(facts, indent=1) + "\n")
    assert facts == pytest.approx(json.loads(path.read_text()), rel=0.03)
