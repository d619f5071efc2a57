"""The command line: one thin file per verb, and here what they share at the outer edge: errors, exit codes, signals."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from onnxpress.compiler.cli import (
    bench,
    doctor,
    evaluate,
    explain,
    explain_fusion,
    export,
    inspect,
    lora,
    optimize,
    passes,
    recipes,
    run,
)
from onnxpress.compiler.errors import OnnxpressError, near_miss

__all__ = ["app", "entry", "main"]

_DEBUG = "ONNXPRESS_DEBUG"
_INTERRUPTED, _TERMINATED, _BROKEN_PIPE = 130, 143, 141  # 128 + the signal's number, as a shell says it

app = typer.Typer(
    name="onnxpress",
    help="Makes language models smaller and faster on ONNX Runtime, and proves every step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_VERBS: dict[str, Callable[..., None]] = {
    "export": export.export,
    "optimize": optimize.optimize,
    "inspect": inspect.inspect,
    "eval": evaluate.evaluate,
    "bench": bench.bench,
    "run": run.run,
    "passes": passes.passes,
    "explain": explain.explain,
    "explain-fusion": explain_fusion.explain_fusion,
    "recipes": recipes.recipes,
    "doctor": doctor.doctor,
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM, so that it unwinds like Ctrl-C and leaves no temporary directory."""


class _Stopped(Exception):  # noqa: N818  # not an error, and typer must not take it for what it handles in its own way
    """A command was stopped from outside."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def _stoppable(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, with interrupts and a reader that went away as `_Stopped`."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
            sys.stdout.flush()
        except _Terminated:
            raise _Stopped("terminated", _TERMINATED) from None
        except KeyboardInterrupt as stop:
            hint = f"\nhint: {stop}" if str(stop) else ""
            raise _Stopped(f"interrupted{hint}", _INTERRUPTED) from None
        except BrokenPipeError:
            raise _Stopped("", _BROKEN_PIPE) from None

    return call


for _name, _function in _VERBS.items():
    app.command(name=_name)(_stoppable(_function))

_LORA: dict[str, Callable[..., None]] = {
    "merge": lora.merge,
    "slots": lora.slots,
    "convert": lora.convert,
    "extract": lora.extract,
}
_lora = typer.Typer(name="lora", help="Adapters: merge, slots, convert, extract.", no_args_is_help=True)
for _name, _function in _LORA.items():
    _lora.command(name=_name)(_stoppable(_function))
app.add_typer(_lora)


def _version(wanted: bool) -> None:
    if wanted:
        from onnxpress import __version__

        typer.echo(f"onnxpress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log what happens; show tracebacks.")] = False,
) -> None:
    pass


def entry() -> NoReturn:
    """What the shell calls: `main` in a process of its own, made for one short run.

    Graphs are millions of small objects that live to the end: to look for garbage among them again and again, and to
    take them apart one by one at the end, costs a sixth of the time of `optimize`.
    """
    gc.set_threshold(100_000, 50, 50)
    sys.setswitchinterval(2e-4)  # threads that compute in numpy need the interpreter often, and for moments only
    code = 1
    try:
        code = main()
        atexit._run_exitfuncs()  # no public name does what the interpreter would do now
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
                stream.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; `sys.argv` is read when no arguments are given."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = bool(os.environ.get(_DEBUG))
    if "--debug" in arguments[: arguments.index("--")] if "--" in arguments else "--debug" in arguments:
        arguments.remove("--debug")  # so that it is welcome before and after the verb
        debug = True
    _log(debug)
    try:
        with _sigterm():
            result = app(args=arguments, prog_name="onnxpress", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except OnnxpressError as error:
        return _fail(error.message, error.hint, error.exit_code, debug=debug)
    except _Stopped as stopped:
        if stopped.code == _BROKEN_PIPE:
            # What is still buffered must not raise again when the interpreter closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return stopped.code
        return _fail(str(stopped), None, stopped.code)
    except MemoryError:
        return _fail("out of memory", "use a machine with more memory, or a smaller model", 1, debug=debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", None, 2, debug=debug)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return _usage(error, arguments)
        hint = "this is a bug; please report it with the output of the same command and --debug"
        return _fail(f"{type(error).__name__}: {error}", hint, 1, debug=debug)


def _usage(error: Any, arguments: Sequence[str]) -> int:
    """What is wrong with the command line itself."""
    message = str(error.format_message()).strip()
    if message.startswith("Usage:"):  # `onnxpress lora` alone
        sys.stderr.write(message + "\n")
        return 2
    if not message:  # the help text was shown instead
        return 2
    words = [one for one in arguments if not one.startswith("-")]
    unknown, known = next(iter(words), ""), [*_VERBS, "lora"]
    if unknown == "lora":
        unknown, known = " ".join(words[:2]), [f"lora {name}" for name in _LORA]
    if message.startswith("No such command"):
        return _fail(f"there is no command {unknown!r}", near_miss(unknown, known), 2)
    # The parser appends what it thinks was meant, in one of several wordings; the options in it are what counts.
    first, _, suggestion = message.replace(" (Possible", " Did you mean (").partition(" Did you mean")
    meant = [one for one in re.findall(r"--[\w-]+", suggestion) if one != "--help"]
    hint = f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"see: onnxpress {unknown} --help"
    return _fail(first.rstrip("."), hint.replace("  ", " "), int(error.exit_code))


def _fail(message: str, hint: str | None, code: int, *, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    lines = [f"error: {message}"] + ([f"hint: {hint}"] if hint else [])
    sys.stderr.write("\n".join(lines) + "\n")
    return code


class _sigterm:  # noqa: N801  # reads as the context manager it is
    """Turns SIGTERM into an exception; leaves the handler of an embedding program alone outside the main thread."""

    def __enter__(self) -> None:
        self.old: Any = None
        with contextlib.suppress(ValueError):
            self.old = signal.signal(signal.SIGTERM, self._raise)

    def __exit__(self, *_: object) -> None:
        if self.old is not None:
            signal.signal(signal.SIGTERM, self.old)

    @staticmethod
    def _raise(number: int, frame: FrameType | None) -> None:
        raise _Terminated


def _log(debug: bool) -> None:
    """Logs of onnxpress go to stderr, warnings by default, everything with --debug."""
    import logging

    logger = logging.getLogger("onnxpress")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # its warnings are about its own inner steps
