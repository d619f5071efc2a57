"""`onnxpress inspect`: what a model is and where its bytes are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxpress.compiler.cli.common import Json, ModelArgument, Quiet, emit, escape, number, size, table, working

if TYPE_CHECKING:
    from rich.console import Console

    from onnxpress.compiler.inspect import Ledger, Summary
    from onnxpress.compiler.inspect.summary import KindFacts

_MAX_NAMES = 6  # inputs or outputs listed in full


def inspect(
    path: ModelArgument,
    blocks: Annotated[bool, typer.Option("--blocks", help="One row for each block.")] = False,
    placement: Annotated[
        str | None,
        typer.Option(metavar="cpu|cuda", help="Also plan a session: which operators run where.", show_default="not"),
    ] = None,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Of an artifact: what each quantized matrix lost, and nothing else.")
    ] = False,
    zeros: Annotated[
        bool, typer.Option("--zeros", help="Also read every matrix: which share of its weights is 0.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show architecture, blocks, parameters, bytes, operators, the cost of a token. Checkpoints are exported first."""
    if ledger:
        _ledger(path, blocks or zeros or placement is not None, as_json, quiet)
        return
    import tempfile
    from pathlib import Path

    from onnxpress import models
    from onnxpress.compiler.inspect import summarize

    with tempfile.TemporaryDirectory(prefix="onnxpress-") as work, working(quiet=quiet or as_json) as progress:
        source = models.load(path, work_dir=Path(work), progress=progress.tell)
        provenance = _provenance(source.provenance)
        summary = summarize(source.model, config=source.config, provenance=provenance, count_zeros=zeros)
        facts: dict[str, Any] = {"path": path, **summary.to_json()}
        if placement is not None:
            from onnxpress.runtime.placement import audit

            progress.tell("planning a session")
            facts["placement"] = audit(source.model_path, placement).to_json()

    def show(console: Console) -> None:
        _show(console, summary, blocks)
        if placement is not None:
            _show_placement(console, facts["placement"])

    emit(facts, as_json=as_json, quiet=quiet, show=show)


def _ledger(path: str, has_others: bool, as_json: bool, quiet: bool) -> None:
    from onnxpress.compiler.artifact import open_artifact
    from onnxpress.compiler.errors import OptionError
    from onnxpress.compiler.inspect import read_ledger

    if has_others:
        raise OptionError(
            "--ledger: shows the ledger alone", hint="run inspect once more for --blocks, --zeros and --placement"
        )
    found = read_ledger(open_artifact(path).report)
    facts = {"path": path, **found.to_json()}
    emit(facts, as_json=as_json, quiet=quiet, show=lambda console: _show_ledger(console, found))


def _show_ledger(console: Console, found: Ledger) -> None:
    columns = (
        "matrix",
        "N x K",
        "bits",
        "block",
        "bytes",
        "SNR, dB",
        "KL alone",
        "weights",
        "outputs",
        "int8 activations",
        "share",
    )
    rows = [
        (
            row.site,
            " x ".join(map(str, row.shape)),
            row.bits,
            row.block_size,
            size(row.bytes),
            "exact" if row.snr_db is None else f"{row.snr_db:.1f}",
            "" if row.expected_kl is None else f"{row.expected_kl:.5f}",
            _percent(row.weight_error),
            _percent(row.output_error),
            _percent(row.activation_error),
            _percent(row.share),
        )
        for row in found.rows
    ]
    console.print(table("ledger: relative errors, largest share first", columns, rows))
    console.print(escape(found.note))
    console.print("int8 activations: what they add inside MatMulNBits, on random activations, once for each size")
    if all(row.output_error is None for row in found.rows):
        console.print(
            escape("errors of outputs need text: quantize with ledger_tokens=4096, such as rtn(ledger_tokens=4096)")
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _provenance(facts: dict[str, Any]) -> dict[str, Any]:
    """Where the model comes from; of an artifact's card only what is about its making."""
    card = facts.get("artifact")
    if not isinstance(card, dict):
        return facts
    kept = ("name", "pipeline", "history", "target", "recipe", "quality", "source", "versions", "requires", "created")
    return {**facts, "artifact": {key: card[key] for key in kept if key in card}}


def _show(console: Console, summary: Summary, with_blocks: bool) -> None:
    made_by = summary.provenance.get("onnxpress.pipeline")
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in summary.opset_imports.items())
    facts = [
        ("architecture", summary.architecture),
        ("blocks", str(len(summary.blocks))),
        ("nodes", f"{summary.nodes:,}"),
        ("parameters", number(summary.parameters)),
        ("weights", f"{size(summary.bytes)}, {summary.bits_per_weight:.2f} bits per weight"),
        ("quantized", "; ".join(f"{how}: {count}" for how, count in summary.quantized.items()) or "no weights"),
        ("one token", f"{number(summary.flops_per_token)} operations, reads {size(summary.bytes_per_token)}"),
        (
            "cached token",
            f"{number(summary.flops_per_cached_token)} operations, keeps {size(summary.cache_bytes_per_token)}"
            + (f" of {summary.cache['type']}" if summary.cache else ""),
        ),
        ("opset", f"{opsets}; IR {summary.ir_version}"),
        ("producer", summary.provenance.get("producer") or "unknown"),
        ("pipeline", made_by or "not written by onnxpress"),
    ]
    for name, value in facts:
        console.print(f"{name:<13} {escape(value)}")
    for name, values in (("inputs", summary.inputs), ("outputs", summary.outputs)):
        listed = list(values.items())
        shown = listed if len(listed) <= _MAX_NAMES else listed[:_MAX_NAMES]
        console.print(f"{name:<13} {escape('; '.join(f'{key} {kind}' for key, kind in shown))}", end="")
        console.print(f"; and {len(listed) - len(shown)} more" if len(listed) > len(shown) else "")
    has_zeros = any(kind.zeros is not None for kind in summary.kinds.values())
    rows = [
        (
            name,
            ", ".join(f"{holder} x{count}" for holder, count in kind.holders.items()),
            kind.count,
            " x ".join(map(str, kind.shape)) if kind.shape else "",
            number(kind.parameters) if kind.parameters else "shared",
            size(kind.bytes) if kind.bytes else "",
            f"{kind.bits_per_weight:.2f}" if kind.bytes else "",
            *(_shares(kind) if has_zeros else ()),
        )
        for name, kind in summary.kinds.items()
    ]
    columns = ("kind", "held by", "count", "N x K", "parameters", "bytes", "bits", *(["zeros"] if has_zeros else []))
    console.print(table("weights by kind", columns, rows, left=2))
    if with_blocks:
        console.print(
            table(
                "blocks",
                ("block", "nodes", "attention", "parameters", "bytes", "bits"),
                [
                    (
                        block.index,
                        block.nodes,
                        "yes" if block.has_attention else "no",
                        number(block.parameters),
                        size(block.bytes),
                        f"{block.bits_per_weight:.2f}",
                    )
                    for block in summary.blocks
                ],
            )
        )
    counts = ", ".join(f"{name} {count}" for name, count in summary.operators.items())
    console.print(f"operators: {escape(counts)}")


def _shares(kind: KindFacts) -> tuple[str]:
    return ("" if kind.zeros is None else f"{100 * kind.zeros:.1f} %",)


def _show_placement(console: Console, plan: dict[str, Any]) -> None:
    for provider, counts in plan["operators"].items():
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        console.print(f"on {provider}: {escape(listed)}")
    console.print(f"copies between devices: {plan['copies']}")
    for node in plan["stray"]:
        console.print(f"strayed to the CPU: {escape(node)}")
