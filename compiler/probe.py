"""Runs a saved model on sample inputs, to see what a pass did to its outputs.

Understands decoders (token ids, attention mask, positions, key-value cache) and encoders; anything else gets random
numbers of the shapes that the graph declares. This is the compiler's own small harness: graph optimizations of ONNX
Runtime can be off, so that what is compared is the graph as it was written.

Axes: B batch, S tokens of a step, P tokens in the cache, T = P + S, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnxpress.compiler.threads import session_threads

Array = npt.NDArray[Any]

_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
# Sizes for symbolic dimensions of inputs that are not text; the first word found in the dimension's name counts.
_SIZES = {"batch": 2, "channel": 3, "height": 224, "width": 224}
# Sizes for all others, under this key: a graph does not say what its pads and strides need, so they are tried in turn.
_FREE = ""
_LENGTHS = (8, 32, 64, 224, 256, 512, 576, 640)
# Whether a nameless size in front of fixed ones, as in [2, ?, 128], is the batch.
_MIDDLE = "between"


@dataclass(frozen=True)
class Step:
    """One call of a decoder.

    Attributes:
        ids: [B, S], token ids.
        mask: [B, T], 1 for a token, 0 for padding; the cache included.
        cache: arrays by input name; {} for an empty cache.
    """

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    cache: Mapping[str, Array] = field(default_factory=dict)


class Probe:
    """A session on the CPU with one thread order and, by default, no graph optimizations."""

    def __init__(
        self,
        model: Path | bytes,
        *,
        optimized: bool = False,
        threads: int = 0,
        prepacked: bool = True,
        folder: Path | None = None,
        shapes: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Loads a model.

        Args:
            model: the graph file, or what would be its content.
            optimized: let ONNX Runtime optimize the graph.
            threads: 0 for as many as are allowed (`threads.limited`), by default one for each physical core.
            prepacked: copy weights into the layout that the kernels like; without it float weights stay mapped from
                the file, which is slower per call and needs hardly any memory.
            folder: where the files with the weights lie, for a model that is given as bytes.
            shapes: of inputs by name, where more is known than the file declares.
        """
        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or session_threads()
        options.log_severity_level = 4
        options.enable_mem_pattern = False
        if not prepacked:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        content = model if isinstance(model, bytes) else str(model)
        self.session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self._shapes = shapes or {}

    @property
    def is_language_model(self) -> bool:
        """Whether it maps token ids to logits."""
        return "input_ids" in self.inputs and "logits" in self.outputs

    def logits(self, ids_BS: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """float32 [B, S, V] of unpadded token ids, without a cache."""
        feeds = self.decoder_feeds(Step(ids_BS, np.ones_like(ids_BS)))
        (result,) = self.session.run(["logits"], feeds)
        return np.asarray(result, dtype=np.float32)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name."""
        return dict(zip(self.outputs, self.session.run(None, dict(feeds)), strict=True))

    def decoder_feeds(self, step: Step) -> dict[str, Array]:
        """Inputs of a decoder or text encoder for one step; what an encoder gave a decoder is random, and stays."""
        (batch, length), total = step.ids.shape, step.mask.shape[1]
        positions_BT = np.maximum(np.cumsum(step.mask, axis=1) - 1, 0)
        known = {
            "input_ids": step.ids,
            "attention_mask": step.mask,
            "position_ids": positions_BT[:, total - length :],
            "token_type_ids": np.zeros_like(step.ids),
            "use_cache_branch": np.array([bool(step.cache)]),
        }
        feeds: dict[str, Array] = {}
        for name, value in self.inputs.items():
            if name in known:
                feeds[name] = known[name].astype(_TYPES[value.type], copy=False)
            elif name in step.cache:
                feeds[name] = step.cache[name]
            elif "past" in name and not _is_of_encoder(value):
                feeds[name] = np.zeros(_fill(self._shapes.get(name, value.shape), {0: batch}, 0), _TYPES[value.type])
            else:
                feeds[name] = _random(name, value, sizes={"batch": batch})
        return feeds

    def random_feeds(self, seed: int = 0, sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
        """Inputs of any model: random numbers of the declared shapes; the same for every model with these inputs.

        Args:
            seed: of the numbers.
            sizes: word in the name of a symbolic dimension ("height", "width", "channel", ...) to its size.
        """
        return {name: _random(name, value, seed, sizes or {}) for name, value in self.inputs.items()}

    def run_random(self, seed: int, sizes: dict[str, int]) -> dict[str, Array]:
        """All outputs for `random_feeds`. Free sizes are tried until the model runs and then noted in `sizes`, so that
        another form of the model gets the same inputs.

        Raises:
            Exception: what ONNX Runtime says to the first sizes, when it runs with none.
        """
        if _FREE in sizes or not any(_is_free(dim) for one in self.inputs.values() for dim in one.shape):
            return self.run(self.random_feeds(seed, sizes))
        first: Exception | None = None
        for middle in (False, True):
            for length in _LENGTHS:
                tried = {**sizes, _FREE: length, **({_MIDDLE: _SIZES["batch"]} if middle else {})}
                try:
                    outputs = self.run(self.random_feeds(seed, tried))
                except Exception as error:  # ORT has one exception type per C++ code
                    first = first or error
                else:
                    sizes.update(tried)
                    return outputs
        assert first is not None
        raise first

    def next_cache(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        """What a decoder's outputs are as cache inputs of the next step, paired in the order of declaration."""
        pasts = [name for name, value in self.inputs.items() if "past" in name and not _is_of_encoder(value)]
        presents = [name for name in self.outputs if "present" in name]
        by_name = {name.replace("present", "past_key_values"): name for name in presents}
        if all(past in by_name for past in pasts):
            return {past: outputs[by_name[past]] for past in pasts}
        return {past: outputs[present] for past, present in zip(pasts, presents, strict=True)}


def random_inputs(graph: ir.Graph, seed: int, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs of a graph as `Probe.random_feeds` gives them, without a session."""
    found = {}
    for value in graph.inputs:
        if value.name in graph.initializers:
            continue
        dims = [] if value.shape is None else [one if isinstance(one, int) else str(one) for one in value.shape]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        known = next((name for name, one in _TYPES.items() if np.dtype(one) == dtype), str(dtype))
        found[str(value.name)] = _random(str(value.name), SimpleNamespace(shape=dims, type=known), seed, sizes)
    return found


def image_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of an image model's inputs by the word in the dimension's name, from its `config.json`."""
    vision = config.get("vision_config") or config
    side = vision.get("image_size")
    height, width = side if isinstance(side, list | tuple) and len(side) == 2 else (side, side)
    found = {"height": height, "width": width, "channel": vision.get("num_channels")}
    return {word: size for word, size in found.items() if isinstance(size, int)}


def log_softmax(logits_TV: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Natural logarithms of the probabilities along the last axis."""
    result = np.empty(logits_TV.shape, logits_TV.dtype)
    width = logits_TV.shape[-1]
    # Row by row: one fits the cache, and a temporary array of them all costs more than the arithmetic.
    for row, out in zip(logits_TV.reshape(-1, width), result.reshape(-1, width), strict=True):
        np.subtract(row, row.max(), out=out)
        out -= np.float32(np.log(np.exp(out).sum(dtype=np.float64)))
    return result


def kl_divergence(log_p_TV: npt.NDArray[np.float32], log_q_TV: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """KL(p || q) in nats for each row; never below 0."""
    rows = zip(log_p_TV, log_q_TV, strict=True)
    kl_T = np.array([(np.exp(p_V) * (p_V - q_V)).sum(dtype=np.float64) for p_V, q_V in rows])
    np.maximum(kl_T, 0.0, out=kl_T)
    return kl_T


def _is_of_encoder(value: Any) -> bool:
    """Whether an input has as many rows as an encoder has tokens; a decoder's cache of them does not grow."""
    return any("encoder" in str(dim) for dim in value.shape)


def _random(name: str, value: Any, seed: int = 0, sizes: Mapping[str, int] | None = None) -> Array:
    """Normal numbers for floats, small whole numbers else; seeded by the input's name, so that it is the same for two
    models that declare their inputs in another order."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    shape = _fill(value.shape, {}, None, {**_SIZES, **(sizes or {})})
    if "token_type" in name:
        return np.zeros(shape, _TYPES[value.type])  # two types, or one: no number that others may have
    if value.type not in _TYPES:
        raise ValueError(f"input {name!r} takes {value.type}, of which there are no random samples")
    dtype = _TYPES[value.type]
    if np.issubdtype(dtype, np.floating):
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    return rng.integers(0, 2 if dtype is np.bool_ else 8, shape).astype(dtype)


def _is_free(dim: Any) -> bool:
    """Whether neither the graph nor the name of the dimension says how large it is."""
    return not isinstance(dim, int) and not any(word in str(dim or "").lower() for word in _SIZES)


def _fill(
    shape: Sequence[Any], given: Mapping[int, int], rest: int | None, named: Mapping[str, int] | None = None
) -> list[int]:
    """A shape with numbers for its symbolic dimensions."""
    sizes = []
    for axis, dim in enumerate(shape):
        if isinstance(dim, int):
            sizes.append(dim)
        elif axis in given:
            sizes.append(given[axis])
        elif rest is not None:
            sizes.append(rest)
        else:
            word = str(dim or "").lower()
            known = named or {}
            is_between = _MIDDLE in known and isinstance(shape[-1], int)
            rest_of = known[_MIDDLE] if is_between else 2 if axis == 0 else known.get(_FREE, _LENGTHS[0])
            sizes.append(next((size for key, size in known.items() if key and key in word), rest_of))
    return sizes
