"""What the verbs share: options, tables, numbers for people, progress."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table; errors only.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face id or directory, .gguf file, .onnx file or a directory with one, or a zoo name.",
        show_default=False,
    ),
]
PathArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="A model directory or an .onnx file.", show_default=False),
]
Provider = Annotated[
    str, typer.Option(help="auto (CUDA if it works, else the CPU), cpu or cuda.", metavar="auto|cpu|cuda")
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail instead of falling back from CUDA to the CPU.")]
Threads = Annotated[int | None, typer.Option(help="Threads of one operator.", show_default="physical cores")]

AdapterPath = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH",
        help="A LoRA adapter (.onnx_adapter or a PEFT directory) for a model of `lora slots`; or a model's own repair.",
        show_default="none",
    ),
]

_UNITS = ("B", "kB", "MB", "GB", "TB")


def console() -> Console:
    """Where results go."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1 and a traceback
            raise BrokenPipeError

    # Lines of a file or pipe are not wrapped; only tables need a width.
    is_terminal = sys.stdout.isatty()
    return Piped(highlight=False, soft_wrap=not is_terminal, width=None if is_terminal else 160)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, left: int = 1) -> RenderableType:
    """A table whose first `left` columns hold words and the others numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


def escape(text: str) -> str:
    """Text in which rich sees no markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def emit(facts: Any, *, as_json: bool, quiet: bool, show: Callable[[Console], None]) -> None:
    """Prints facts for programs or for people."""
    if as_json:
        sys.stdout.write(json.dumps(_finite(facts), indent=2, ensure_ascii=False, default=_plain) + "\n")
    elif not quiet:
        show(console())


def size(count: float) -> str:
    """Bytes for people: 96.6 MB."""
    for unit in _UNITS:
        if abs(count) < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def number(count: float) -> str:
    """A large number for people: 134.5 M."""
    for unit in ("", " k", " M", " G", " T"):
        if abs(count) < 1000 or unit == " T":
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError


class Working:
    """Progress of one command on stderr; silent unless it is a terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._main: TaskID | None = None

    def tell(self, message: str) -> None:
        """Says what is being done."""
        if self._progress is None:
            return
        if self._main is None:
            self._main = self._progress.add_task(message, total=None)
        self._progress.update(self._main, description=escape(message))

    def track(self, items: Sequence[Any], label: str) -> Iterable[Any]:
        """Yields `items` below a bar with the time left."""
        if self._progress is None:
            yield from items
            return
        task = self._progress.add_task(f"  {escape(label)}", total=len(items))
        try:
            for item in items:
                yield item
                self._progress.advance(task)
        finally:
            self._progress.remove_task(task)

    def count(self, label: str) -> Callable[[int, int], None]:
        """A callback (done, total) that moves a bar."""
        task = None if self._progress is None else self._progress.add_task(label, total=None)

        def moved(done: int, total: int) -> None:
            if self._progress is not None and task is not None:
                self._progress.update(task, completed=done, total=total)

        return moved


@contextlib.contextmanager
def working(*, quiet: bool) -> Iterator[Working]:
    """Progress for the commands inside; nothing is drawn when `quiet` or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield Working(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Working(progress)


def _finite(value: Any) -> Any:
    """Numbers that JSON has no word for become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
