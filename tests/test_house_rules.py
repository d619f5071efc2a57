"""Rules that hold the house up, as tests: who may import whom, what is packaged, how large a file may be."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxpress

if sys.version_info >= (3, 11):
    import tomllib
else:  # the dependency tree brings it for Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compiler", "models", "passes", "runtime")
MAX_LINES = 500
FILES = sorted(
    path
    for folder in (*PACKAGES, "onnxpress")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
every_file = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])

# The only places that know passes and everything else.
WIRING = tuple(f"onnxpress.compiler.{name}" for name in ("adapters", "cli", "optimize", "pipeline"))
# The registry looks at the folder of passes and imports what it is asked for.
SEES_PASSES = (*WIRING, "onnxpress.compiler.registry")
# What an artifact and its inspection offer to Python users opens the runtime; imported when called.
SEES_RUNTIME = (*WIRING, "onnxpress.compiler.artifact")
HEAVY = ("torch", "transformers", "optimum")
# May import heavy packages at the top, because nobody else imports them at the top.
LATE = (
    "onnxpress.models.exporters",
    *(f"onnxpress.compiler.{name}" for name in ("differentiable", "differentiable_ops", "distillation")),
)


def module(path: Path) -> str:
    """The import path of a file: the house's name in front of its place."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "onnxpress" else parts
    return ".".join(("onnxpress", *parts)).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at the top level) of every import; `from package import name` counts as package.name too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno, id(node) in top
            yield from ((f"{node.module}.{alias.name}", node.lineno, id(node) in top) for alias in node.names)


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(importer: str, imported: str) -> str | None:
    """Why `importer` must not know `imported`, None when it may."""
    if below(importer, "onnxpress.runtime") and below(imported, "onnxpress.passes", "onnxpress.models", *SEES_PASSES):
        return "the runtime knows nothing of passes, front ends and the pipeline"
    if below(importer, "onnxpress.models") and below(imported, "onnxpress.passes", "onnxpress.runtime", *SEES_PASSES):
        return "a front end knows nothing of passes and the runtime"
    if below(importer, "onnxpress.passes"):
        if below(imported, *SEES_PASSES, "onnxpress.models", "onnxpress.runtime"):
            return "a pass knows the views and the contract, not what runs it"
        if importer == "onnxpress.passes.recipes" or not below(imported, "onnxpress.passes"):
            return None
        parts, own = imported.split("."), importer.split(".")
        is_shared = len(parts) > 3 and parts[2] == own[2] and parts[3].startswith("_")
        is_package = len(parts) <= 3
        return None if is_shared or is_package else "a pass knows no sibling"
    if below(importer, "onnxpress.compiler"):
        if below(imported, "onnxpress.passes") and not below(importer, *SEES_PASSES):
            return "only the wiring knows passes"
        if below(imported, "onnxpress.models") and not below(importer, *WIRING):
            return "only the wiring knows front ends"
        if below(imported, "onnxpress.runtime") and not below(importer, *SEES_RUNTIME):
            return "only the wiring and the artifact know the runtime"
        if below(imported, "onnxpress.compiler.cli") and not below(importer, "onnxpress.compiler.cli"):
            return "the command line is the outermost layer"
    return None


@every_file
def test_imports_follow_the_arrows(path: Path) -> None:
    importer = module(path)
    for imported, line, is_top in imports(path):
        reason = forbidden(importer, imported)
        assert reason is None, f"{path.relative_to(ROOT)}:{line}: imports {imported}: {reason}"
        if is_top and importer not in LATE:
            assert not below(imported, *LATE), f"{path.relative_to(ROOT)}:{line}: import {imported} where it is used"
        if below(imported, *HEAVY):
            assert not is_top or importer in LATE, (
                f"{path.relative_to(ROOT)}:{line}: {imported} takes seconds; import it where it is used"
            )
            assert below(importer, "onnxpress.models") or importer in LATE, (
                f"{path.relative_to(ROOT)}:{line}: only front ends and training need {imported}"
            )


