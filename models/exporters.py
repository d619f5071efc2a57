"""The exporters themselves: a torch model becomes `model.onnx` with configs beside it. Imports torch; see `export`.

Both give a decoder the same face: input_ids, attention_mask, position_ids, past_key_values.N.key and .value in;
logits, present.N.key and .value out. Caches are (batch, heads, tokens, head size).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
import transformers

from onnxpress.compiler.errors import OnnxpressError, OptionError, UnsupportedModelError
from onnxpress.models import directory as directories
from onnxpress.models.experts import visiting_all
from onnxpress.models.export import Job, hint_optimum

logger = logging.getLogger(__name__)

TORCHSCRIPT_MAX_OPSET = 20  # where torch froze its TorchScript exporter, which optimum uses
_NOISY = ("transformers", "optimum", "accelerate", "torch.onnx", "torch.export", "onnxscript", "onnx_ir")
_BATCH, _NEW, _PAST = "batch_size", "sequence_length", "past_sequence_length"
_TOTAL = f"{_PAST} + {_NEW}"  # spelled as optimum does


def perform(job: Job) -> dict[str, Any]:
    """Reads the source, exports it to `job.out`, and returns facts for the card.

    Raises:
        BadModelFileError: the source is damaged or incomplete.
        UnsupportedModelError: this architecture cannot be read, or not be exported with this exporter.
        OptionError: the exporter cannot write this opset.
    """
    out = Path(job.out)
    attention = job.attention or _attention(job)
    with quiet():
        if job.kind == "gguf":
            from onnxpress.models import gguf

            model, facts = gguf.read_model(Path(job.source), out, attention=attention)
        else:
            from onnxpress.models import huggingface

            model, facts = huggingface.read_model(Path(job.source), attention=attention), {}
            huggingface.save_fast_tokenizer(Path(job.source), out)
        model.eval()
        architecture = type(model).__name__
        # Which attention is exported must be known when a model is made: Falcon and StableLM ignore a later word.
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            # NOTE: transformers' default attention drops the soft cap without a word (Gemma 2).
            model.set_attn_implementation("eager")
        with torch.no_grad(), _failures(architecture, job.exporter), visiting_all(model) as num_routed:
            if num_routed:
                facts["experts"] = f"{num_routed} blocks, a few linears per expert"
            (export_optimum if job.exporter == "optimum" else export_dynamo)(model, out, opset=job.opset)
    packages = (
        "torch",
        "transformers",
        *(("optimum", "optimum-onnx") if job.exporter == "optimum" else ("onnxscript",)),
    )
    versions = {package: importlib.metadata.version(package) for package in packages}
    how = {"exporter": job.exporter, "opset": job.opset, "attention": model.config._attn_implementation}
    return {**facts, "architecture": architecture, **how, "versions": versions}


def _attention(job: Job) -> str | None:
    """The implementation of attention that suits the exporter; None for the model's own choice."""
    if job.exporter == "optimum":
        return None
    # NOTE: Falcon's eager form adds ALiBi twice, to the mask and to the scores (transformers 4.57 and 5.24). That of
    # GPT-2 cuts its mask out of a table, after which torch takes no two sizes of the graph for equal.
    config = directories.read_json(Path(job.source) / "config.json") if job.kind == "huggingface" else {}
    if config.get("alibi") is True or config.get("model_type") == "gpt2":
        return None
    # torch writes fewer kinds of fused attention than it computes; both forms end as the same operator.
    return "eager"


def export_optimum(model: Any, out: Path, *, opset: int) -> None:
    """Writes `model.onnx`, `config.json` and `generation_config.json` through optimum; decoders get a KV cache."""
    if opset > TORCHSCRIPT_MAX_OPSET:
        raise OptionError(
            f"exporter 'optimum' writes opsets up to {TORCHSCRIPT_MAX_OPSET}, got opset={opset}",
            hint="use exporter 'dynamo', or opset 18",
        )
    from optimum.exporters.onnx import onnx_export_from_model

    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model, which exports to several graphs",
            hint="export it with optimum-cli and give one of its .onnx files",
        )
    if model.can_generate():
        model.config.use_cache = True
        _describe(model)
    onnx_export_from_model(model, out, opset=opset, do_validation=False)
    graphs = sorted(str(path.relative_to(out)) for path in out.rglob("*.onnx"))
    if graphs != ["model.onnx"]:
        raise UnsupportedModelError(
            f"{type(model).__name__} exports to several graphs: {', '.join(graphs)}", hint="export one graph yourself"
        )


