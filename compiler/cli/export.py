"""`onnxpress export`: a checkpoint as an ONNX directory, unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from onnxpress.compiler.cli.common import Json, ModelArgument, Quiet, emit, escape, size, working

if TYPE_CHECKING:
    from rich.console import Console

Exporter = Annotated[
    str | None,
    typer.Option(
        help="Who makes the graph of a checkpoint.",
        metavar="optimum|dynamo",
        show_default="optimum where it is installed, else dynamo",
    ),
]
Opset = Annotated[int, typer.Option(help="ai.onnx opset of an exported graph, 18 to 24.")]
Output = Annotated[
    str,
    typer.Option("--output", "-o", metavar="DIR", help="Directory to write; an older artifact there is replaced."),
]


def export(
    model: ModelArgument,
    output: Output,
    exporter: Exporter = None,
    opset: Opset = 18,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write MODEL as an ONNX directory, without optimizing it."""
    from onnxpress.compiler.optimize import export as run_export

    with working(quiet=quiet or as_json) as progress:
        artifact = run_export(model, output, exporter=exporter, opset=opset, tell=progress.tell)

    def show(console: Console) -> None:
        nodes = artifact.report["size"]["nodes_after"]
        console.print(f"{escape(str(artifact))}: {nodes:,} nodes, {size(artifact.nbytes)}")

    emit({"directory": str(artifact.directory), **artifact.report}, as_json=as_json, quiet=quiet, show=show)
