"""Text to tokens and back, from the files of a checkpoint alone: tokenizers and jinja2, no transformers.

Streaming is the hard part. A token may hold half a character, and a decoder may drop a space that only the next token
reveals. `Detokenizer` decodes a short window that starts at the last whole character, and releases text only when it
cannot change any more.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from onnxpress.compiler.errors import BadModelFileError, OptionError
from onnxpress.runtime.config import read_json

Message = Mapping[str, Any]

_INCOMPLETE = "\ufffd"  # what a decoder puts in place of bytes that are no character (yet)
_PATIENCE = 24  # tokens to wait for a character to become whole; more is not text but noise


class Tokenizer:
    """The tokenizer of a model directory.

    Args:
        directory: holds `tokenizer.json` and, as a rule, `tokenizer_config.json` and `chat_template.jinja`.

    Raises:
        BadModelFileError: `tokenizer.json` is missing or broken.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise BadModelFileError(
                f"{directory}: expected tokenizer.json, found none",
                hint="copy the tokenizer files of the checkpoint into the directory, or give token ids",
            )
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise BadModelFileError(f"{file}: not a tokenizer: {error}", hint="copy the file again") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.config = read_json(directory / "tokenizer_config.json")
        self.special = _special_tokens(self.config, read_json(directory / "special_tokens_map.json"))
        self._adds_bos = self.config.get("add_bos_token")
        self._adds_eos = self.config.get("add_eos_token")
        self.templates = _templates(directory, self.config)

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the checkpoint names one."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the checkpoint names one."""
        return self._id("eos_token")

    def _id(self, role: str) -> int | None:
        token = self.special.get(role)
        found = self.backend.token_to_id(token) if token else None
        return int(found) if found is not None else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of `text`; with `add_special_tokens`, begun and ended as the checkpoint asks."""
        # Newer files say this in the post-processor, older ones in the configuration alone; the configuration wins.
        template = add_special_tokens and self._adds_bos is not False
        ids = list(self.backend.encode(text, add_special_tokens=template).ids)
        if add_special_tokens:
            if self._adds_bos and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
                ids.insert(0, self.bos_token_id)
            if self._adds_eos and self.eos_token_id is not None and ids[-1:] != [self.eos_token_id]:
                ids.append(self.eos_token_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, spaces as they stand (no clean-up before punctuation)."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Decodes a stream of tokens."""
        return Detokenizer(self.backend, skip_special_tokens=skip_special_tokens)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a conversation with the checkpoint's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            add_generation_prompt: end where the assistant's answer begins.
            template: the name of one of several templates; None is the default one.
            tools: descriptions of functions the model may call.
            variables: further names the template reads.

        Raises:
            OptionError: the checkpoint has no chat template, or the template refuses the conversation.
        """
        source = self.templates.get(template or ("tool_use" if tools and "tool_use" in self.templates else "default"))
        if source is None:
            raise OptionError(
                f"chat: the checkpoint has no chat template {template or ''}".rstrip(),
                hint="give plain text instead of messages",
            )
        values: dict[str, Any] = {**self.special, "tools": tools, "documents": None, **variables}
        try:
            return _compiled(source).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **values
            )
        except jinja2.TemplateError as error:
            raise OptionError(f"chat: the template refuses the conversation: {error}") from error

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The tokens of a rendered conversation; the template alone decides about special tokens."""
        return self.encode(self.chat(messages, **options), add_special_tokens=False)


class Detokenizer:
    """Turns tokens into text as they come. `add` gives what is certain, `flush` the rest."""

    def __init__(self, backend: tokenizers.Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._decode = backend.decode
        self._skip = skip_special_tokens
        self._window: list[int] = []  # tokens whose text is out, then those still open
        self._settled = 0  # how many of the window are out
        self._shown = ""  # the text of these

    def add(self, token: int) -> str:
        """The text that `token` makes certain; "" while a character is not whole."""
        self._window.append(token)
        text = self._decode(self._window, skip_special_tokens=self._skip)
        open_tokens = len(self._window) - self._settled
        if text.endswith(_INCOMPLETE) and open_tokens < _PATIENCE:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """The text that was held back; what is not a whole character stays U+FFFD."""
        if self._settled == len(self._window):
            return ""
        return self._settle(self._decode(self._window, skip_special_tokens=self._skip))

    def _settle(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            # The tokens just settled stay as context: the next one may owe them its leading space.
            self._window = self._window[self._settled :]
            self._shown = self._decode(self._window, skip_special_tokens=self._skip)
        else:
            self._shown = text
        self._settled = len(self._window)
        return new


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found.setdefault(name, text)
    return found


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates: dict[str, str] = {}
    inside = config.get("chat_template")
    if isinstance(inside, str):
        templates["default"] = inside
    elif isinstance(inside, list):
        templates |= {entry["name"]: entry["template"] for entry in inside}
    for file in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    return templates


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    # A template is code from a checkpoint: it runs in the sandbox and cannot change what it is given.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