def _describe(model: Any) -> None:
    """Tells optimum of a decoder that it does not know: a plain cache of keys and values, inputs as Llama's.

    Raises:
        UnsupportedModelError: the model keeps something else.
    """
    from optimum.exporters.onnx import model_configs
    from optimum.exporters.tasks import TasksManager
    from optimum.utils import NormalizedTextConfigWithGQA

    kind = model.config.model_type
    if kind in TasksManager._SUPPORTED_MODEL_TYPE:
        return
    _cache_shapes(model)
    own = type(
        "PlainDecoder", (model_configs.LlamaOnnxConfig,), {"NORMALIZED_CONFIG_CLASS": NormalizedTextConfigWithGQA}
    )
    TasksManager.create_register("onnx")(kind, *model_configs.COMMON_TEXT_GENERATION_TASKS)(own)


def export_dynamo(model: Any, out: Path, *, opset: int) -> None:
    """Writes `model.onnx`, its data and configs through `torch.onnx.export(dynamo=True)`; decoders get a KV cache.

    Raises:
        UnsupportedModelError: the model has several graphs, or reads neither text nor images.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"exporter 'dynamo' writes one graph, {type(model).__name__} has an encoder and a decoder",
            hint=hint_optimum(),
        )
    graph_model = _decoder(model, opset) if model.can_generate() else _encoder(model, opset)
    # torch notes the Python stack of every node, half the size of the file.
    common_passes.ClearMetadataAndDocStringPass()(graph_model)
    _name_dims(graph_model)
    _widen_bfloat16(graph_model)
    ir.save(graph_model, out / "model.onnx", external_data="model.onnx.data")
    model.config.save_pretrained(out)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(out)


def _decoder(model: Any, opset: int) -> ir.Model:
    """The graph of a decoder with its cache."""
    # Different sizes everywhere, none of them 0 or 1: torch.export takes equal sizes for the same dimension.
    batch, new, past = 2, 3, 5
    layers = _cache_shapes(model)
    cache = [torch.zeros(batch, heads, past, size) for layer in layers for heads, size in layer]
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    positions = torch.arange(past, past + new)[None].repeat(batch, 1) if takes_positions else None
    arguments = (
        torch.ones(batch, new, dtype=torch.long),
        torch.ones(batch, past + new, dtype=torch.long),
        positions,
        cache,
    )
    tokens = {0: _BATCH, 1: _NEW}
    shapes = (
        tokens,
        {0: _BATCH, 1: "total_sequence_length"},
        tokens if takes_positions else None,
        [{0: _BATCH, 2: _PAST} for _ in cache],
    )
    kinds = [f"{index}.{kind}" for index in range(len(layers)) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(["position_ids"] if takes_positions else [])]
    program = torch.onnx.export(
        _FlatCache(model).eval(),
        arguments,
        f=None,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=shapes,
        input_names=[*inputs, *(f"past_key_values.{kind}" for kind in kinds)],
        output_names=["logits", *(f"present.{kind}" for kind in kinds)],
        optimize=False,
    )
    graph_model: ir.Model = program.model
    return graph_model


def _encoder(model: Any, opset: int) -> ir.Model:
    """The graph of a model that computes in one step: batch and length of a text are free, of images the batch.

    Raises:
        UnsupportedModelError: the model reads neither text nor images.
    """
    sizes: dict[int, str] = {0: _BATCH}
    if model.main_input_name == "input_ids":
        takes = inspect.signature(model.forward).parameters
        has_types = "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 0) > 1
        given = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
        if "attention_mask" in takes:
            given["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        if has_types:
            given["token_type_ids"] = torch.zeros(2, 7, dtype=torch.long)
        sizes[1] = _NEW
    elif model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", None)
        height, width = (side, side) if isinstance(side, int) else side or (64, 96)
        if side is None:  # nothing in the model depends on the size of an image
            sizes |= {2: "height", 3: "width"}
        given = {"pixel_values": torch.zeros(2, getattr(model.config, "num_channels", 3), height, width)}
    else:
        raise UnsupportedModelError(
            f"exporter 'dynamo' handles models of text and images, {type(model).__name__} reads"
            f" {model.main_input_name}",
            hint=hint_optimum(),
        )
    if hasattr(model.config, "reference_compile"):  # ModernBERT would compile itself
        model.config.reference_compile = False
    model.config.use_cache = False
    found = model(**given, return_dict=True)
    names = [name for name, value in found.items() if isinstance(value, torch.Tensor)]
    program = torch.onnx.export(
        _OneStep(model, list(given), names).eval(),
        (list(given.values()),),
        f=None,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=([sizes for _ in given],),
        input_names=list(given),
        output_names=names,
        optimize=False,
    )
    graph_model: ir.Model = program.model
    return graph_model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Turns what exporters print, warn and log into debug lines of ours; errors still raise."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [noisy.level for noisy in loggers]
    said = io.StringIO()
    try:
        for noisy in loggers:
            noisy.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for noisy, level in zip(loggers, levels, strict=True):
            noisy.setLevel(level)
        for line in said.getvalue().splitlines():
            logger.debug("%s", line)


@contextlib.contextmanager
def _failures(architecture: str, exporter: str) -> Iterator[None]:
    """Turns whatever an exporter raises into one line: which architecture, which exporter, why."""
    try:
        yield
    except (OnnxpressError, MemoryError):
        raise
    # Exporters fail with exceptions of every kind; the reason is theirs, the remedy is ours.
    except Exception as error:
        logger.debug("%s: %s failed", architecture, exporter, exc_info=True)
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch wraps what went wrong in advice that spans pages
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        hint = hint_optimum() if exporter == "dynamo" else "try exporter 'dynamo'"
        raise UnsupportedModelError(
            f"{architecture} cannot be exported with {exporter}: {reason}", hint=hint
        ) from error


class _FlatCache(torch.nn.Module):  # type: ignore[misc]
    """The model with its cache as a flat list of tensors: key 0, value 0, key 1, ..."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.cache_name = _cache_name(model)

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: list[Any]) -> tuple[Any, ...]:
        cache = transformers.DynamicCache()
        for index in range(len(past) // 2):
            cache.update(past[2 * index], past[2 * index + 1], index)
        positions = {} if position_ids is None else {"position_ids": position_ids}
        caches = {self.cache_name: cache}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **positions, **caches)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


