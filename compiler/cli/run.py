"""`onnxpress run`: generation, streamed; without a prompt an interactive chat."""

from __future__ import annotations

import dataclasses
import sys
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
    working,
)

if TYPE_CHECKING:
    from onnxpress.runtime.model import Model
    from onnxpress.runtime.sampling import GenerationOptions

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def run(
    path: PathArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to say; '-' reads it from stdin; nothing starts a chat.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "--max-new-tokens", help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more random.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Choose among so many likeliest tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens of this total probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 discourages tokens that occurred.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling.", show_default="random")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be given more than once.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the system message says.", show_default="none")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template.", show_default="if there is one")
    ] = None,
    provider: Provider = "auto",
    threads: Threads = None,
    strict: Strict = False,
    adapter: AdapterPath = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text with a model, token by token; without a prompt, chat with it."""
    from onnxpress.runtime.model import load
    from onnxpress.runtime.sampling import GenerationOptions

    settings = GenerationOptions(
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    is_interactive = prompt is None and sys.stdin.isatty() and not as_json
    if prompt == "-" or (prompt is None and not is_interactive):
        prompt = sys.stdin.read()
    with working(quiet=quiet or as_json) as progress:
        progress.tell("loading")
        model = load(path, provider=provider, threads=threads, strict=strict)
        options = dataclasses.replace(settings, adapter=None if adapter is None else model.load_adapter(adapter))
    if chat is None:
        chat = model.has_tokenizer and "default" in model.tokenizer.templates
    history = [{"role": "system", "content": system}] if system else []
    if is_interactive:
        _converse(model, options, history, chat=chat, quiet=quiet)
        return
    assert prompt is not None
    said: Any = [*history, {"role": "user", "content": prompt}] if chat else prompt
    if not as_json:
        _stream(model, said, options)
        return
    result = model.generate(said, options)
    facts = {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "provider": model.choice.provider,
    }
    emit(facts, as_json=True, quiet=quiet, show=lambda _: None)


def _stream(model: Model, said: Any, options: GenerationOptions) -> str:
    """Prints an answer as it comes and returns it; Ctrl-C ends it early and is passed on."""
    stream = model.stream(said, options)
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        stream.close()
        sys.stdout.write("\n")
        sys.stdout.flush()
    return stream.result.text


def _converse(
    model: Model, options: GenerationOptions, history: list[dict[str, str]], *, chat: bool, quiet: bool
) -> None:
    """A conversation on the terminal, until the user ends it."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    if not quiet:
        sys.stderr.write(f"running on {model.choice.provider} ({model.choice.reason}); {_HELP}\n")
    beginning = list(history)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if said in ("/exit", "/quit"):
            return
        if said == "/reset":
            history[:] = beginning
            continue
        if not said:
            continue
        history.append({"role": "user", "content": said})
        try:
            answer = _stream(model, history if chat else said, options)
        except KeyboardInterrupt:
            history.pop()  # an answer that was broken off would mislead the next one
            continue
        history.append({"role": "assistant", "content": answer})
