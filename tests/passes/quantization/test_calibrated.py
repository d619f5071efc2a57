"""Passes that fit codes to text: scarce text, the teacher's targets, and what happens where text does not get."""

from __future__ import annotations

import graphs
import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.compiler import stats
from onnxpress.compiler.calibration import Calibration, Group, Stage
from onnxpress.compiler.calibration_text import CalibrationText
from onnxpress.compiler.errors import StreamingError
from onnxpress.compiler.linears import find_linears
from onnxpress.compiler.pass_ import Context
from onnxpress.passes.quantization.gptq import Gptq
from onnxpress.passes.quantization.rtn import Rtn

Array = np.ndarray


def chain(*, shared: bool | None = None) -> ir.Model:
    """Gated layers one after the other; with `shared` two products with one weight, or with a copy of it."""
    builder = graphs.Builder(64, 200, 0)
    table = builder.weight(200, 64, name="table", scale=1.0)
    x = builder.op("Gather", table, builder.ids, width=64, axis=0)
    if shared is None:
        for _ in range(3):
            x = builder.norm(builder.step("gated", x, x))
    else:
        weight = builder.weight(64, 64)
        x = builder.norm(builder.op("MatMul", x, weight, width=64))
        again = weight if shared else builder.const(weight.const_value.numpy().copy(), "copy")
        x = builder.norm(builder.op("MatMul", builder.op("Exp", x, width=64), again, width=64))
    return builder.finish(x, False, table)


def text() -> Context:
    def own(tokens: int, length: int) -> Array:
        return np.random.default_rng(3).integers(3, 200, (tokens // length, length))

    return Context(calibration=CalibrationText(vocab_size=200, own=own))


def test_a_stream_that_breaks_off_keeps_what_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven groups the third gives no finite numbers and the fifth does not run."""
    options = {"tokens": 512, "length": 64}
    fitted, rounded, broken = chain(), chain(), chain()
    Gptq(**options).run(fitted, text())
    Rtn().run(rounded, text())
    seen, plain = [], Calibration.observe

    def observe(self: Calibration, stage: Stage, **named: bool) -> Group:
        seen.append([one.name for one in stage.linears])
        if len(seen) == 5:
            raise StreamingError("it does not run", hint="none")
        group = plain(self, stage, **named)
        if len(seen) == 3:
            group.stats.gram_KK[0, 0] = np.inf
        return group

    monkeypatch.setattr(Calibration, "observe", observe)
    report = Gptq(fallback=True, **options).run(broken, text())
    assert len(seen) == 5
    assert {skip.site: skip.reason for skip in report.skipped} == dict.fromkeys(
        seen[2], "its activation is not finite on the calibration text"
    )
    assert len(set(report.changed)) == len(report.changed) == 1 + 10 - len(seen[2])
    original, by_text, nearest, got = (
        {one.name: one.w_NK() for one in find_linears(model)} for model in (chain(), fitted, rounded, broken)
    )
    for name, w_NK in got.items():
        if name in seen[2]:
            want = original
        elif name in (*seen[0], *seen[1]):
            want = by_text
        elif name not in seen[3]:  # the fourth was fitted too, below others than those of the whole run
            want = nearest
        else:
            continue
        np.testing.assert_array_equal(w_NK, want[name], err_msg=name)


def test_of_two_readers_of_a_weight_the_first_decides() -> None:
    together, apart = chain(shared=True), chain(shared=False)
    for model in (together, apart):
        Gptq(tokens=512, length=64).run(model, text())
    first, second = find_linears(apart)[:2]
    assert not np.array_equal(first.w_NK(), second.w_NK())
    for one in find_linears(together)[:2]:
        np.testing.assert_array_equal(one.w_NK(), first.w_NK())


@pytest.mark.parametrize("tokens, times", [(20, 4), (40, 2), (80, 1), (800, 1)])
def test_law_scarce_tokens_hold_codes_and_targets_near_the_weights(tokens: int, times: int) -> None:
    """Five tokens for each feature are enough; of fewer, damping and ridge grow in proportion."""
    rng = np.random.default_rng(1)
    x_TK = rng.standard_normal((tokens, 16)).astype(np.float32)
    seen = stats.Stats(16)
    seen.update(x_TK, x_TK + 0.1 * x_TK[:, ::-1] ** 2)
    assert seen.scarcity == times
    pass_ = Gptq(damping=0.02, ridge=0.1)
    moments, correction_KK = pass_.prepared(Group([], seen))
    assert moments.damping == pytest.approx(0.02 * times)
    np.testing.assert_array_equal(moments.hessian_KK, seen.gram_KK / tokens)
    assert correction_KK is not None
    want = stats.teacher_correction(seen.hessian_KK, seen.drift_KK / tokens, 0.1 * times)
    np.testing.assert_allclose(correction_KK, want, rtol=1e-5)
    assert Gptq(teacher=False).prepared(Group([], seen))[1] is None
    seen.drift_KK = None
    assert pass_.prepared(Group([], seen))[1] is None
