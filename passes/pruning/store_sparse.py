"""Has weights with many zeros written in a smaller form; what is computed, and how fast, stays the same.

ONNX Runtime multiplies with dense matrices whatever the file holds. Opening a session takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from onnxpress.compiler import sparse
from onnxpress.compiler.pass_ import Context, Pass, Promise, Report
from onnxpress.compiler.zeros import NO_SPEED

_SMALLEST = 1024  # bytes of a matrix that is worth it


@dataclass(frozen=True, kw_only=True)
class StoreSparse(Pass):
    """Writes float matrices with many zeros in fewer bytes; for the end of a pipeline, after a pruning pass.

    Each matrix takes the smallest form that `form` allows, and stays dense where a sixteenth is not gained. What is
    quantized has codes, and stays as it is.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    # "rows": one byte for each place, and three nodes that are folded when a session opens; gains from 25 % of zeros on
    # (float16: 38 %). "initializers": ONNX sparse initializers alone, 8 bytes for each place; gains from 69 % (82 %).
    # "dense": back to plain weights.
    form: Literal["rows", "initializers", "dense"] = "rows"

    def rewrite(self, model: ir.Model, context: Context) -> Report:
        report = Report()
        present = model.metadata_props.get(sparse.KEY, sparse.DENSE)
        before = after = 0
        for value in context.track(sparse.candidates(model, _SMALLEST), "store_sparse"):
            tensor, name = value.const_value, str(value.name)
            assert tensor is not None
            array = tensor.numpy()
            zeros = 1 - int((array != 0).sum()) / array.size
            smallest = sparse.Choice(sparse.DENSE, array.nbytes)
            if self.form != sparse.DENSE:
                smallest = sparse.choose(array, self.form)
            elif present != sparse.DENSE:
                # Whatever was small before is not any more.
                smallest = sparse.choose(array, present)._replace(nbytes=array.nbytes)
            if smallest.form == sparse.DENSE:
                report.skip(name, "dense is the smallest form, or nearly")
            elif present == self.form:
                report.skip(name, "stored so already")
            else:
                before, after = before + array.nbytes, after + smallest.nbytes
                form = self.form if self.form == sparse.DENSE else smallest.form
                report.change(name, shape=list(array.shape), sparsity=zeros, form=form, bytes=smallest.nbytes)
        if report.changed:
            model.metadata_props[sparse.KEY] = self.form
            if self.form == sparse.DENSE:
                del model.metadata_props[sparse.KEY]
            report.metrics |= {"file_bytes_before": before, "file_bytes_after": after}
            report.notes.append(NO_SPEED)
        return report