@pytest.mark.parametrize(
    "importer, imported, is_fine",
    [
        ("onnxpress.runtime.session", "onnxpress.passes.quantization.rtn", False),
        ("onnxpress.runtime.session", "onnxpress.compiler.errors", True),
        ("onnxpress.passes.fusion.fuse_swiglu", "onnxpress.passes.fusion.fuse_rotary", False),
        ("onnxpress.passes.fusion.fuse_swiglu", "onnxpress.passes.fusion._shared", True),
        ("onnxpress.passes.fusion.fuse_swiglu", "onnxpress.compiler.cli", False),
        ("onnxpress.passes.recipes", "onnxpress.passes.quantization.rtn", True),
        ("onnxpress.compiler.linears", "onnxpress.passes.recipes", False),
        ("onnxpress.compiler.pipeline", "onnxpress.passes.recipes", True),
        ("onnxpress.models.load", "onnxpress.runtime.session", False),
        ("onnxpress.compiler.verify", "onnxpress.runtime", False),
    ],
)
def test_the_arrows_are_seen(importer: str, imported: str, is_fine: bool) -> None:
    assert (forbidden(importer, imported) is None) == is_fine


def code_lines(text: str) -> int:
    """Lines with code on them; blank lines, comments and docstrings are free."""
    tree = ast.parse(text)
    free: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            free.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    used: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - free)


def test_only_code_counts() -> None:
    assert code_lines('"""Doc\n\nmore."""\n\n# why\nx = (\n    1,\n)\n\ndef f():\n    """Doc."""\n    return x\n') == 5


@every_file
def test_every_file_is_small_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert code_lines(text) <= MAX_LINES, f"{path.relative_to(ROOT)}: more than {MAX_LINES} lines of code; divide it"
    doc = ast.get_docstring(ast.parse(text))
    assert doc, f"{path.relative_to(ROOT)} has no docstring"
    assert doc.partition("\n")[0].rstrip().endswith((".", ":", "?")), f"{path.relative_to(ROOT)}: not a sentence"


@every_file
def test_nothing_is_printed_below_the_command_line(path: Path) -> None:
    if below(module(path), "onnxpress.compiler.cli"):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input", "exit"), f"{path.relative_to(ROOT)}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "basicConfig", f"{path.relative_to(ROOT)}:{node.lineno}: a library sets up no logging"


def test_packages_in_pyproject_are_the_folders() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(tool["packages"]) == sorted({module(path) for path in FILES if path.name == "__init__.py"})
    assert tool["package-dir"] == {"onnxpress": "onnxpress", **{f"onnxpress.{name}": name for name in PACKAGES}}


def test_every_pass_has_a_test() -> None:
    for path in sorted((ROOT / "passes").glob("*/*.py")):
        if not path.name.startswith("_"):
            test = ROOT / "tests" / "passes" / path.parent.name / f"test_{path.name}"
            assert test.is_file(), f"{path.relative_to(ROOT)}: write {test.relative_to(ROOT)}"


def test_public_names_are_sorted_and_exist() -> None:
    assert onnxpress.__all__ == sorted(onnxpress.__all__)
    assert dir(onnxpress) == onnxpress.__all__
    for name in onnxpress.__all__:
        assert getattr(onnxpress, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = onnxpress.nothing


def test_public_names_are_declared_for_type_checkers_too() -> None:
    tree = ast.parse((ROOT / "onnxpress" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    declared |= {
        node.target.id for node in block.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert declared == set(onnxpress.__all__)


@every_file
def test_all_lists_are_sorted_and_exact(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(one, ast.Name) and one.id == "__all__" for one in node.targets
        ):
            names = ast.literal_eval(node.value)
            assert names == sorted(names), f"{path.relative_to(ROOT)}: __all__ is not sorted"
            if path.parent.name != "onnxpress":
                # Lazily loaded names stand in an import below TYPE_CHECKING.
                bound = {
                    alias.asname or alias.name
                    for one in ast.walk(tree)
                    if isinstance(one, ast.ImportFrom)
                    for alias in one.names
                }
                bound |= {one.name for one in tree.body if isinstance(one, ast.FunctionDef | ast.ClassDef)}
                bound |= {
                    name.id
                    for one in tree.body
                    if isinstance(one, ast.Assign)
                    for name in one.targets
                    if isinstance(name, ast.Name)
                }
                assert set(names) <= bound, f"{path.relative_to(ROOT)}: __all__ names what is not there"
