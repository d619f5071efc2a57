"""A tiny language model in a directory, made without an exporter: fused attention, a cache, a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tokenizers

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN = 32, 4, 2, 8, 64
_SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>")
VOCABULARY = 256 + len(_SPECIAL)


def decoder(*, layers: int = 2, seed: int = 0) -> ir.Model:
    """A random decoder: residual blocks of GroupQueryAttention and a feed-forward part."""
    rng = np.random.default_rng(seed)
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []

    def weight(name: str, *shape: int) -> ir.Value:
        array = (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        initializers.append(value)
        return value

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        initializers.append(value)
        return value

    def op(kind, inputs, name, *, domain="", outputs=1, dtype=ir.DataType.FLOAT, **attributes):
        fields = [ir.convenience.convert_attribute(key, value) for key, value in attributes.items()]
        node = ir.Node(domain, kind, inputs, fields, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}.{index}"
            value.dtype = dtype
        nodes.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def stream(value: ir.Value) -> ir.Value:
        value.shape = ir.Shape(["batch", "sequence", HIDDEN])
        return value

    ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    mask = ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])
    cache_shape = ["batch", KV_HEADS, "past", HEAD_SIZE]
    inputs, outputs = [ids, mask], []
    one, axis = constant("one", np.array(1, np.int64)), constant("axis", np.array([1], np.int64))
    wide, narrow = ir.DataType.INT64, ir.DataType.INT32
    last = op("Sub", [op("ReduceSum", [mask, axis], "total64", dtype=wide, keepdims=0), one], "last64", dtype=wide)
    lengths = op("Cast", [last], "seqlens_k", dtype=narrow, to=6)
    sizes = op("Shape", [mask], "mask_shape", dtype=wide)
    longest = op("Cast", [op("Gather", [sizes, one], "longest64", dtype=wide, axis=0)], "longest", dtype=narrow, to=6)
    hidden = stream(op("Gather", [weight("embed", VOCABULARY, HIDDEN), ids], "embedded", axis=0))
    for layer in range(layers):
        past = [ir.val(f"past_key_values.{layer}.{kind}", ir.DataType.FLOAT, cache_shape) for kind in ("key", "value")]
        inputs += past
        q, k, v = (
            op("MatMul", [hidden, weight(f"l{layer}.{name}.weight", HIDDEN, width)], f"l{layer}.{name}")
            for name, width in (("q", HIDDEN), ("k", KV_HEADS * HEAD_SIZE), ("v", KV_HEADS * HEAD_SIZE))
        )
        attended, key, value = op(
            "GroupQueryAttention",
            [q, k, v, *past, lengths, longest],
            f"l{layer}.attention",
            domain="com.microsoft",
            outputs=3,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        )
        for kind, present in (("key", key), ("value", value)):
            present.name, present.shape = f"present.{layer}.{kind}", ir.Shape(["batch", KV_HEADS, "total", HEAD_SIZE])
            outputs.append(present)
        projected = op("MatMul", [attended, weight(f"l{layer}.o.weight", HIDDEN, HIDDEN)], f"l{layer}.o")
        hidden = stream(op("Add", [hidden, projected], f"l{layer}.add1"))
        up = op("MatMul", [hidden, weight(f"l{layer}.up.weight", HIDDEN, FFN)], f"l{layer}.up")
        activated = op("Tanh", [up], f"l{layer}.tanh")
        down = op("MatMul", [activated, weight(f"l{layer}.down.weight", FFN, HIDDEN)], f"l{layer}.down")
        hidden = stream(op("Add", [hidden, down], f"l{layer}.add2"))
    logits = op("MatMul", [hidden, weight("head", HIDDEN, VOCABULARY)], "logits")
    logits.shape = ir.Shape(["batch", "sequence", VOCABULARY])
    graph = ir.Graph(
        inputs,
        [logits, *outputs],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 18, "com.microsoft": 1},
        name="tiny",
    )
    return ir.Model(graph, ir_version=10)


def write_decoder(directory: Path, *, layers: int = 2, seed: int = 0, tokenizer: bool = True) -> Path:
    """Writes `decoder()` with its config and tokenizer; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    ir.save(decoder(layers=layers, seed=seed), directory / "model.onnx", external_data="model.onnx.data")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    if tokenizer:
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in _SPECIAL])
        made.save(str(directory / "tokenizer.json"))
        special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
        content = {**special, "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory
