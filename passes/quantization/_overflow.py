"""Finds activations that come near the end of a float type's range, on text.

Each float value of the graph gets its largest magnitude computed beside it; all of them are one vector, of which text
streamed through the model shows the largest entries. The graph is as it was afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.calibration_text import feeds
from onnxpress.compiler.pass_ import Context

_TOKENS, _LENGTH = 1024, 512  # outliers of a language model are there from its first tokens on


def largest_magnitudes(model: ir.Model, values: Sequence[ir.Value], context: Context) -> dict[int, float]:
    """Largest magnitude of each of `values` on text, by the id of the value; inf where it is not finite.

    Text is what the user gave, or English: what the model would write itself is not worth its time here.

    Args:
        model: is not changed.
        values: float32, computed by nodes of its graph.
        context: text, scratch folder.

    Raises:
        StreamingError, UnsupportedModelError: no text can be streamed through the model.
    """
    ids_WS, _ = replace(context.calibration, own=None).windows(_TOKENS, _LENGTH)
    windows = feeds(model.graph, ids_WS)
    shape = ir.Value(
        name="overflow/one",
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array([1]), name="overflow/one"),
    )
    nodes = []
    for number, value in enumerate(values):
        size = ir.node("Abs", [value], name=f"overflow/{number}/size")
        largest = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0}, name=f"overflow/{number}/largest")
        nodes += [size, largest, ir.node("Reshape", [largest.outputs[0], shape], name=f"overflow/{number}/vector")]
    nodes.append(ir.node("Concat", [node.outputs[0] for node in nodes[2::3]], {"axis": 0}, name="overflow/all"))
    for node in nodes:
        node.outputs[0].name, node.outputs[0].dtype = f"{node.name}.out", ir.DataType.FLOAT
    model.graph.extend(nodes)
    try:
        with Calibration(model, windows, [], context.work_dir, ends=[nodes[-1].outputs[0]]) as run:
            (stage,) = run.stages
            found = np.max(run.values(stage), axis=0)
    finally:
        model.graph.remove(nodes[::-1], safe=True)
    # A maximum passes over NaN on some processors, but not over the infinities that come before one.
    found = np.where(np.isfinite(found), found, np.inf)
    return {id(value): float(one) for value, one in zip(values, found, strict=True)}
