"""`onnxpress eval`: perplexity, and the distance from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxpress.compiler.cli.common import (
    AdapterPath,
    Json,
    PathArgument,
    Provider,
    Quiet,
    Strict,
    Threads,
    emit,
    escape,
    table,
    working,
)

if TYPE_CHECKING:
    from rich.console import Console

# Only texts tokenized like WikiText have these.
_WIKITEXT_MARKS = (" @-@ ", " @,@ ", " @.@ ")


def evaluate(
    path: PathArgument,
    reference: Annotated[
        str | None, typer.Option(metavar="PATH", help="The model to compare with: adds KL divergence and agreement.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Plain text to evaluate on.", show_default="English text of Python's help"),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window; windows do not overlap.")] = 1024,
    tokens: Annotated[int, typer.Option(help="How much of the text.")] = 8192,
    provider: Provider = "auto",
    threads: Threads = None,
    strict: Strict = False,
    adapter: AdapterPath = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity on a text, and with a reference the KL divergence, top-1 agreement and the worst tokens."""
    from onnxpress.compiler.sample_text import TOPICS, default_text
    from onnxpress.runtime.model import load

    content = default_text() if text is None else _read(text)
    is_wikitext = text is not None and any(mark in content for mark in _WIKITEXT_MARKS)
    with working(quiet=quiet or as_json) as progress:
        progress.tell("loading")
        model = load(path, provider=provider, threads=threads, strict=strict)
        other = None if reference is None else load(reference, provider=provider, threads=threads, strict=strict)
        found = model.evaluate(
            content,
            context=context,
            tokens=tokens,
            reference=other,
            wikitext=is_wikitext,
            adapter=None if adapter is None else model.load_adapter(adapter),
            progress=progress.count("evaluating"),
        )
    facts: dict[str, Any] = {
        "path": path,
        **found.to_json(),
        "text": text or TOPICS,
        "detokenized": is_wikitext,
        "provider": model.choice.provider,
    }
    if adapter is not None:
        facts["adapter"] = adapter
    if reference is not None:
        facts["reference"] = reference
    emit(facts, as_json=as_json, quiet=quiet, show=lambda console: _show(console, facts))


def _read(path: str) -> str:
    from onnxpress.compiler.errors import CalibrationError

    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}", hint="give a text file") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: expected UTF-8 text: {error.reason}", hint="give a text file") from error


def _show(console: Console, facts: dict[str, Any]) -> None:
    note = ", WikiText's tokenisation undone" if facts["detokenized"] else ""
    console.print(f"text            {escape(facts['text'])}{note}")
    console.print(f"tokens          {facts['tokens']} in windows of {facts['context']}")
    console.print(f"perplexity      {facts['perplexity']:.4f}")
    if "kl" not in facts:
        return
    console.print(f"  reference     {facts['reference_perplexity']:.4f} ({escape(facts['reference'])})")
    console.print(f"KL divergence   {facts['kl']:.6f} nats per token")
    console.print(f"top-1 agreement {facts['top1_agreement']:.2%}")
    if "kept_probability" in facts:
        console.print(f"compared over the model's tokens, which have {facts['kept_probability']:.2%} of the reference")
    rows = [
        (f"...{escape(one['context'][-50:])!r}", escape(repr(one["token"])), one["position"], f"{one['kl']:.3f}")
        for one in facts["worst"]
    ]
    if rows:
        console.print(table("worst tokens", ("after", "came", "position", "KL"), rows, left=2))
