"""Fuses the error-function and the tanh form of GELU into Gelu and FastGelu.

Paper:   Hendrycks and Gimpel, arXiv:1606.08415: x Phi(x), and 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
Anchor:  an Erf or a Tanh. What is above and below it is tried, nearest first, until a piece of the graph computes the
         GELU of one value: no spelling is matched, execution decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, discard
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.region import NotCuttable, Region

_FORMS = {"Erf": "Gelu", "Tanh": "FastGelu"}
_INSIDE = ("Add", "Mul", "Div", "Pow", "Sub", "Erf", "Tanh", "Identity")
_ABOVE, _BELOW = 6, 4  # operators between x and the anchor, and between the anchor and the result


@dataclass(frozen=True, kw_only=True)
class FuseGelu(Pass):
    """GELU in one operator; which form it is, is decided by running it."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:1606.08415"

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for anchor in list(model.graph):
            if anchor.op_type not in _FORMS or anchor.domain:
                continue
            site = anchor.outputs[0].name or anchor.op_type
            reason = "no value around it is the GELU of another"
            for x, output in _candidates(anchor):
                if x.dtype not in (ir.DataType.FLOAT, None) and context.target.provider == "cpu":
                    reason = f"there is no {x.dtype} kernel on the CPU"
                    continue
                new = ir.Node("com.microsoft", _FORMS[anchor.op_type], [x], name=f"{output.name}/gelu")
                found = fuser.verdict([x], [output], [new.outputs[0]])
                if found is None:
                    fuser.replace(site, [output], [new.outputs[0]], [new])
                    break
                discard([new])
                # Of a tanh that caps scores or logits nobody expects to be GELU.
                reason = found if output in _products(anchor) else reason
            else:
                if anchor.op_type == "Erf":
                    report.skip(site, reason)
        fuser.finish()
        return report


def _candidates(anchor: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """(x, output) such that the output depends on x, constants and nothing else; nearest first."""
    for output in _products(anchor):
        for x in _ancestors(anchor):
            try:
                region = Region([x], [output])
            except NotCuttable:
                continue
            if region.leaves == [x] and all(node.op_type in _INSIDE for node in region.nodes):
                yield x, output


def _products(anchor: ir.Node) -> list[ir.Value]:
    """What a chain of single readers makes of the anchor, where it ends in a product."""
    found = []
    value = anchor.outputs[0]
    for _ in range(_BELOW):
        readers = value.consumers()
        if len(readers) != 1 or readers[0].op_type not in _INSIDE or value.is_graph_output():
            break
        value = readers[0].outputs[0]
        if readers[0].op_type in ("Mul", "Div"):
            found.append(value)
    return found


def _ancestors(anchor: ir.Node) -> list[ir.Value]:
    """Activations above the anchor, breadth first."""
    found: list[ir.Value] = []
    level = [anchor]
    for _ in range(_ABOVE):
        values = [value for node in level for value in node.inputs if value is not None and value.const_value is None]
        found += [value for value in dict.fromkeys(values) if value not in found]
        above = [value.producer() for value in values]
        level = [node for node in above if node is not None and node.op_type in _INSIDE]
    return found
