"""LoRA adapters for tests: written by hand, or trained by PEFT on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.compiler import safetensors_file

Array = np.ndarray
PREFIX = "base_model.model."


def factors(shape: tuple[int, int], rank: int = 2, seed: int = 0, scale: float = 0.2) -> tuple[Array, Array]:
    """Random A [rank, K] and B [N, rank] of a linear of `shape` (N, K)."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, shape[1])), rng.standard_normal((shape[0], rank))
    return (scale * a).astype(np.float32), (scale * b).astype(np.float32)


def write_adapter(
    directory: Path,
    modules: Mapping[str, tuple[int, int] | tuple[Array, Array]],
    *,
    rank: int = 2,
    arrays: Mapping[str, Array] | None = None,
    **config: Any,
) -> Path:
    """A PEFT directory; `modules` to (N, K) or to (A, B), `arrays` are written as they are, `config` overrides."""
    directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, Array] = {}
    for number, (module, what) in enumerate(modules.items()):
        a, b = factors(what, rank, number) if isinstance(what[0], int) else what
        found |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    safetensors_file.write(directory / "adapter_model.safetensors", {**found, **(arrays or {})})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def trained(checkpoint: Path, directory: Path, steps: int = 4, **config: Any) -> tuple[Array, Array, Array]:
    """Trains an adapter with PEFT for a few steps and saves it.

    Returns:
        token ids [1, S], and the logits that torch gives for them with the adapter beside the weights and merged.
    """
    import peft
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
        model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
        model.train()
        for _ in range(steps):
            tokens = torch.randint(3, 200, (2, 12))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        model.save_pretrained(directory)
        ids = torch.randint(3, 200, (1, 9))
        with torch.no_grad():
            beside = model(input_ids=ids).logits.numpy()
            merged = model.merge_and_unload()(input_ids=ids).logits.numpy()
    return ids.numpy(), beside, merged
