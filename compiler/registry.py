"""Finds passes by name: the folder is the registry, one pass a file, nothing to enlist."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

import onnxpress.passes
from onnxpress.compiler.errors import PassError, UnknownPassError, near_miss
from onnxpress.compiler.pass_ import Pass


@functools.cache
def families() -> dict[str, tuple[str, ...]]:
    """Family to the names of its passes, both sorted; imports no pass."""
    found: dict[str, tuple[str, ...]] = {}
    for family in sorted(info.name for info in pkgutil.iter_modules(onnxpress.passes.__path__) if info.ispkg):
        package = importlib.import_module(f"onnxpress.passes.{family}")
        names = (info.name for info in pkgutil.iter_modules(package.__path__))
        found[family] = tuple(sorted(name for name in names if not name.startswith("_")))
    return found


def names() -> list[str]:
    """All pass names, sorted."""
    return sorted(name for group in families().values() for name in group)


def family(name: str) -> str:
    """The family folder that holds the pass `name`.

    Raises:
        UnknownPassError: there is no such pass.
    """
    for group, members in families().items():
        if name in members:
            return group
    raise UnknownPassError(f"there is no pass {name!r}", hint=near_miss(name, names()))


def find(name: str) -> type[Pass]:
    """The pass class called `name`; imports just its file.

    Raises:
        UnknownPassError: there is no such pass.
        PassError: its file does not hold exactly one pass.
    """
    module = importlib.import_module(f"onnxpress.passes.{family(name)}.{name}")
    classes = [
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, Pass) and member.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise PassError(f"{module.__name__}: expected exactly one Pass, found {len(classes)}")
    return classes[0]
