"""`onnxpress explain`: all there is to know about one pass."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxpress.compiler.cli.common import Json, Quiet, emit, escape

if TYPE_CHECKING:
    from rich.console import Console

_PROMISES = {
    "exact": "outputs stay equal to the last bit",
    "close": "outputs stay equal up to the order of float additions",
    "lossy": "outputs change; the report says by how much",
}


def explain(
    name: Annotated[str, typer.Argument(metavar="PASS", help="A pass or a recipe.", show_default=False)],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a pass does: its docstring, options, promise and paper. Of a recipe, its passes."""
    from onnxpress.compiler import pipeline, registry

    if name in pipeline.recipe_names() and name not in registry.names():
        facts: dict[str, Any] = {
            "name": name,
            "summary": pipeline.recipe_summary(name),
            "pipeline": str(pipeline.recipe(name)),
        }
        emit(facts, as_json=as_json, quiet=quiet, show=lambda console: _show_recipe(console, facts))
        return
    facts = describe(name)
    emit(facts, as_json=as_json, quiet=quiet, show=lambda console: _show(console, facts))


def describe(name: str) -> dict[str, Any]:
    """A pass as plain values."""
    from onnxpress.compiler import registry
    from onnxpress.compiler.pass_ import options

    cls = registry.find(name)
    return {
        "name": name,
        "family": registry.family(name),
        "promise": cls.promise.value,
        "paper": cls.paper,
        "doc": inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""),
        "does": inspect.cleandoc(cls.__doc__ or ""),
        "options": [
            {"name": option, "type": _type(kind), "default": default, "help": _help(cls, option)}
            for option, (kind, default) in options(cls).items()
        ],
    }


def _help(cls: type, option: str) -> str:
    """The comment on an option where it is declared: above the line, or at its end."""
    for base in cls.__mro__:
        if option in vars(base).get("__annotations__", {}):
            lines = inspect.getsource(base).splitlines()
            place = next(number for number, line in enumerate(lines) if re.match(rf"    {option}: ", line))
            above = place
            while lines[above - 1].lstrip().startswith("#"):
                above -= 1
            said = [line.strip().lstrip("# ") for line in lines[above:place]]
            _, mark, behind = lines[place].partition("  # ")
            return " ".join([*said, behind] if mark else said)
    return ""


def _type(kind: Any) -> str:
    if isinstance(kind, type):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("Literal", "one of ")


def _show(console: Console, facts: dict[str, Any]) -> None:
    console.print(f"[bold]{facts['name']}[/bold] ({facts['family']})")
    console.print()
    console.print(escape(facts["doc"]))
    if facts["does"] and facts["does"] not in facts["doc"]:
        console.print()
        console.print(escape(facts["does"]))
    console.print()
    console.print(f"promise: {facts['promise']}: {_PROMISES[facts['promise']]}")
    if facts["paper"]:
        console.print(f"paper:   {facts['paper']}")
    if not facts["options"]:
        console.print("options: none")
        return
    console.print("options:")
    width = max(len(option["name"]) for option in facts["options"])
    for option in facts["options"]:
        console.print(escape(f"  {option['name']:<{width}} = {option['default']!r}   {option['type']}"))
        if option["help"]:
            console.print(escape(f"  {'':<{width}}   {option['help']}"))


def _show_recipe(console: Console, facts: dict[str, Any]) -> None:
    console.print(f"[bold]{facts['name']}[/bold] (recipe)")
    console.print(escape(facts["summary"]))
    console.print(escape(facts["pipeline"]))
