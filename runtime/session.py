"""A decoder in ONNX Runtime: what its inputs mean, and a decode loop that allocates and binds nothing it need not.

The same code serves graphs of three families. They differ in how the cache grows, which is read off the graph:

* every reader of the past is a GroupQueryAttention: one buffer of full length is bound as past and present, and the
  operator appends in place;
* anything else (Concat, Attention): the present of one step becomes the past of the next, on the device;
* no cache at all: the whole text is run again for every token.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnxpress.compiler.errors import BadModelFileError, OptionError, UnsupportedModelError
from onnxpress.runtime import pages as _pages
from onnxpress.runtime import providers as _providers
from onnxpress.runtime import skeleton as _skeleton
from onnxpress.runtime.adapters import NO_ADAPTER, Adapter, Adapters, find_slots
from onnxpress.runtime.config import ModelConfig, find_model, read_config

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

# Logits of a prompt are computed in pieces of at most this many bytes where the graph allows pieces.
PREFILL_LOGITS_BYTES = 256 << 20

# A long prompt goes through in pieces of about so many tokens: attention over its own triangle alone costs less than
# over the square that one piece would make, and what an operator gives fits the cache.
PREFILL_TOKENS = 256

# A graph may end in `Slice(hidden, -logits_to_keep)`, the count being a weight with a default that a feed overrides:
# then a prompt does not pay for logits that nobody reads.
_KEEP_NAMES = ("logits_to_keep", "num_logits_to_keep")

# Workers wait so many microseconds for the next operator before they sleep. One decode step is hundreds of small
# operators in a row: not to wait costs a fifth on a quiet machine. Between two steps lie some 200 us without work for
# them. To wait as long as ORT does by itself, a millisecond, gains no more, and costs where another program runs.
_ENTRIES = {"session.intra_op.spin_duration_us": "300"}

_MASKS_AT_ONCE = 64

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": np.uint16}
_NUMPY |= {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
_NUMPY |= {"tensor(float8e4m3fn)": np.uint8}
_QUANTIZED = ("tensor(int8)", "tensor(uint8)", "tensor(float8e4m3fn)")
_ONNX = {"tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(int32)": 6, "tensor(int64)": 7}
_ONNX |= {"tensor(float16)": 10, "tensor(bfloat16)": 16, "tensor(float8e4m3fn)": 17}


@dataclass(frozen=True)
class CacheTensor:
    """One key or value tensor of one layer: where it enters and leaves, heads, elements of a head, and their type.

    A quantized cache is int8, or uint8 with two numbers of 4 bits in an element.
    """

    past: str
    present: str
    heads: int
    head_dim: int
    type: str


@dataclass(frozen=True)
class Interface:
    """What the inputs and outputs of a decoder graph are.

    Attributes:
        cache: key and value tensors, in the order of the inputs; empty for a graph without a cache.
        shares_cache: one buffer can be past and present.
        chunks_batches: several sequences may be fed in several pieces of more than one token.
        pads_left: shorter sequences of a batch may be padded on the left.
        last_only: the graph yields the logits of the last token alone.
        keep: the overridable weight that says how many logits to compute.
    """

    ids: str
    logits: str
    vocab_size: int
    logits_type: str
    cache: tuple[CacheTensor, ...]
    mask: str | None
    positions: str | None
    types: Mapping[str, str]
    shares_cache: bool
    chunks_batches: bool
    pads_left: bool
    last_only: bool
    keep: str | None
    max_batch: int | None

    @property
    def has_quantized_cache(self) -> bool:
        """Whether keys and values are rounded as they are stored."""
        return any(tensor.type in _QUANTIZED for tensor in self.cache)


class DecoderSession:
    """A language model loaded into ONNX Runtime. Holds no text: `begin` starts one, and several may run side by side.

    Args:
        path: an .onnx file, or a directory with one; the settings beside it are read too.
        provider: auto, cpu or cuda.
        threads: of one operator; None is one per physical core.
        strict: fail instead of falling back from CUDA to the CPU, with the whole model or with single nodes.
        entries: further session configuration entries of ONNX Runtime.

    Raises:
        BadModelFileError: the file or its external data is missing, truncated or no model.
        UnsupportedModelError: the graph is no decoder.
        ProviderError: `strict`, and the provider does not work.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        strict: bool = False,
        entries: Mapping[str, str] | None = None,
    ) -> None:
        self.path = find_model(path)
        self.config: ModelConfig = read_config(self.path.parent)
        graph = _skeleton.read(self.path)
        _skeleton.check_external_data(graph)
        self.choice = _providers.choose(provider, strict=strict)
        self.ort = open_session(self.path, self.choice.providers, threads=threads, entries=entries)
        if self.choice.provider == "cpu":
            _pages.use_huge_pages_soon()
        if self.choice.provider == "cuda" and _providers.CUDA not in self.ort.get_providers():
            raise BadModelFileError(f"{self.path}: expected a CUDA session, got {self.ort.get_providers()}")
        if strict and self.choice.provider == "cuda":
            from onnxpress.runtime.placement import audit

            audit(self.path, "cuda", strict=True)
        self.interface = discover(self.ort, graph, self.config)
        self.adapters = Adapters(self.path, find_slots(self.ort), self.choice.provider)
        self.device = self.choice.provider
        self._scratch: npt.NDArray[Any] = np.empty(0, np.uint8)
        logger.info("%s: %s, cache %s", self.path, self.choice.reason, self._cache_kind())

    def _cache_kind(self) -> str:
        if not self.interface.cache:
            return "absent"
        return "shared" if self.interface.shares_cache else "growing"

    @property
    def context_length(self) -> int | None:
        """Tokens the model was made for, if the settings beside it say so."""
        return self.config.context_length

    @property
    def vocab_size(self) -> int:
        """Number of logits per token."""
        return self.interface.vocab_size

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Reads an adapter for the slots of this graph; see `onnxpress.runtime.adapters.Adapters.load`."""
        return self.adapters.load(path, name)

    def begin(self, batch: int = 1, max_length: int = 2048, adapter: str | None = None) -> Decoding:
        """Starts `batch` texts that together grow to at most `max_length` tokens, prompt and padding included.

        Args:
            adapter: name of a loaded adapter, which serves these texts to their end; None is `adapters.default`.
        """
        limit = self.interface.max_batch
        if batch < 1 or (limit is not None and batch > limit):
            raise OptionError(f"batch: expected 1 to {limit or 'any'} sequences for {self.path.name}, got {batch}")
        return Decoding(self, batch, max_length, self.adapters.find(adapter))

    def run_logits(
        self, ids_BS: npt.ArrayLike, mask_BS: npt.ArrayLike | None = None, *, adapter: str | None = None
    ) -> Floats:
        """The logits of every token of whole sequences, the cache neither kept nor fetched.

        Args:
            ids_BS: token ids, `[B, S]`.
            mask_BS: 0 where a sequence is padded on its left; None is no padding.
            adapter: name of a loaded adapter, "" for none; None is `adapters.default`.

        Returns:
            float32 logits `[B, S, V]`: a view of a buffer that the next call overwrites, where the graph computes in
            float32.

        Raises:
            UnsupportedModelError: the graph yields the logits of the last token alone.
        """
        face = self.interface
        if face.last_only:
            raise UnsupportedModelError(
                f"{self.path}: expected logits of every token, the graph gives those of the last one",
                hint="export or optimize the model without pruning its head",
            )
        ids = np.ascontiguousarray(ids_BS, dtype=_NUMPY[face.types[face.ids]])
        batch, length = ids.shape
        mask = np.ones((batch, length), np.int64) if mask_BS is None else np.asarray(mask_BS, np.int64)
        binding = self.ort.io_binding()
        feeds = {face.ids: ids}
        if face.mask:
            feeds[face.mask] = np.ascontiguousarray(mask, dtype=_NUMPY[face.types[face.mask]])
        if face.positions:
            feeds[face.positions] = positions_of(mask).astype(_NUMPY[face.types[face.positions]])
        for name, values in feeds.items():
            bind_array(binding, name, values)
        for tensor in face.cache:
            empty = np.zeros((batch, tensor.heads, 0, tensor.head_dim), _NUMPY[tensor.type])
            binding.bind_ortvalue_input(tensor.past, host_value(empty, tensor.type))
        logits = self._logits_buffer(batch * length).reshape(batch, length, face.vocab_size)
        bind_array(binding, face.logits, logits, output=True, type_=face.logits_type)
        self.adapters.find(adapter).bind(binding)
        self.ort.run_with_iobinding(binding)
        return as_float32(logits)

    def keep_value(self, count: int) -> npt.NDArray[Any]:
        """What to feed the overridable weight that says how many logits to compute."""
        value = next(value for value in self.ort.get_overridable_initializers() if value.name == self.interface.keep)
        return np.full(value.shape, count, _NUMPY[value.type])

    def _logits_buffer(self, rows: int) -> npt.NDArray[Any]:
        """`[rows, V]` of the one scratch buffer: fresh pages for every call would cost more than the copy."""
        count = rows * self.vocab_size
        dtype = np.dtype(_NUMPY[self.interface.logits_type])
        if self._scratch.nbytes < count * dtype.itemsize:
            self._scratch = np.empty(count * dtype.itemsize, np.uint8)
        return self._scratch[: count * dtype.itemsize].view(dtype).reshape(rows, self.vocab_size)


class Decoding:
    """One batch of texts as they grow: the cache, and buffers that are bound once and written in place.

    Every array of logits that a method returns is overwritten by the next call.
    """

    def __init__(self, session: DecoderSession, batch: int, max_length: int, adapter: Adapter = NO_ADAPTER) -> None:
        if max_length < 1:
            raise OptionError(f"max_length: expected at least 1, got {max_length}")
        self.session = session
        self.adapter = adapter
        self.batch = batch
        self.max_length = max_length
        self.length = 0  # tokens in the cache, padding included
        self._face = face = session.interface
        self._host = session.device == "cpu"
        self._padding_B = np.zeros(batch, np.int64)
        self._mask = np.ones((batch, max_length), self._numpy(face.mask))
        self._padded = False
        # Rows of a mask of any length, all ones: a prefix of this buffer. Padded masks are laid out anew.
        self._flat_mask = np.ones(batch * max_length, self._mask.dtype)
        self._flat_mask_address = self._flat_mask.ctypes.data
        self._ids_B1 = np.zeros((batch, 1), self._numpy(face.ids))
        self._positions_B1 = np.zeros((batch, 1), self._numpy(face.positions))
        self._id_view: Any = memoryview(self._ids_B1.reshape(-1))  # type: ignore[arg-type]
        self._position_view: Any = memoryview(self._positions_B1.reshape(-1))  # type: ignore[arg-type]
        self._is_simple = batch == 1 and self._host
        self._masks: dict[int, ort.OrtValue] = {}
        self._logits_B1V = np.empty((batch, 1, face.vocab_size), _NUMPY[face.logits_type])
        self._logits_BV: npt.NDArray[Any] = self._logits_B1V[:, 0]
        self._is_float32 = self._logits_B1V.dtype == np.float32
        self._history = np.zeros((batch, 0 if face.cache else max_length), self._ids_B1.dtype)
        self._past: dict[str, ort.OrtValue] = {}
        self._make_cache()
        self._step = self._bind_step()
        self._ort_run = session.ort.run_with_iobinding

    def _numpy(self, name: str | None) -> Any:
        return _NUMPY[self._face.types[name]] if name else np.int64

    def _make_cache(self) -> None:
        length = self.max_length if self._face.shares_cache else 0
        for tensor in self._face.cache:
            shape = (self.batch, tensor.heads, length, tensor.head_dim)
            if self._host or length == 0:
                # The pages of np.zeros are not touched before the cache grows into them.
                self._past[tensor.past] = host_value(np.zeros(shape, _NUMPY[tensor.type]), tensor.type)
            else:
                self._past[tensor.past] = ort.OrtValue.ortvalue_from_shape_and_type(
                    shape, _ONNX[tensor.type], self.session.device, 0
                )

    def _bind_cache(self, binding: ort.IOBinding) -> None:
        for tensor in self._face.cache:
            value = self._past[tensor.past]
            binding.bind_ortvalue_input(tensor.past, value)
            if self._face.shares_cache:
                binding.bind_ortvalue_output(tensor.present, value)
            else:
                binding.bind_output(tensor.present, self.session.device, 0)

    def _bind_step(self) -> ort.IOBinding:
        binding = self.session.ort.io_binding()
        self._bind_cache(binding)
        self.adapter.bind(binding)
        self._bind_step_inputs(binding)
        bind_array(binding, self._face.logits, self._logits_B1V, output=True, type_=self._face.logits_type)
        if self._face.keep:
            self._keep_one = self.session.keep_value(1)
            bind_array(binding, self._face.keep, self._keep_one)
        return binding

    def _bind_step_inputs(self, binding: ort.IOBinding) -> None:
        bind_array(binding, self._face.ids, self._ids_B1)
        if self._face.positions:
            bind_array(binding, self._face.positions, self._positions_B1)

    def prefill(self, ids_BS: npt.ArrayLike, mask_BS: npt.ArrayLike | None = None) -> Floats:
        """Appends tokens, and gives the logits of the last one of each sequence, `[B, V]`.

        Args:
            ids_BS: token ids `[B, S]`, padded on the left.
            mask_BS: 0 where padded; only for the first tokens of a batch.
        """
        ids = np.atleast_2d(np.asarray(ids_BS))
        self._check_room(ids.shape[1])
        if mask_BS is None and (self.batch == 1 or self._face.chunks_batches):
            pieces = np.array_split(ids, self._num_pieces(ids.shape[1]), axis=1)
            for piece in pieces[:-1]:
                self._forward(piece, None, keep=1)
            ids = pieces[-1]
        logits = self._forward(ids, mask_BS, keep=1)[:, -1]
        # The large buffer of the prompt must be free before the text goes on.
        return np.array(logits) if ids.shape[1] > 1 else logits

    def _check_room(self, new: int) -> None:
        if self.length + new > self.max_length:
            raise OptionError(
                f"decoding: expected at most {self.max_length} tokens, got {self.length + new}",
                hint="ask for fewer new tokens, or shorten the prompt",
            )

    def _num_pieces(self, length: int) -> int:
        """In how many pieces a prompt of `length` tokens goes through."""
        count = 1
        if not (self._face.last_only or self._face.keep):
            count = -(-length * self.batch * self._face.vocab_size * 4 // PREFILL_LOGITS_BYTES)
        if self._host and self._face.shares_cache and self.batch == 1:
            count = max(count, round(length / PREFILL_TOKENS))
        return max(1, min(count, length))

    def forward(self, ids_BS: npt.ArrayLike, mask_BS: npt.ArrayLike | None = None) -> Floats:
        """Appends tokens, and gives the logits of all of them, `[B, S, V]` (`[B, 1, V]` of a pruned head)."""
        return self._forward(np.atleast_2d(np.asarray(ids_BS)), mask_BS, keep=None)

    def step(self, ids_B: npt.ArrayLike) -> Floats:
        """Appends one token to each sequence, and gives its logits `[B, V]`: the inner loop of decoding.

        Args:
            ids_B: one token per sequence; of a single sequence the bare number will do, and is fastest.
        """
        total = self.length + 1
        if not self._face.cache or total > self.max_length:
            return self._forward(np.asarray(ids_B).reshape(self.batch, 1), None, keep=1)[:, -1]
        binding = self._step
        if self._is_simple:
            # The weights that stream by leave nothing else in the processor's caches: a call into numpy, two
            # microseconds in a loop of its own, takes ten times as long here. Plain stores do not.
            self._id_view[0] = ids_B if isinstance(ids_B, int) else int(np.asarray(ids_B).reshape(-1)[0])
            self._position_view[0] = self.length
        else:
            self._ids_B1[:, 0] = ids_B
            self._positions_B1[:, 0] = self.length - self._padding_B
            if not self._host:
                self._bind_step_inputs(binding)  # a device has its own copy, made when an input is bound
        if self._face.mask:
            if self._is_simple:
                binding.bind_ortvalue_input(self._face.mask, self._masks.get(total) or self._more_masks(total))
            else:
                self._bind_mask(binding, total)
        if self._face.shares_cache:
            self._ort_run(binding)
        else:
            self._bind_cache(binding)
            self._ort_run(binding)
            self._keep_present(binding)
        self.length = total
        return self._logits_BV if self._is_float32 else as_float32(self._logits_BV)

    def truncate(self, length: int) -> None:
        """Forgets all tokens after the first `length`; only for texts without padding."""
        if not 0 <= length <= self.length or self._padded:
            raise OptionError(f"truncate: expected 0 to {self.length} tokens of an unpadded text, got {length}")
        if self._face.cache and not self._face.shares_cache and length < self.length:
            for tensor in self._face.cache:
                kept = np.ascontiguousarray(self._past[tensor.past].numpy()[:, :, :length])
                value = host_value(kept, tensor.type)
                if not self._host and length:
                    value = ort.OrtValue.ortvalue_from_numpy(kept, self.session.device, 0)
                self._past[tensor.past] = value
        self.length = length

    def _bind_mask(self, binding: ort.IOBinding, total: int) -> None:
        if self._padded:
            self._flat_mask[: self.batch * total].reshape(self.batch, total)[:] = self._mask[:, :total]
        binding.bind_input(
            self._face.mask, "cpu", 0, self._mask.dtype.type, (self.batch, total), self._flat_mask_address
        )

    def _more_masks(self, total: int) -> ort.OrtValue:
        """A mask of `total` ones; the next ones are made with it, together and so with warm caches."""
        last = min(total + _MASKS_AT_ONCE, self.max_length + 1)
        self._masks = {
            size: ort.OrtValue.ortvalue_from_numpy(self._flat_mask[:size].reshape(1, size))
            for size in range(total, last)
        }
        return self._masks[total]

    def _keep_present(self, binding: ort.IOBinding) -> None:
        # The outputs come in the order of their binding: the cache first, then the logits.
        for tensor, value in zip(self._face.cache, binding.get_outputs(), strict=False):
            self._past[tensor.past] = value

    def _forward(self, ids: npt.NDArray[Any], mask: npt.ArrayLike | None, keep: int | None) -> Floats:
        face, new = self._face, ids.shape[1]
        total = self.length + new
        if ids.shape[0] != self.batch or new < 1:
            raise OptionError(f"decoding: expected ids of shape [{self.batch}, 1 or more], got {list(ids.shape)}")
        self._check_room(new)
        if self.batch > 1 and self.length and new > 1 and not face.chunks_batches:
            raise OptionError("decoding: this graph takes a batch in one piece, then token by token")
        if mask is not None:
            self._set_padding(np.asarray(mask), new)
        if not face.cache:
            self._history[:, self.length : total] = ids
            fed, start = self._history[:, :total], 0
        else:
            fed, start = ids, self.length

        binding = self.session.ort.io_binding()
        self._bind_cache(binding)
        self.adapter.bind(binding)
        held = [np.ascontiguousarray(fed, dtype=self._ids_B1.dtype)]
        bind_array(binding, face.ids, held[0])
        if face.mask:
            self._bind_mask(binding, total)
        if face.positions:
            positions = positions_of(self._mask[:, :total])[:, start:]
            held.append(np.ascontiguousarray(positions, dtype=self._positions_B1.dtype))
            bind_array(binding, face.positions, held[1])
        rows = 1 if face.last_only or (face.keep and keep) else fed.shape[1]
        if face.keep:
            held.append(self.session.keep_value(rows))
            bind_array(binding, face.keep, held[-1])
        logits = self.session._logits_buffer(self.batch * rows).reshape(self.batch, rows, face.vocab_size)
        bind_array(binding, face.logits, logits, output=True, type_=face.logits_type)
        self._ort_run(binding)
        if face.cache and not face.shares_cache:
            self._keep_present(binding)
        self.length = total
        return as_float32(logits[:, -min(rows, new) :])

    def _set_padding(self, mask: npt.NDArray[Any], new: int) -> None:
        if mask.shape != (self.batch, new):
            raise OptionError(f"decoding: expected a mask of shape [{self.batch}, {new}], got {list(mask.shape)}")
        if bool(mask.all()):
            return
        if self.length or not self._face.pads_left or (np.diff(mask.astype(np.int8), axis=1) < 0).any():
            raise OptionError(
                "decoding: padding is only possible on the left of a prompt, in graphs that honour it",
                hint="run prompts of one length together",
            )
        self._mask[:, :new] = mask
        self._padding_B[:] = new - mask.sum(axis=1)
        self._padded = True
        self._is_simple = False


def open_session(
    path: Path,
    providers: tuple[str, ...],
    *,
    threads: int | None = None,
    entries: Mapping[str, str] | None = None,
    options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session that never falls back silently, with errors in our words.

    Raises:
        BadModelFileError: ONNX Runtime cannot load the file.
    """
    options = options or ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        if threads < 1:
            raise OptionError(f"threads: expected at least 1, got {threads}")
        options.intra_op_num_threads = threads
    for key, value in {**_ENTRIES, **(entries or {})}.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    except _providers.ORT_ERRORS as error:
        text = " ".join(str(error).split())[:400]
        raise BadModelFileError(f"{path}: ONNX Runtime cannot load it: {text}") from error


def discover(session: ort.InferenceSession, graph: _skeleton.Skeleton, config: ModelConfig) -> Interface:
    """Reads off a loaded graph what its inputs and outputs are.

    Raises:
        UnsupportedModelError: it is no decoder, or has an input that nobody here can fill.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    where = graph.path
    ids, logits = inputs.get("input_ids"), outputs.get("logits")
    if ids is None or logits is None or len(logits.shape) != 3 or logits.type not in _NUMPY:
        raise UnsupportedModelError(
            f"{where}: expected a decoder with input_ids and logits [batch, tokens, vocabulary], "
            f"got {', '.join(inputs)} -> {', '.join(outputs)}",
            hint="generation, evaluation and benchmarks need a decoder; `onnxpress inspect` reads any graph",
        )
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    cache = tuple(_cache_tensors(inputs, outputs, config, where))
    known = {"input_ids", "attention_mask", "position_ids", *(tensor.past for tensor in cache)}
    unknown = sorted(set(inputs) - known)
    if unknown:
        raise UnsupportedModelError(
            f"{where}: expected input_ids, attention_mask, position_ids and a key-value cache, "
            f"got also {', '.join(unknown)}",
            hint="export a decoder of text alone",
        )
    attentions = [node for node in graph.nodes if node.op_type == "GroupQueryAttention"]
    shares = bool(cache) and _all_past_in_group_query(graph, cache)
    vocab = logits.shape[2] if isinstance(logits.shape[2], int) else config.vocab_size
    if vocab is None:
        raise UnsupportedModelError(
            f"{where}: the size of the vocabulary is neither in the graph nor in config.json",
            hint="put config.json beside the model",
        )
    overridable = {value.name for value in session.get_overridable_initializers()}
    return Interface(
        ids="input_ids",
        logits="logits",
        vocab_size=vocab,
        logits_type=logits.type,
        cache=cache,
        mask=mask.name if mask else None,
        positions=positions.name if positions else None,
        types={name: value.type for name, value in inputs.items()},
        shares_cache=shares,
        chunks_batches=not attentions,
        pads_left=bool(mask and positions) and all(_masks_by_bias(node) for node in attentions),
        last_only=logits.shape[1] == 1 and ids.shape[1] != 1,
        keep=next((name for name in _KEEP_NAMES if name in overridable), None),
        max_batch=ids.shape[0] if isinstance(ids.shape[0], int) else None,
    )


def _masks_by_bias(node: _skeleton.Node) -> bool:
    """Left padding reaches a GroupQueryAttention only through its attention_bias: lengths alone cannot say it."""
    return len(node.inputs) > 10 and bool(node.inputs[10])


def _all_past_in_group_query(graph: _skeleton.Skeleton, cache: tuple[CacheTensor, ...]) -> bool:
    """Whether every past is read only as slot 3 or 4 of a GroupQueryAttention that writes the present of that past."""
    readers: dict[str, list[_skeleton.Node]] = {tensor.past: [] for tensor in cache}
    for node in graph.nodes:
        for name in {*node.inputs, *node.inner}:
            if name in readers:
                readers[name].append(node)
    for tensor in cache:
        nodes = readers[tensor.past]
        if len(nodes) != 1 or nodes[0].op_type != "GroupQueryAttention" or len(nodes[0].outputs) < 3:
            return False
        node = nodes[0]
        slots = [slot for slot, name in enumerate(node.inputs) if name == tensor.past]
        if slots not in ([3], [4]) or node.outputs[slots[0] - 2] != tensor.present:
            return False
    return True


def _cache_tensors(
    inputs: Mapping[str, Any], outputs: Mapping[str, Any], config: ModelConfig, where: Path
) -> list[CacheTensor]:
    presents = {_cache_key(name): name for name in outputs if name.startswith("present")}
    found = []
    for name, value in inputs.items():
        if not name.startswith("past"):
            continue
        present = presents.get(_cache_key(name))
        if present is None or len(value.shape) != 4 or value.type not in _NUMPY:
            raise UnsupportedModelError(
                f"{where}: expected a cache [batch, heads, tokens, width] with a matching output, got {name!r} "
                f"of {value.type} {value.shape}",
                hint="export the model again with the current exporter",
            )
        heads, width = value.shape[1], value.shape[3]
        if not isinstance(width, int):
            width = config.head_dim if value.type != "tensor(uint8)" else config.head_dim and config.head_dim // 2
        if not isinstance(heads, int) or width is None:
            raise UnsupportedModelError(
                f"{where}: the heads and width of {name!r} are symbolic: {value.shape}",
                hint="put the model's config.json beside it",
            )
        found.append(CacheTensor(name, present, heads, width, value.type))
    return found


def _cache_key(name: str) -> tuple[str, ...]:
    """What a past and its present have in common: the layer's number, and key or value."""
    kind = "value" if "value" in name.replace("past_key_values", "").replace("present_key_values", "") else "key"
    return (*re.findall(r"\d+", name), kind)


def positions_of(mask_BS: npt.NDArray[Any]) -> Integers:
    """Position ids `[B, S]` of left-padded sequences: the first real token is 0, padding counts as 1 as elsewhere."""
    positions: Integers = np.cumsum(mask_BS, axis=1, dtype=np.int64) - 1
    positions[mask_BS == 0] = 1
    return positions


def host_value(array: npt.NDArray[Any], type_: str) -> ort.OrtValue:
    """An OrtValue over `array`, which may hold the raw bits of a type that numpy lacks."""
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX[type_])


def bind_array(
    binding: ort.IOBinding, name: str, array: npt.NDArray[Any], *, output: bool = False, type_: str | None = None
) -> None:
    """Binds the memory of a contiguous host array; the caller keeps it alive as long as the binding is used."""
    element: Any = _ONNX[type_] if type_ else array.dtype.type
    bind = binding.bind_output if output else binding.bind_input
    bind(name, "cpu", 0, element, array.shape, array.ctypes.data)


def as_float32(array: npt.NDArray[Any]) -> Floats:
    """`array` itself if it is float32, a converted copy if it is float16 or the raw bits of bfloat16."""
    if array.dtype == np.float32:
        return array
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)
