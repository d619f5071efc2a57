"""Which nodes of a float16 graph stay in float32 because values there are too large, and how few Casts that takes.

An island is the node that makes a large value together with all that read it, and the nodes between two islands whose
conversion would cost more Casts than it saves. What an operator computes inside of itself is not seen.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.calibration_text import CalibrationText, feeds
from onnxpress.compiler.errors import CalibrationError, OptionError, UnsupportedModelError, near_miss
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.compiler.ranges import largest_magnitudes

# On a node of an island: a second run must not take it for one that was forgotten.
MARK = "onnxpress.float32"

# Operators that compute on CUDA in float16 and bfloat16 alone (ONNX Runtime 1.31.1).
_HALF_ONLY_ON_CUDA = (
    *("GroupQueryAttention", "PagedAttention", "QMoE"),
    *("MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight"),
)
# Operators that hold no matrix and cost little, so that the number of Casts around them is what counts.
_CHEAP = (
    *("Add", "Sum", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max", "Clip", "Where"),
    *("Sigmoid", "Tanh", "Relu", "Erf", "Gelu", "QuickGelu", "FastGelu", "BiasGelu"),
    *("Transpose", "Reshape", "Identity", "Slice", "Split", "Unsqueeze", "Squeeze", "Concat", "Cast"),
)


def is_half_only(node: ir.Node, provider: str) -> bool:
    """Whether the provider has no float32 kernel for an operator that has one in float16."""
    return provider == "cuda" and node.op_type in _HALF_ONLY_ON_CUDA


def named(model: ir.Model, patterns: Sequence[str]) -> list[ir.Node]:
    """The nodes that patterns name: by the role of a linear ("block0.down", "head"), or by a node's own name.

    Raises:
        OptionError: a pattern matches nothing.
    """
    if not patterns:
        return []
    sites = [(one.name, one.node) for one in find_linears(model, expand_pairs=True)]
    sites += [(node.name, node) for node in model.graph if node.name]
    names = [name for name, _ in sites]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            hint = f"{near_miss(pattern, names)}; names are like {names[:3]}"
            raise OptionError(f"cast_float16: keep={pattern!r} matches no linear and no node", hint=hint)
    found = {id(node): node for name, node in sites if any(fnmatch.fnmatchcase(name, one) for one in patterns)}
    return list(found.values())


def magnitudes(
    model: ir.Model, values: Iterable[ir.Value], context: Context, report: Report, tokens: int, length: int
) -> dict[int, float]:
    """Largest |element| of each value on calibration text, by id; {} and a note where there is no text to be read.

    Args:
        model: in float32, without branches.
        values: to be looked at.
        context: its text is used; a text that the model would have to write first only where there is no other.
        report: gets the note, or what was read.
        tokens: of text.
        length: tokens of a window.
    """
    text = _quick_text(context.calibration)
    try:
        if text is None:
            raise CalibrationError("there is no calibration text")
        feeds(model.graph, np.zeros((1, 2), np.int64))
        ids_WS, facts = text.windows(tokens, length)
        found = largest_magnitudes(model, feeds(model.graph, ids_WS), values, context.track, context.work_dir)
    except (CalibrationError, UnsupportedModelError) as error:
        report.notes.append(f"activations were not searched for what overflows float16: {error.message}")
        return {}
    report.calibration = facts
    return found


def _quick_text(text: CalibrationText) -> CalibrationText | None:
    """Text that is there already, English at least: a range does not depend much on what is said."""
    if text.tokenizer is not None:
        return dataclasses.replace(text, own=None)
    return text if text.is_text else None


def fewer_casts(
    nodes: Sequence[ir.Node],
    is_half: Callable[[ir.Node], bool],
    is_float: Callable[[ir.Value], bool],
    outputs: Collection[int],
) -> list[ir.Node]:
    """Float16 nodes that had better be computed in float32, since fewer Casts are then needed; cheap ones only.

    A Cast is needed once for each value that a node of the other float type reads. Nodes move one at a time, each
    only if it saves a Cast; two that would save one together are not found.

    Args:
        nodes: of the graph, in topological order; those that take no part in activations left out.
        is_half: whether a node computes in float16 so far.
        is_float: whether a value is an activation in one of the float types.
        outputs: ids of values that must be float16 in the end, whoever makes them.
    """
    known = {id(node) for node in nodes}
    half = {id(node) for node in nodes if is_half(node)}

    def casts(value: ir.Value) -> bool:
        maker = value.producer()
        made_half = maker is None or id(maker) in half
        readers = {id(node) in half for node, _ in value.uses() if id(node) in known and node.op_type != "Cast"}
        return (not made_half) in readers or (not made_half and id(value) in outputs)

    def count(values: Iterable[ir.Value]) -> int:
        return sum(casts(value) for value in values)

    moved: list[ir.Node] = []
    again = True
    while again:
        again = False
        for node in nodes:
            if id(node) not in half or node.op_type not in _CHEAP:
                continue
            around = {id(one): one for one in (*node.inputs, *node.outputs) if one is not None and is_float(one)}
            before = count(around.values())
            half.discard(id(node))
            if count(around.values()) < before:
                moved.append(node)
                again = True
            else:
                half.add(id(node))
    return moved
