"""A loaded model: text in, text out, and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from onnxpress.compiler.errors import OptionError
from onnxpress.runtime.evaluate import Evaluation, detokenize_wikitext, perplexity
from onnxpress.runtime.generate import Generation, Generator, Stream
from onnxpress.runtime.providers import Choice
from onnxpress.runtime.sampling import GenerationOptions
from onnxpress.runtime.session import DecoderSession
from onnxpress.runtime.tokenizer import Tokenizer

#: Plain text, a conversation (`{"role": ..., "content": ...}` each), or token ids.
Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]


class Model:
    """A decoder with its tokenizer.

    Args:
        session: the graph in ONNX Runtime.
        tokenizer: of the model's directory; None where it has none, then prompts are token ids.
    """

    def __init__(self, session: DecoderSession, tokenizer: Tokenizer | None = None) -> None:
        self.session = session
        self.generator = Generator(session, tokenizer)
        self._tokenizer = tokenizer

    @property
    def choice(self) -> Choice:
        """The execution provider that runs the model, and why."""
        return self.session.choice

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model's directory has a tokenizer."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model.

        Raises:
            OptionError: the model's directory has none.
        """
        if self._tokenizer is None:
            raise OptionError(
                f"{self.session.path.parent}: expected tokenizer.json beside the model, found none",
                hint="copy the tokenizer files of the checkpoint there, or give token ids",
            )
        return self._tokenizer

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Reads a LoRA adapter, which requests then name: `generate(prompt, adapter=name)`.

        Args:
            path: an `.onnx_adapter` file, or the directory of a PEFT adapter.
            name: by default that of the file or directory.

        Returns:
            The name.

        Raises:
            UnsupportedModelError: the graph has no slots for it; `onnxpress lora slots` makes them.
            BadModelFileError: the adapter is missing or damaged.
        """
        return self.session.load_adapter(path, name)

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt: text as it stands, a conversation through the chat template."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        items: list[Any] = list(prompt)
        if items and isinstance(items[0], Mapping):
            return self.tokenizer.encode_chat(items)
        return [int(item) for item in items]

    def stream(self, prompt: Prompt, options: GenerationOptions | None = None, **settings: Any) -> Stream:
        """Continues `prompt`, piece by piece; `settings` are those of `GenerationOptions`."""
        return self.generator.stream(self.encode(prompt), _options(options, settings))

    def generate(self, prompt: Prompt, options: GenerationOptions | None = None, **settings: Any) -> Generation:
        """Continues `prompt` to the end; `settings` are those of `GenerationOptions`."""
        return self.generator.generate(self.encode(prompt), _options(options, settings))

    def generate_batch(
        self, prompts: Sequence[Prompt], options: GenerationOptions | None = None, **settings: Any
    ) -> list[Generation]:
        """Continues several prompts together, each as it would be alone."""
        return self.generator.generate_batch([self.encode(prompt) for prompt in prompts], _options(options, settings))

    def evaluate(
        self,
        text: str | Sequence[int],
        *,
        context: int = 1024,
        tokens: int = 8192,
        reference: Model | None = None,
        wikitext: bool = False,
        adapter: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Perplexity of a text, and the divergence from a reference; see `onnxpress.runtime.evaluate`.

        Args:
            text: text, or its tokens without special ones.
            wikitext: undo the tokenisation of WikiText first.
            adapter: name of a loaded adapter that this model uses, the reference not.
            context, tokens, reference, progress: see `perplexity`.
        """
        if isinstance(text, str):
            # No more of the text than can be needed: a token is seldom longer than this on average.
            text = (detokenize_wikitext(text) if wikitext else text)[: tokens * 64]
            ids: Sequence[int] = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = text
        return perplexity(
            self.session,
            ids,
            context=context,
            tokens=tokens,
            reference=reference.session if reference else None,
            tokenizer=self._tokenizer,
            adapter=adapter,
            progress=progress,
        )


def load(path: str | Path, *, provider: str = "auto", threads: int | None = None, strict: bool = False) -> Model:
    """Loads a decoder for use.

    Args:
        path: a model directory or an .onnx file; tokenizer and settings are looked for beside it.
        provider: auto, cpu or cuda.
        threads: of one operator; None is one per physical core.
        strict: fail instead of falling back from CUDA to the CPU.

    Raises:
        BadModelFileError: a file is missing or broken.
        UnsupportedModelError: the graph is no decoder.
        ProviderError: `strict`, and the provider does not work.
    """
    session = DecoderSession(path, provider=provider, threads=threads, strict=strict)
    directory = session.path.parent
    return Model(session, Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None)


def _options(options: GenerationOptions | None, settings: Mapping[str, Any]) -> GenerationOptions:
    if options is not None and settings:
        raise OptionError(f"generation: expected options or settings, got both: {', '.join(settings)}")
    if options is not None:
        return options
    try:
        return GenerationOptions(**settings)
    except TypeError as error:
        raise OptionError(f"generation: {error}") from error
