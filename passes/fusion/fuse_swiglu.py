"""Fuses x * sigmoid(x) into QuickGelu with alpha 1, the activation of SwiGLU.

Paper:   Shazeer, arXiv:2002.05202: SwiGLU(x) = silu(x W) * (x V).
The product with the other half stays a Mul: the CPU has no operator that does both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.compiler.fusing import Fuser, discard, other
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report


@dataclass(frozen=True, kw_only=True)
class FuseSwiglu(Pass):
    """SiLU in one operator."""

    promise: ClassVar[Promise] = Promise.CLOSE
    paper: ClassVar[str] = "arXiv:2002.05202"

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        fuser = Fuser(model, report, context.seed)
        for node in list(model.graph):
            x = node.inputs[0] if node.op_type == "Sigmoid" else None
            readers = node.outputs[0].consumers() if x is not None else ()
            if x is None or len(readers) != 1 or readers[0].op_type != "Mul" or node.outputs[0].is_graph_output():
                continue
            output = readers[0].outputs[0]
            if other(readers[0], node.outputs[0]) is not x:
                continue
            site = output.name or "silu"
            if x.dtype not in (ir.DataType.FLOAT, None) and context.target.provider == "cpu":
                report.skip(site, f"QuickGelu has no {x.dtype} kernel on the CPU")
                continue
            alpha = [ir.AttrFloat32("alpha", 1.0)]
            new = ir.Node("com.microsoft", "QuickGelu", [x], alpha, name=f"{output.name}/silu")
            reason = fuser.verdict([x], [output], [new.outputs[0]])
            if reason is not None:
                discard([new])
                report.skip(site, reason)
                continue
            fuser.replace(site, [output], [new.outputs[0]], [new])
        fuser.finish()
        return report
