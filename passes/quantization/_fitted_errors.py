"""What is left of the error of a format once codes are fitted to text, from some rows of every matrix.

Text is streamed once through the uncompressed model. A few rows of each matrix are fitted in every format by its second
moments, and their error at its outputs is set beside that of rounding the same rows.

Axes: N out features, K in features
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.compiler.calibration import Calibration
from onnxpress.compiler.linears import Linear
from onnxpress.compiler.pass_ import Context, Report
from onnxpress.passes.quantization import _least_squares as least_squares
from onnxpress.passes.quantization._calibrated import identity, is_finite, solve
from onnxpress.passes.quantization._rounding import Floats, round_matrix
from onnxpress.passes.quantization._weight_only import FLOATS, Format, Site, calibration_windows

_ROWS = 96  # of a matrix that tell how much fitting helps


def fitted_errors(
    model: ir.Model,
    formats: Mapping[int, Sequence[Format]],
    sites: Sequence[Site],
    context: Context,
    *,
    tokens: int,
    length: int,
    damping: float,
    label: str,
) -> dict[int, tuple[float, list[float]]]:
    """Squared output errors, relative to the outputs: of rounding in one format, and of fitting in several.

    Args:
        model: is not changed.
        formats: id of a site to the one that is rounded to the nearest, followed by those to fit.
        sites: of which those with float linears are looked at.
        context: text, journal, progress.
        tokens, length: of text; of a window of it.
        damping: of the second moments, relative to the mean of their diagonal.
        label: of the progress.

    Returns:
        id of a site to (error of rounding, errors of fitting); without what no finite text reached.
    """
    site_of = {id(one): site for site in sites for one in site.linears if one.holder in FLOATS}
    wanted = [one for site in sites for one in site.linears if id(one) in site_of]
    if not wanted:
        return {}
    windows = calibration_windows(model, wanted, site_of, context, Report(), tokens, length)
    section = context.journal.section("fitted errors", repr([*formats.values()]), f"{damping}", identity())
    found: dict[int, tuple[float, list[float]]] = {}
    with Calibration(model, windows, wanted, context.work_dir) as run:
        for number, stage in enumerate(context.track(run.stages, label)):
            digest = run.digest(stage)
            record = section.read(str(number), digest)
            group = run.observe(stage, with_stats=record is None)
            if record is None:
                if not is_finite(group):
                    continue
                moments = least_squares.Moments(group.stats.hessian_KK, damping)
                errors = [_errors(one, site_of[id(one)], formats, moments) for one in group.linears]
                record = {str(index): np.array(one) for index, one in enumerate(errors)}
                section.write(str(number), digest, record)
            for index, linear in enumerate(group.linears):
                before, *after = (float(one) for one in record[str(index)])
                found.setdefault(id(site_of[id(linear)]), (before, after))
    return found


def _errors(
    linear: Linear,
    site: Site,
    formats: Mapping[int, Sequence[Format]],
    moments: least_squares.Moments,
) -> list[float]:
    w_NK = linear.w_NK()
    w_NK = np.ascontiguousarray(w_NK[:: -(-len(w_NK) // _ROWS)], dtype=np.float32)
    dtype = site.dtype.numpy()
    rounded, *fitted = formats[id(site)]
    plain = round_matrix(w_NK, **rounded._asdict(), scale_dtype=dtype)[0].w_NK()
    found = [_relative(plain.T - w_NK.T, w_NK.T, moments)]
    for one in fitted:
        steps_KN, grid = solve(w_NK.T, one, dtype, moments, rounds=0)
        error_KN = steps_KN * grid.spread(grid.scale_GN, len(steps_KN)) - w_NK.T
        found.append(_relative(error_KN, w_NK.T, moments))
    return found


def _relative(error_KN: Floats, w_KN: Floats, moments: least_squares.Moments) -> float:
    energy = least_squares.quadratic(np.ascontiguousarray(w_KN), moments.plain_KK)
    return least_squares.quadratic(np.ascontiguousarray(error_KN), moments.plain_KK) / energy if energy > 0 else 0.0
