"""`onnxpress recipes`: the named pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from onnxpress.compiler.cli.common import Json, Quiet, emit, escape

if TYPE_CHECKING:
    from rich.console import Console


def recipes(
    target: Annotated[str, typer.Option(metavar="cpu|cuda|cuda-bf16", help="What the artifact is built for.")] = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the named pipelines and the passes they stand for."""
    from onnxpress.compiler import pipeline
    from onnxpress.compiler.target import target as find_target

    chosen = find_target(target)
    rows = [
        {"name": name, "summary": pipeline.recipe_summary(name), "pipeline": str(pipeline.recipe(name, chosen))}
        for name in pipeline.recipe_names()
    ]

    def show(console: Console) -> None:
        for row in rows:
            console.print(f"[bold]{row['name']}[/bold]  {escape(row['summary'])}")
            console.print(f"  {escape(row['pipeline'])}")

    emit(rows, as_json=as_json, quiet=quiet, show=show)