class _OneStep(torch.nn.Module):  # type: ignore[misc]
    """The model with a list of inputs and a tuple of outputs, both of known names."""

    def __init__(self, model: Any, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, given: list[Any]) -> tuple[Any, ...]:
        found = self.model(**dict(zip(self.inputs, given, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)


def _cache_name(model: Any) -> str:
    """What the model calls its cache; transformers changed the name within version 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _cache_shapes(model: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(heads, head size) of key and value, per layer, as the model itself fills an empty cache.

    Raises:
        UnsupportedModelError: the model keeps something else than keys and values of every token in every layer.
    """
    name = type(model).__name__
    cache = transformers.DynamicCache()
    try:
        tokens = torch.ones(1, 3, dtype=torch.long)
        model(input_ids=tokens, use_cache=True, **{_cache_name(model): cache})
        layers = list(cache.layers)
        shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in layers]
    # A state-space or hybrid model fails here in its own way: its layers ask the cache for states it has not.
    except Exception as error:
        logger.debug("%s: no plain KV cache", name, exc_info=True)
        raise UnsupportedModelError(
            f"{name} does not work with a plain key-value cache: {error}", hint=hint_optimum()
        ) from error
    expected = model.config.get_text_config().num_hidden_layers
    is_plain = all(len(shape) == 4 and shape[0] == 1 and shape[2] == 3 for pair in shapes for shape in pair)
    if len(layers) != expected or not is_plain:
        found = f"{len(layers)} cache layers, shapes {sorted({shape for pair in shapes for shape in pair})}"
        raise UnsupportedModelError(
            f"{name}: expected keys and values (batch, heads, tokens, size) for {expected} layers, found {found}",
            hint=hint_optimum(),
        )
    return [((key[1], key[3]), (value[1], value[3])) for key, value in shapes]


def _name_dims(model: ir.Model) -> None:
    """Gives every symbolic size one spelling; torch writes the total now as past + new, now as new + past."""
    spellings = {f"{_NEW} + {_PAST}": _TOTAL, "total_sequence_length": _TOTAL}

    def renamed(shape: ir.Shape) -> ir.Shape:
        return ir.Shape([dim if isinstance(dim, int) else spellings.get(str(dim.value), dim.value) for dim in shape])

    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            value.shape = renamed(value.shape)
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                value.shape = renamed(value.shape)


def _widen_bfloat16(model: ir.Model) -> None:
    """Lets arithmetic on bfloat16 (ALiBi in Falcon) run in float32 and round after; ONNX Runtime's CPU has only Casts.

    Exact: float32 has more than twice the bits of bfloat16 and two, so that rounding twice is rounding once.
    """

    def cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
        node = ir.node("Cast", [value], attributes={"to": dtype})
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
        return node

    for node in list(model.graph):
        result = node.outputs[0]
        if node.domain or node.op_type not in ("Add", "Sub", "Mul", "Div") or result.dtype != ir.DataType.BFLOAT16:
            continue
        for index, value in enumerate(node.inputs):
            assert value is not None
            wide = cast(value, ir.DataType.FLOAT)
            model.graph.insert_before(node, wide)
            node.replace_input_with(index, wide.outputs[0])
        result.type = ir.TensorType(ir.DataType.FLOAT)
        readers = list(result.uses())
        narrow = cast(result, ir.DataType.BFLOAT16)
        model.graph.insert_after(node, narrow)
        if result.is_graph_output():
            name, result.name = result.name, None
            narrow.outputs[0].name = name
            model.graph.outputs[model.graph.outputs.index(result)] = narrow.outputs[0]
        for reader, index in readers:
            reader.replace_input_with(index, narrow.outputs[0])
