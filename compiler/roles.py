"""Tells the role of a linear by what its output flows into: attention, a gated product, a router, the residual."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxpress.compiler.blocks import Block
from onnxpress.compiler.formats import OPERATORS

if TYPE_CHECKING:
    from onnxpress.compiler.linears import Linear

# Roles a linear can play in a block; "linear" when nothing is known about it.
KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "head", "router", "linear")


def assign_roles(graph: ir.Graph, linears: list[Linear], blocks: list[Block]) -> None:
    """Names linears by what their outputs flow into: attention operands, a gated product, the residual, the logits."""
    block_of = {id(node): block.index for block in blocks for node in block.nodes}
    boundary = {id(node) for block in blocks for node in block.residuals}
    outputs = {id(value) for value in graph.outputs}
    starts = {id(one.node) for one in linears} | {id(one.factors[0].node) for one in linears if one.factors}
    sides = _sides(linears)
    ends = {id(one.output) for one, _, _ in sides}
    apart = {id(one) for one, _, _ in sides}
    mains = [one for one in linears if id(one) not in apart]
    for one in mains:
        one.block = block_of.get(id(one.node))
        one.kind = _kind(one, starts, boundary, outputs)
    _split_gate_up(mains, ends)
    used: dict[str, int] = {}
    for one in mains:
        if one.kind == "linear":
            base = one.name
        else:
            base = one.kind if one.block is None else f"block{one.block}.{one.kind}"
        used[base] = used.get(base, 0) + 1
        one.name = base if used[base] == 1 else f"{base}.{used[base]}"
        if one.factors is not None:
            for factor, end in zip(one.factors, ("A", "B"), strict=True):
                factor.name, factor.block, factor.kind = f"{one.name}.{end}", one.block, one.kind
    for one, main, end in sides:
        one.name, one.block, one.kind, one.is_side = f"{main.name}.side{end}", main.block, main.kind, True
        for factor, letter in zip(one.factors or (), "AB", strict=False):
            factor.name, factor.block, factor.kind = f"{one.name}.{letter}", one.block, one.kind


def _sides(linears: list[Linear]) -> list[tuple[Linear, Linear, str]]:
    """Products of two thin matrices that are added to what a linear gives: (pair or factor, that linear, its end)."""
    by_output = {id(one.output): one for one in linears}
    found: list[tuple[Linear, Linear, str]] = []
    for wide in linears:
        narrow = None if wide.factors is not None else by_output.get(id(wide.activation))
        if wide.factors is None and (narrow is None or narrow.num_out >= min(narrow.num_in, wide.num_out)):
            continue
        readers = wide.output.consumers()
        if len(readers) != 1 or readers[0].op_type != "Add" or len(narrow.output.uses() if narrow else [0]) != 1:
            continue
        start = wide.activation if narrow is None else narrow.activation
        for value in readers[0].inputs:
            main = by_output.get(id(value))
            if main is not None and main is not wide and main.activation is start and len(main.output.uses()) == 1:
                found += [(wide, main, "")] if narrow is None else [(narrow, main, ".A"), (wide, main, ".B")]
    return found


_PRODUCTS = ("Gemm", "MatMulNBits", *OPERATORS)
_ATTENTION = {"GroupQueryAttention": 3, "MultiHeadAttention": 3, "Attention": 3}


def _kind(one: Linear, starts: set[int], boundary: set[int], outputs: set[int]) -> str:
    """Follows the data from the output until an operator tells the role; linears, norms and residuals end a path."""
    if one.block is None:
        return "head" if _reaches(one.output, outputs, starts) else "linear"
    roles: set[str] = set()
    queue, seen = [one.output], {id(one.output)}
    while queue:
        value = queue.pop()
        for node, index in value.uses():
            if id(node) in starts or (node.op_type == "Attention" and node.domain == "com.microsoft"):
                if index == 0:  # that attention multiplies with the projections itself
                    roles.add("into_linear")
                continue
            if _fills_slot(node):
                continue  # beside the linear that it adds to
            if id(node) in boundary:
                roles.add("residual")
                continue
            if node.op_type in _ATTENTION:
                packed = len(node.inputs) < 2 or node.inputs[1] is None
                roles.add("qkv" if packed and index == 0 else "qkv"[index] if index < 3 else "other")
                continue
            if node.op_type == "TopK":
                return "router"
            if node.op_type == "Softmax":
                if _chooses(node):
                    return "router"
                roles.add("scores")
                continue
            for output in node.outputs:
                if id(output) not in seen:
                    seen.add(id(output))
                    queue.append(output)
    return _role(roles, one)


def _chooses(softmax: ir.Node) -> bool:
    """Whether the largest of the probabilities are picked: experts of a mixture."""
    readers = [one for value in softmax.outputs for one in value.consumers()]
    readers += [one for node in readers if node.op_type == "Cast" for one in node.outputs[0].consumers()]
    return any(node.op_type == "TopK" for node in readers)


def _role(roles: set[str], one: Linear) -> str:
    attention = roles & {"q", "k", "v", "qkv"}
    if len(attention) == 1:
        return attention.pop()
    if attention:
        return "qkv"
    if "scores" in roles:
        # Before fusion both operands of the score product reach the Softmax; the cache tells them apart.
        return "k" if _meets_cache(one.output) else "q"
    if "residual" in roles:
        return "o" if _after_attention(one) else "down"
    if "into_linear" in roles:
        return "v" if _meets_cache(one.output) else "gate_up"
    return "linear"


def _meets_cache(value: ir.Value) -> bool:
    """Whether the value is joined with a graph input (a past key or value) before anything multiplies it away."""
    queue, seen = [value], set()
    while queue:
        current = queue.pop()
        for node in current.consumers():
            if node.op_type == "Concat" and any(_is_past(v) for v in node.inputs):
                return True
            if node.op_type in ("MatMul", "Softmax", *_PRODUCTS):
                continue
            for output in node.outputs:
                if id(output) not in seen:
                    seen.add(id(output))
                    queue.append(output)
    return False


def _is_past(value: ir.Value | None) -> bool:
    """Whether the value is a graph input, at most joined, cut or cast (as torch's exporter leaves the cache)."""
    for _ in range(4):
        if value is None or value.is_graph_input():
            return value is not None
        node = value.producer()
        if node is None or node.op_type not in ("Concat", "Slice", "Cast", "Identity"):
            return False
        value = node.inputs[-1] if node.op_type == "Concat" else node.inputs[0]
    return False


def _after_attention(one: Linear) -> bool:
    """Whether the activation comes from an attention operator or a product with a Softmax."""
    value: ir.Value | None = one.activation
    for _ in range(16):
        node = value.producer() if value is not None else None
        if node is None:
            return False
        if node.op_type in _ATTENTION:
            return True
        if node.op_type in _PRODUCTS:
            return False  # another linear lies between
        if node.op_type == "MatMul":
            left = node.inputs[0].producer() if node.inputs[0] is not None else None
            while left is not None and left.op_type in ("Cast", "Where", "Dropout", "Identity"):
                source = left.inputs[-1] if left.op_type == "Where" else left.inputs[0]
                left = source.producer() if source is not None else None
            return left is not None and left.op_type == "Softmax"
        value = node.inputs[0] if node.inputs else None
    return False


def _reaches(value: ir.Value, outputs: set[int], starts: set[int]) -> bool:
    queue, seen = [value], {id(value)}
    while queue:
        current = queue.pop()
        if id(current) in outputs:
            return True
        for node in current.consumers():
            if id(node) in starts:
                continue
            for output in node.outputs:
                if id(output) not in seen:
                    seen.add(id(output))
                    queue.append(output)
    return False


_ACTIVATIONS = ("Sigmoid", "QuickGelu", "Gelu", "FastGelu", "Erf", "Tanh", "Relu", "Swish", "BiasGelu")


def _split_gate_up(linears: list[Linear], sides: set[int]) -> None:
    """Of two linears whose outputs are multiplied, the one that an activation function touches is the gate.

    Where only one reads the activation, the layer is not gated, and it is the one that goes up (GPT-2). `sides` are
    outputs that are added to that of a linear.
    """
    together = Counter(id(one.source) for one in linears if one.kind == "gate_up")
    for one in linears:
        if one.kind != "gate_up":
            continue
        value, activated = one.output, False
        consumers = value.consumers()
        while len(consumers) == 1 and consumers[0].op_type == "Add" and _adds_more(consumers[0], sides):
            value = consumers[0].outputs[0]
            consumers = value.consumers()
        if any(node.op_type == "Split" or node.op_type == "Slice" for node in consumers):
            continue  # both halves in one matrix
        activated = any(node.op_type in _ACTIVATIONS for node in consumers)
        gated = any(node.op_type == "Mul" for node in consumers) or activated
        one.kind = "gate" if activated and gated and together[id(one.source)] > 1 else "up"


def _adds_more(node: ir.Node, sides: set[int]) -> bool:
    """Whether the node adds a bias, what a slot for adapters gives, or one of `sides`."""
    return any(
        value is not None and (value.is_initializer() or id(value) in sides or _is_of_slot(value))
        for value in node.inputs
    )


def _is_of_slot(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type == "Concat":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and _fills_slot(node)


def _fills_slot(node: ir.Node) -> bool:
    """Whether a product is half of a slot for adapters: its matrix is an input with a default."""
    factor = node.inputs[1] if node.op_type == "MatMul" else None
    return factor is not None and factor.is_graph_input() and factor.is_initializer()
