"""LoRA adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.

    y = x W^T + scale (x A^T) B^T      W [N, K], A [r, K], B [N, r], scale = alpha / r (alpha / sqrt(r) of rsLoRA)

What is read is what can be computed with: everything else that PEFT may have trained (biases, whole modules, base
weights changed at the start) is refused by name, never dropped.

Paper:   Hu et al., arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353
Axes:    N out features, K in features, R rank
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.compiler import safetensors_file
from onnxpress.compiler.errors import BadModelFileError, UnsupportedModelError

Floats = npt.NDArray[np.float32]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_MAX_CONFIG = 1 << 20  # bytes
_MAX_PATTERN = 200  # characters
_MAX_REPEATS = 2
_MAX_MODULE = 512  # characters of a name; two repetitions take time that grows with its square
_MAX_ALPHA = 1e30
_SLOW = re.compile(r"[({]")  # what repetitions within repetitions need
_PREFIX = "base_model.model."
_KEY = re.compile(r"^(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.weight)?$")
# Ways to begin that change the base weights too: such an adapter means nothing without them.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Settings that train something that A and B do not hold, with what it is.
_BEYOND = {
    "modules_to_save": "whole modules",
    "layer_replication": "repeated layers",
    "target_parameters": "parameters that belong to no linear",
    "trainable_token_indices": "rows of the token table",
    "alora_invocation_tokens": "an adapter that begins inside of the text",
    "use_qalora": "pooled inputs",
    "lora_bias": "biases of its own",
    "use_bdlora": "blocks on a diagonal",
    "kasa_config": "singular values of the base",
    "monteclora_config": "distributions of weights",
    "ensure_weight_tying": "weights tied to those of another module",
    "megatron_config": "weights spread over devices",
}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one module.

    Attributes:
        module: its path in the model, "model.layers.0.self_attn.q_proj".
        a_RK: float32 [R, K]; of a token table K counts its rows.
        b_NR: float32 [N, R], `scale` multiplied in.
        magnitude_N: length of each row of the sum, of DoRA; None for plain LoRA.
        is_table: whether the module is a token table: b_NR a_RK is then the transposed update of its rows.
    """

    module: str
    a_RK: Floats
    b_NR: Floats
    magnitude_N: Floats | None = None
    is_table: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return len(self.a_RK)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return len(self.b_NR), self.a_RK.shape[1]

    def delta(self, rows: npt.NDArray[np.int64] | None = None) -> Floats:
        """B A, float32 [N, K], or those `rows` of it."""
        b_NR = self.b_NR if rows is None else self.b_NR[rows]
        return np.asarray(b_NR @ self.a_RK, np.float32)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: the directory it came from.
        updates: by module.
        base: name of the model it was trained on, "" when the config does not say.
        digest: SHA-256 of the weights and the config.
    """

    path: Path
    updates: Mapping[str, Update]
    base: str = ""
    digest: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of an update."""
        return max(one.rank for one in self.updates.values())


def is_peft(path: Path) -> bool:
    """Whether `path` is a directory that looks like a PEFT adapter."""
    return path.is_dir() and ((path / CONFIG).is_file() or any((path / name).is_file() for name in _PICKLES))


def read_peft(directory: str | Path) -> Adapter:
    """The adapter in a PEFT directory.

    Raises:
        BadModelFileError: a file is missing or damaged, or shapes, names or types do not fit together.
        UnsupportedModelError: the adapter is whole, but of a kind that has no place in a graph.
    """
    directory = Path(directory).expanduser()
    config = _read_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        pickles = [name for name in _PICKLES if (directory / name).is_file()]
        if pickles:
            raise UnsupportedModelError(
                f"{directory / pickles[0]}: a pickle, which can run code when it is read",
                hint="save the adapter again with save_pretrained(..., safe_serialization=True)",
            )
        raise BadModelFileError(f"{directory}: expected {WEIGHTS}, found none", hint="fetch the adapter's weights too")
    arrays = safetensors_file.read(path)
    updates = _updates(path, arrays, config)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    base = config.get("base_model_name_or_path")
    return Adapter(directory, updates, base if isinstance(base, str) else "", digest.hexdigest())


