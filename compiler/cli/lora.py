"""`onnxpress lora`: adapters merged, given slots, converted, extracted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from onnxpress.compiler.cli.common import Json, ModelArgument, Quiet, emit, escape, size, table, working
from onnxpress.compiler.cli.export import Output
from onnxpress.compiler.cli.optimize import show_card

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 8  # matrices of an extraction that are listed

AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="Directory of an adapter, as PEFT saves it.", show_default=False)
]
Target = Annotated[str, typer.Option(metavar="cpu|cuda|cuda-bf16", help="What the artifact is built for.")]


def merge(
    model: ModelArgument,
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Directories of adapters, as PEFT saves them.", show_default=False),
    ],
    output: Output,
    passes: Annotated[
        str, typer.Option(metavar="TEXT", help='What runs after the merge: "int4", "fuse, rtn(bits=8), pack".')
    ] = "",
    max_loss: Annotated[
        float, typer.Option(help="Share of the update that rounding quantized matrices may swallow.")
    ] = 0.5,
    target: Target = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add adapters to the weights of MODEL, for good."""
    from onnxpress.compiler import adapters as work

    with working(quiet=quiet or as_json) as progress:
        artifact = work.merge_adapters(
            model,
            adapters,
            output,
            passes=passes,
            max_loss=max_loss,
            target=target,
            track=progress.track,
            tell=progress.tell,
        )

    def show(console: Console) -> None:
        show_card(console, artifact.report)
        for row in artifact.report["passes"]:
            if "update_error" in row["metrics"] and row["metrics"]["update_error"]:
                console.print(f"rounding swallowed {row['metrics']['update_error']:.1%} of the update")
        console.print(f"written to {escape(str(artifact))}, {size(artifact.nbytes)} of graph and weights")

    emit({"directory": str(artifact.directory), **artifact.report}, as_json=as_json, quiet=quiet, show=show)


def slots(
    model: ModelArgument,
    output: Output,
    passes: Annotated[
        str, typer.Option(metavar="TEXT", help='What runs before: "int4-rtn"; nothing leaves an artifact as it is.')
    ] = "",
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="q, k, v, o, gate, up, down, head, embedding; may be given several times.",
            show_default="all but head and embedding",
        ),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="Beside these: head, embedding, router.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Linears that get none, such as 'block0.*'.")
    ] = None,
    target: Target = "cpu",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let MODEL take adapters as inputs, so that each request may have its own."""
    from onnxpress.compiler import adapters as work

    with working(quiet=quiet or as_json) as progress:
        artifact = work.add_slots(
            model,
            output,
            passes=passes,
            kinds=kinds or (),
            also=also or (),
            exclude=exclude or (),
            target=target,
            track=progress.track,
            tell=progress.tell,
        )

    def show(console: Console) -> None:
        count = artifact.report["passes"][-1]["changed"]
        console.print(f"{escape(str(artifact))}: {count} slots, {size(artifact.nbytes)} of graph and weights")
        for skip in artifact.report["passes"][-1]["skipped"]:
            console.print(f"{skip['count']} without a new one: {escape(skip['reason'])}")

    emit({"directory": str(artifact.directory), **artifact.report}, as_json=as_json, quiet=quiet, show=show)


def convert(
    adapter: AdapterArgument,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model with slots, from `lora slots`.", show_default=False)
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="NAME.onnx_adapter.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write ADAPTER as the .onnx_adapter file of a model with slots, for ONNX Runtime and onnxruntime-genai."""
    from onnxpress.compiler import adapters as work

    with working(quiet=quiet or as_json) as progress:
        progress.tell("converting")
        found = work.convert_adapter(adapter, model, output)

    def show(console: Console) -> None:
        console.print(
            f"{escape(found.path)}: {found.modules} modules, {found.slots} slots, rank {found.rank}, "
            f"{size(found.nbytes)}"
        )

    emit(found.to_json(), as_json=as_json, quiet=quiet, show=show)


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The tuned model.", show_default=False)],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was made of.", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="PATH", help="A directory for PEFT, or NAME.onnx_adapter.")
    ],
    rank: Annotated[int, typer.Option(help="Of every matrix.")] = 16,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the difference of two models as an adapter, with what its rank leaves out."""
    from onnxpress.compiler import adapters as work

    with working(quiet=quiet or as_json) as progress:
        found = work.extract_adapter(tuned, base, output, rank=rank, track=progress.track, tell=progress.tell)

    def show(console: Console) -> None:
        worst = sorted(found.modules, key=lambda row: -row["error"])[:_SHOWN]
        rows = [(escape(row["module"]), row["rank"], f"{row['norm']:.3g}", f"{row['error']:.2%}") for row in worst]
        console.print(table("worst matrices", ("module", "rank", "difference", "left out"), rows))
        console.print(f"{len(found.modules)} matrices differ, {found.unchanged} do not; left out {found.error:.2%}")
        if found.left_out:
            names = ", ".join(found.left_out[:4]) + (", ..." if len(found.left_out) > 4 else "")
            console.print(f"warning: {len(found.left_out)} weights differ that no adapter holds: {escape(names)}")
        console.print(f"written to {escape(found.path)}")

    emit(found.to_json(), as_json=as_json, quiet=quiet, show=show)
