"""`onnxpress passes`: every pass in one line, by family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnxpress.compiler.cli.common import Json, Quiet, emit, escape

if TYPE_CHECKING:
    from rich.console import Console


def passes(as_json: Json = False, quiet: Quiet = False) -> None:
    """List all passes, one line each, by family."""
    from onnxpress.compiler import registry

    families = {
        family: [
            {"name": name, "promise": registry.find(name).promise.value, "summary": summary(name)} for name in names
        ]
        for family, names in registry.families().items()
    }
    emit(families, as_json=as_json, quiet=quiet, show=lambda console: _show(console, families))


def summary(name: str) -> str:
    """First line of the docstring of a pass's file."""
    import sys

    from onnxpress.compiler import registry

    module = sys.modules[registry.find(name).__module__]
    return (module.__doc__ or "").strip().partition("\n")[0]


def _show(console: Console, families: dict[str, list[dict[str, Any]]]) -> None:
    width = max((len(row["name"]) for rows in families.values() for row in rows), default=0)
    for family, rows in families.items():
        console.print(f"[bold]{family}[/bold]")
        for row in rows:
            console.print(f"  {row['name']:<{width}}  {row['promise']:<5}  {escape(row['summary'])}")
