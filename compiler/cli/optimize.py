"""`onnxpress optimize`: a model through a pipeline into an artifact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxpress.compiler.cli.common import Json, ModelArgument, Quiet, emit, escape, size, table, working
from onnxpress.compiler.cli.export import Exporter, Opset, Output
from onnxpress.compiler.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console


def optimize(
    model: ModelArgument,
    output: Output,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A named pipeline, see `onnxpress recipes`.", show_default="int4"),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='A pipeline, such as "fuse, rtn(bits=4), pack"; instead of a recipe.'),
    ] = None,
    target: Annotated[str, typer.Option(metavar="cpu|cuda|cuda-bf16", help="What the artifact is built for.")] = "cpu",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text for passes that look at activations: a file, a folder, a dataset (org/name:config@split), "
            "'english' (that of Python's own help) or 'self' (the model writes it); for models that read no text "
            ".npz or .npy files with samples for each input. May be given several times.",
            show_default="self; english where the model cannot write",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare outputs before and after every pass that promises the same.")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure what lossy passes cost, in KL divergence.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when attention stays unfused.")] = False,
    keep_quantization: Annotated[
        bool,
        typer.Option(
            "--keep-quantization", help="Keep weights of a GGUF file that have an exact form here as they are."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    workers: Annotated[
        int | None, typer.Option(help="Threads that work at a time.", show_default="one per core")
    ] = None,
    exporter: Exporter = None,
    opset: Opset = 18,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run passes over MODEL and write an artifact that ONNX Runtime, onnxruntime-genai and optimum load."""
    from onnxpress.compiler.optimize import optimize as run_optimize

    if passes is not None and not passes.strip():  # an empty variable of a shell script
        raise OptionError("--passes: expected the name of a pass, got nothing", hint="to change nothing, use `export`")
    with working(quiet=quiet or as_json) as progress:
        artifact = run_optimize(
            model,
            output=output,
            recipe=recipe,
            passes=passes,
            target=target,
            calibration=calibration,
            verify=verify,
            measure=measure,
            seed=seed,
            workers=workers,
            strict=strict,
            keep_quantization=keep_quantization,
            exporter=exporter,
            opset=opset,
            track=progress.track,
            tell=progress.tell,
        )
    card = artifact.report

    def show(console: Console) -> None:
        show_card(console, card)
        console.print(f"written to {escape(str(artifact))}, {size(artifact.nbytes)} of graph and weights")

    emit({"directory": str(artifact.directory), **card}, as_json=as_json, quiet=quiet, show=show)


def show_card(console: Console, card: dict[str, Any]) -> None:
    """The card of an artifact for people."""
    rows = []
    loss, digits = "KL added", 4
    if not any("kl_added" in row["metrics"] for row in card["passes"]) and "cosine_similarity" in card["quality"]:
        loss, digits = "cosine", 5
    key = "kl_added" if loss == "KL added" else "cosine_similarity"
    for row in card["passes"]:
        skipped = sum(one["count"] for one in row["skipped"])
        cost = row["metrics"].get(key)
        rows.append(
            (
                escape(row["pass"]),
                row["promise"],
                row["changed"],
                skipped or "",
                f"{row['seconds']:.2f}",
                size(row["bytes_after"]),
                "" if cost is None else f"{cost:.{digits}f}",
            )
        )
    if rows:
        columns = ("pass", "promise", "changed", "skipped", "seconds", "weights", loss)
        console.print(table(escape(str(card["name"])), columns, rows, left=2))
    for row in card["passes"]:
        for number, note in enumerate(row.get("notes", ())):
            console.print(escape(note if number else f"{row['pass'].partition('(')[0]}: {note}"))
        for skip in row["skipped"]:
            name, _, _ = row["pass"].partition("(")
            console.print(f"{escape(name)} skipped {skip['count']}: {escape(skip['reason'])}")
    for warning in card.get("warnings", ()):
        console.print(f"warning: {escape(warning)}; `onnxpress explain-fusion` says why")
    before, after = card["size"]["bytes_before"], card["size"]["bytes_after"]
    nodes = f"{card['size']['nodes_before']:,} -> {card['size']['nodes_after']:,} nodes"
    console.print(f"{size(before)} -> {size(after)} of weights, {nodes}")
    if line := _quality(card["quality"]):
        console.print(line)
    if verified := card.get("verified"):
        sure = [one["largest_difference"] for one in verified if "note" not in one and "not_verified" not in one]
        if sure:
            console.print(f"verified {len(sure)} passes: outputs within {max(sure):.1e} of their largest value")
        for one in verified:
            name = escape(one["pass"].partition("(")[0])
            if "note" in one:
                console.print(f"{name}: {escape(one['note'])}")
            if "not_verified" in one:
                console.print(f"not verified from {name} on: it {escape(one['not_verified'])}")


def _quality(quality: dict[str, Any]) -> str:
    if "not_measured" in quality and "kl" not in quality:
        return f"loss not measured: {escape(str(quality['not_measured']))}"
    parts = []
    if "kl" in quality:
        each = " per token" if "perplexity_before" in quality else ""
        parts.append(f"KL divergence {quality['kl']:.4f} nats{each}")
    if "kl_weights" in quality:
        parts.append(f"of it weights {quality['kl_weights']:.4f} and activations {quality['kl_activations']:.4f}")
    if "cosine_similarity" in quality:
        parts.append(f"cosine similarity of outputs {quality['cosine_similarity']:.5f}")
    if "output_error" in quality:
        parts.append(f"relative output error {quality['output_error']:.2e}")
    if "top1_agreement" in quality:
        parts.append(f"top-1 agreement {quality['top1_agreement']:.1%}")
    if "perplexity_before" in quality:
        parts.append(f"perplexity {quality['perplexity_before']:.2f} -> {quality['perplexity_after']:.2f}")
    return ", ".join(parts) + f" (on {quality['measured_on']})" if parts else ""
