"""Text to token ids and back, and chat templates, from the files beside the weights.

tokenizer.json is read by the `tokenizers` library; templates run in jinja2's sandbox, because they come from
the same place as the weights and are not trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from splitinfer.errors import TokenizerError, UsageError
from splitinfer.model.config import load_config, read_json

__all__ = ["StreamDecoder", "Tokenizer"]

TOKENIZER = "tokenizer.json"
# Their presence without tokenizer.json means a tokenizer of another kind.
OTHER_KINDS = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json")
REPLACEMENT = "\ufffd"  # what incomplete UTF-8 decodes to
MAX_HELD = 8  # tokens; a character has at most four bytes, so bytes that wait longer are broken


class Tokenizer:
    """A checkpoint's tokenizer. `eos_ids` end a reply; `vocab_size` counts added tokens too."""

    def __init__(
        self, path: Path, core: tokenizers.Tokenizer, settings: Mapping[str, Any], eos_ids: Sequence[int]
    ) -> None:
        self.path = path
        self._core = core
        self._bos_token = _token_text(settings.get("bos_token")) or "<bos>"
        self._eos_token = _token_text(settings.get("eos_token")) or "<eos>"
        self._settings = settings
        self.bos_id: int | None = core.token_to_id(self._bos_token)
        self._adds_bos = bool(settings.get("add_bos_token", True))  # Gemma's own default
        own_eos = core.token_to_id(self._eos_token)
        self.eos_ids = tuple(eos_ids) or (() if own_eos is None else (own_eos,))
        self._template: jinja2.Template | None = None

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer | None:
        """The tokenizer of checkpoint directory or GGUF file `path`, or None where it has none at all.

        Raises TokenizerError for one that is damaged or of a kind not implemented.
        """
        directory = Path(path)
        if directory.suffix == ".gguf":
            return cls._from_gguf(directory)
        file = directory / TOKENIZER
        if not file.is_file():
            others = [name for name in OTHER_KINDS if (directory / name).is_file()]
            if not others:
                return None
            raise TokenizerError(
                f"{directory} has {others[0]} but no {TOKENIZER}",
                path=str(directory),
                remedy=f"Add the {TOKENIZER} of this model; transformers writes one with save_pretrained.",
            )
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise TokenizerError(
                f"{file} cannot be used: {error}", path=str(file), remedy="Fetch the file again."
            ) from None
        settings_file = directory / "tokenizer_config.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        template = _template_source(directory, settings)
        known = (directory / "config.json").is_file()
        eos_ids = load_config(directory).eos_token_ids if known else ()
        return cls(directory, core, {**settings, "chat_template": template}, eos_ids)

    @classmethod
    def _from_gguf(cls, path: Path) -> Tokenizer | None:
        """The tokenizer in a GGUF file's metadata."""
        from splitinfer.model.gguf_config import config_table  # here: few models are such files
        from splitinfer.model.gguf_file import GgufFile
        from splitinfer.model.gguf_tokenizer import tokenizer_files

        file = GgufFile(path)
        files = tokenizer_files(file)
        if not files:
            return None
        core = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        settings = json.loads(files["tokenizer_config.json"])
        eos_ids = config_table(file)["eos_token_id"]
        return cls(path, core, {"chat_template": None, **settings}, eos_ids)

    @property
    def vocab_size(self) -> int:
        return int(self._core.get_vocab_size())

    @property
    def has_chat_template(self) -> bool:
        return self._settings["chat_template"] is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, after the beginning-of-sequence token where the model wants one.

        Special tokens written out in the text ("<bos>", "<start_of_turn>") count as such, so a rendered
        chat encodes as it should, and no second <bos> is put before its own.
        """
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        if self._adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return str(self._core.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> StreamDecoder:
        """A decoder for one reply, fed token by token."""
        return StreamDecoder(self)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt text for `messages` ({"role": ..., "content": ...}) by the checkpoint's own template.

        `variables` reach the template; `add_generation_prompt` is true unless given. Raises UsageError where
        there is no template or it rejects the messages, TokenizerError where the template itself is wrong.
        """
        source = self._settings["chat_template"]
        if source is None:
            raise UsageError(
                f"{self.path} has no chat template", remedy="Use plain text generation with this model."
            )
        if self._template is None:
            self._template = _compile(source, self.path)
        values = {"bos_token": self._bos_token, "eos_token": self._eos_token, "add_generation_prompt": True}
        try:
            return self._template.render(messages=list(messages), **{**values, **variables})
        except UsageError:
            raise
        except Exception as error:  # whatever a foreign template does
            raise TokenizerError(
                f"the chat template of {self.path} failed: {error}",
                path=str(self.path),
                remedy="Check the messages' fields against what the template expects.",
            ) from None


class StreamDecoder:
    """Turns tokens into text as they come. Together the pieces are `decode` of all tokens.

    A character whose bytes are spread over several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders drop a leading space and join byte tokens, so new tokens are decoded after some context:
        # those of the piece before, which end a character and start one.
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often its own, sometimes ""."""
        self._held.append(token_id)
        text = self._tokenizer.decode([*self._context, *self._held])
        if text.endswith(REPLACEMENT) and len(self._held) < MAX_HELD:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is still held back, at the end of the reply; broken bytes as replacement characters."""
        return self._give(self._tokenizer.decode([*self._context, *self._held])) if self._held else ""

    def _give(self, text: str) -> str:
        piece = text[len(self._tokenizer.decode(self._context)) :]
        # Tokens without text (special ones, a space that a decoder drops) give no context by themselves.
        self._context = self._held if piece else [*self._context, *self._held][-MAX_HELD:]
        self._held = []
        return piece


def _token_text(value: object) -> str | None:
    """A special token's text: a string, or an object with "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{file} cannot be read: {error}", path=str(file)) from None
    beside = directory / "chat_template.json"  # where processors of multimodal models keep it
    source = settings.get("chat_template") or (
        read_json(beside).get("chat_template") if beside.is_file() else None
    )
    if isinstance(source, list):  # several by name
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    return source if isinstance(source, str) else None


def _compile(source: str, path: Path) -> jinja2.Template:
    """The environment that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise TokenizerError(
            f"the chat template of {path} is not valid: {error}",
            path=str(path),
            remedy="Fetch the file again.",
        ) from None


def _raise_exception(message: str) -> NoReturn:
    raise UsageError(f"the chat template rejects the messages: {message}")


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)
