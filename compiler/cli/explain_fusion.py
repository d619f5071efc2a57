"""`onnxpress explain-fusion`: what was fused in each block, and what was not and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from onnxpress.compiler.cli.common import Json, ModelArgument, Quiet, emit, escape, table, working

if TYPE_CHECKING:
    from rich.console import Console


def explain_fusion(
    path: ModelArgument,
    target: Annotated[str, typer.Option(metavar="cpu|cuda|cuda-bf16", help="What to fuse for.")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fuse a copy of MODEL in memory and say, block by block, what was fused and what was not, and why."""
    import tempfile
    from pathlib import Path

    from onnxpress import models
    from onnxpress.compiler.explain_fusion import explain_fusion as explain
    from onnxpress.compiler.pass_ import Context
    from onnxpress.compiler.target import target as find_target

    context = Context(target=find_target(target))
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as work, working(quiet=quiet or as_json) as progress:
        source = models.load(path, work_dir=Path(work), progress=progress.tell)
        context.config = dict(source.config)
        progress.tell("fusing")
        blocks = explain(source.model, context)
    facts = {
        "path": path,
        "complete": sum(one.is_complete for one in blocks if one.index is not None),
        "blocks": [one.to_json() for one in blocks],
    }

    def show(console: Console) -> None:
        rows = []
        for one in blocks:
            fused = ", ".join(f"{name} {count}" for name, count in one.fused.items())
            name = "rest" if one.index is None else str(one.index)
            complete = "unknown" if len(blocks) == 1 else "yes" if one.is_complete else "no"
            rows.append((name, f"{one.operators[0]} -> {one.operators[1]}", fused, complete))
        console.print(table("", ("block", "operators", "fused", "complete"), rows, left=3))
        if len(blocks) == 1:
            console.print("no blocks around a residual stream were found, so nothing is known of what each should hold")
        for one in blocks:
            for left in one.left:
                where = "outside of blocks" if one.index is None else f"block {one.index}"
                console.print(f"{where}, {left.fusion}: {escape(left.site)}: {escape(left.reason)}")

    emit(facts, as_json=as_json, quiet=quiet, show=show)