def write_peft(
    directory: Path, updates: Iterable[Update], *, base: str, rank: int, turned: bool = False, notes: str = ""
) -> None:
    """Writes a PEFT directory, scale 1.

    Args:
        directory: exists.
        updates: plain LoRA, of linears and token tables.
        base: what the adapter belongs to, for the config.
        rank: of updates that have no smaller one.
        turned: the linears of the checkpoint store [K, N] (Conv1D of GPT-2).
    """
    updates = list(updates)
    pattern = {one.module: one.rank for one in updates if one.rank != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": [one.module for one in updates],
        "bias": "none",
        "fan_in_fan_out": turned,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    arrays: dict[str, Floats] = {}
    for one in updates:
        names = ("lora_embedding_A", "lora_embedding_B") if one.is_table else ("lora_A.weight", "lora_B.weight")
        for name, array in zip(names, (one.a_RK, one.b_NR), strict=True):
            arrays[f"{_PREFIX}{one.module}.{name}"] = array
    safetensors_file.write(directory / WEIGHTS, arrays, {"format": "pt", **({"made by": notes} if notes else {})})


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.exists():
        raise BadModelFileError(f"{directory}: no such directory", hint="give the directory of a PEFT adapter")
    if not path.is_file():
        raise BadModelFileError(
            f"{directory}: expected a PEFT adapter, found no {CONFIG}",
            hint="give the directory that PEFT's save_pretrained wrote",
        )
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise BadModelFileError(f"{path}: expected at most {_MAX_CONFIG} bytes, found {path.stat().st_size}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelFileError(f"{path}: expected JSON: {str(error)[:120]}", hint="save the adapter again") from error
    if not isinstance(config, dict):
        raise BadModelFileError(f"{path}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{path}: expected peft_type 'LORA', found {kind!r}", hint="only LoRA has a place here"
        )
    if (bias := config.get("bias", "none")) != "none":
        raise UnsupportedModelError(
            f"{path}: expected bias 'none', found {bias!r}: biases were trained too",
            hint="merge it in PEFT (merge_and_unload), and export the result",
        )
    for name, what in _BEYOND.items():
        if config.get(name):
            raise UnsupportedModelError(
                f"{path}: expected plain LoRA, found {name}={config[name]!r}: the adapter holds {what}"[:300],
                hint="merge it in PEFT (merge_and_unload), and export the result",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UnsupportedModelError(
            f"{path}: init_lora_weights {start!r} changed the base weights, which the adapter does not hold",
            hint="save it with path_initial_model_for_weight_conversion, which makes plain LoRA of it",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise BadModelFileError(f"{path}: expected {name} as an object, found {config[name]!r}")
    return config


def _updates(path: Path, arrays: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Update]:
    sides: dict[str, dict[str, Any]] = {}
    for key, array in arrays.items():
        if key.endswith(".base_layer.weight"):  # a copy of the frozen weight, which PEFT adds for heads and tables
            continue
        match, magnitude = _KEY.match(key), _MAGNITUDE.match(key)
        if match is None and magnitude is None:
            raise BadModelFileError(
                f"{path}: expected keys as '<module>.lora_A.weight', found {key[:120]!r}",
                hint="the file holds more than LoRA weights, or another tool wrote it",
            )
        if len(key) > _MAX_MODULE:
            raise BadModelFileError(
                f"{path}: expected names of at most {_MAX_MODULE} characters, found {len(key)}: {key[:60]!r}",
                hint="the file was not written by PEFT",
            )
        if array.dtype.kind not in "fV" or array.dtype.itemsize < 2:
            raise BadModelFileError(f"{path}: expected {key!r} in a float type, found {array.dtype}")
        module = (match or magnitude).group(1).removeprefix(_PREFIX)  # type: ignore[union-attr]
        side = "m" if match is None else match.group(3)
        entry = sides.setdefault(module, {})
        entry["is_table"] = entry.get("is_table", False) or bool(match and match.group(2))
        if side in entry:
            raise BadModelFileError(f"{path}: expected one lora_{side} of {module!r}, found two")
        entry[side] = np.asarray(array, np.float32)
        if not np.isfinite(entry[side]).all():
            raise BadModelFileError(f"{path}: expected finite numbers in {key!r}, found NaN or infinity")
    if not sides:
        raise BadModelFileError(f"{path}: expected LoRA weights, found no arrays", hint="save the adapter again")
    return {module: _update(path, module, entry, config) for module, entry in sides.items()}


def _update(path: Path, module: str, entry: Mapping[str, Any], config: Mapping[str, Any]) -> Update:
    for side in "AB":
        if side not in entry:
            raise BadModelFileError(f"{path}: expected lora_A and lora_B of {module!r}, found no lora_{side}")
    a, b, magnitude = entry["A"], entry["B"], entry.get("m")
    if a.ndim != 2 or b.ndim != 2:
        raise UnsupportedModelError(
            f"{path}: expected matrices for {module!r}, found shapes {list(a.shape)} and {list(b.shape)}",
            hint="adapters of convolutions have no place here",
        )
    rank = _pattern(config.get("rank_pattern") or {}, module, config.get("r"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise BadModelFileError(f"{path.with_name(CONFIG)}: expected r of at least 1, found {rank!r}")
    if len(a) != rank or b.shape[1] != rank:
        raise BadModelFileError(
            f"{path}: {module!r}: expected rank {rank} (adapter_config.json), found lora_A {list(a.shape)} and "
            f"lora_B {list(b.shape)}",
            hint="config and weights belong to different adapters",
        )
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < _MAX_ALPHA:
        raise BadModelFileError(
            f"{path.with_name(CONFIG)}: expected a number as lora_alpha, found {alpha!r}"[:300],
            hint="alpha is usually 1 to 4 times the rank",
        )
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
        if len(magnitude) != len(b) or entry["is_table"]:
            raise BadModelFileError(
                f"{path}: {module!r}: expected a magnitude for each of {len(b)} rows of a linear, "
                f"found {len(magnitude)}"
            )
    elif config.get("use_dora"):
        raise BadModelFileError(f"{path}: {module!r}: expected a magnitude vector (use_dora), found none")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.asarray(np.float32(scale) * b, np.float32)
    if not np.isfinite(scaled).all():
        raise BadModelFileError(
            f"{path.with_name(CONFIG)}: expected a lora_alpha that keeps {module!r} finite, found {alpha:g}",
            hint="alpha is usually 1 to 4 times the rank",
        )
    return Update(module, a, scaled, magnitude, entry["is_table"])


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The entry for a module, as PEFT finds it: keys are whole endings of its path, or regular expressions for one.

    Raises:
        UnsupportedModelError: a key is no regular expression, or one that might take for ever.
    """
    for key, value in patterns.items():
        if _SLOW.search(key) or len(re.findall(r"[*+?]", key)) > _MAX_REPEATS or len(key) > _MAX_PATTERN:
            raise UnsupportedModelError(
                f"{CONFIG}: expected names or simple patterns of names, found {key[:80]!r}",
                hint="write the names of the modules out in rank_pattern and alpha_pattern",
            )
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise UnsupportedModelError(f"{CONFIG}: expected a pattern, found {key[:80]!r}: {error}") from error
    return default
