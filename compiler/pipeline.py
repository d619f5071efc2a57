"""Text to passes and back, and the run of a pipeline: one pass after the other, each reported and observed.

`fuse, svd(ratio=0.3), rtn(bits=4)` is a Python expression: names and calls with literal keyword arguments, separated by
commas. A name is a pass or a recipe; a recipe is replaced by its passes, so the text that is stored names passes only.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir

from onnxpress.compiler import registry
from onnxpress.compiler.errors import OptionError, UnknownPassError, near_miss
from onnxpress.compiler.pass_ import Context, Pass, Report, build
from onnxpress.compiler.target import TARGETS, Target
from onnxpress.passes import recipes

Recipe = Callable[[Target], "tuple[Pass, ...]"]


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run. `str()` gives the text that parses back."""

    passes: tuple[Pass, ...]

    def __str__(self) -> str:
        return ", ".join(str(one) for one in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)


class Observer(Protocol):
    """What watches a run: the verifier, the progress display."""

    def before(self, pass_: Pass, model: ir.Model) -> None:
        """Called before each pass."""

    def after(self, pass_: Pass, model: ir.Model, report: Report) -> None:
        """Called after each pass; may add metrics to the report or raise VerificationError."""


def parse(text: str, target: Target = TARGETS["cpu"]) -> Pipeline:
    """The pipeline that `text` describes.

    Raises:
        OptionError: the text is no list of calls, or an option is wrong.
        UnknownPassError: a name is neither a pass nor a recipe.
    """
    try:
        tree = ast.parse(f"({text}\n,)", mode="eval").body
    except SyntaxError as error:
        place = text[: max((error.offset or 1) - 2, 0)]
        raise OptionError(
            f"passes: cannot read {text!r} after {place!r}", hint="write: fuse, rtn(bits=4, block_size=32), pack"
        ) from None
    assert isinstance(tree, ast.Tuple)
    passes: list[Pass] = []
    for item in tree.elts:
        name, arguments = _call(item)
        if name in recipe_names():
            if arguments:
                raise OptionError(f"{name}: a recipe has no options, got {', '.join(arguments)}", hint=_spell(name))
            passes += recipe(name, target).passes
        elif name in registry.names():
            passes.append(build(registry.find(name), arguments))
        else:
            known = [*registry.names(), *recipe_names()]
            raise UnknownPassError(f"there is no pass or recipe {name!r}", hint=near_miss(name, known))
    return Pipeline(tuple(passes))


def recipe(name: str, target: Target = TARGETS["cpu"]) -> Pipeline:
    """The pipeline that the recipe `name` stands for.

    Raises:
        UnknownPassError: there is no such recipe.
    """
    if name not in recipe_names():
        raise UnknownPassError(f"there is no recipe {name!r}", hint=near_miss(name, recipe_names()))
    function: Recipe = getattr(recipes, name.replace("-", "_"))
    return Pipeline(function(target))


def recipe_names() -> list[str]:
    """All recipes, sorted: the public functions of `onnxpress.passes.recipes`, with - for _."""
    return sorted(name.replace("_", "-") for name in recipes.__all__)


def recipe_summary(name: str) -> str:
    """First line of a recipe's docstring."""
    return (inspect.getdoc(getattr(recipes, name.replace("-", "_"))) or "").partition("\n")[0]


def run(
    model: ir.Model, pipeline: Iterable[Pass], context: Context, observers: Iterable[Observer] = ()
) -> list[tuple[Pass, Report]]:
    """Runs every pass in order; `model` is changed in place.

    Args:
        model: the graph.
        pipeline: the passes.
        context: target, config, seed, progress; `context.config` may be edited by passes.
        observers: called before and after each pass.
    """
    watching = list(observers)
    if context.compose is None:
        context.compose = _compose
    done: list[tuple[Pass, Report]] = []
    for pass_ in pipeline:
        for observer in watching:
            observer.before(pass_, model)
        report = pass_.run(model, context)
        for observer in watching:
            observer.after(pass_, model, report)
        if report.modified:
            context.history.append(str(pass_))
        done.append((pass_, report))
    return done


def _compose(model: ir.Model, text: str, context: Context) -> list[Report]:
    """Runs the passes of a text without anybody watching."""
    return [one.run(model, context) for one in parse(text, context.target)]


def _call(item: ast.expr) -> tuple[str, dict[str, Any]]:
    """Name and literal keyword arguments of one item of a pipeline text."""
    if isinstance(item, ast.Name):
        return item.id, {}
    # A recipe may be called by its name with dashes, which Python reads as a subtraction.
    if isinstance(item, ast.BinOp) and isinstance(item.op, ast.Sub):
        left, right = _call(item.left), _call(item.right)
        return f"{left[0]}-{right[0]}", {**left[1], **right[1]}
    if isinstance(item, ast.Call) and isinstance(item.func, ast.Name):
        name = item.func.id
        if item.args:
            raise OptionError(
                f"{name}: options are given by name, got {ast.unparse(item.args[0])}", hint=f"write {name}(option=...)"
            )
        try:
            return name, {str(one.arg): ast.literal_eval(one.value) for one in item.keywords}
        except ValueError:
            raise OptionError(
                f"{name}: options are plain numbers, strings, tuples or dicts, got {ast.unparse(item)}",
                hint="quote words: svd(ratio=0.3), mixed(size='90MB')",
            ) from None
    raise OptionError(
        f"passes: expected a name or a call, got {ast.unparse(item)!r}", hint="write: fuse, rtn(bits=4), pack"
    )


def _spell(name: str) -> str:
    return f"spell its passes out: {recipe(name)}"
