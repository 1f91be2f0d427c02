"""`splitinfer chat`: a conversation on the terminal, one line a turn."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from splitinfer.cli.console import busy, report, screen
from splitinfer.cli.options import ENGINE, MODEL, takes
from splitinfer.cli.session import Request, name_of, open_engine
from splitinfer.config import Settings
from splitinfer.errors import SplitinferError, TokenizerError

if TYPE_CHECKING:
    from splitinfer.blocking import Engine

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer chat path/to/gemma
  splitinfer chat path/to/gemma --nodes host1:7077,host2:7077
  splitinfer chat path/to/gemma --system "Answer in one sentence."

Ctrl-C stops a reply, twice leaves; so does Ctrl-D. Without a terminal every
line of standard input is a turn.
"""


@takes(*MODEL, *ENGINE, sampling=True)
def command(
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the first turn.")
    ] = None,
    *,
    settings: Settings,
    request: Request,
) -> None:
    """Talk to a model, with the chat template of its checkpoint."""
    with open_engine(settings) as engine:
        Conversation(engine, settings, request, system).hold()


class Conversation:
    """The turns so far, and the engine that answers the next one."""

    def __init__(self, engine: Engine, settings: Settings, request: Request, system: str | None) -> None:
        tokenizer = engine.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise TokenizerError(
                f"{name_of(settings)} has no chat template",
                path=settings.model,
                remedy="Use `splitinfer generate`, or a checkpoint trained for chat (chat_template.jinja).",
            )
        self._engine = engine
        self._render = tokenizer.render_chat
        self._request = request
        self._messages = [{"role": "system", "content": system}] if system else []
        self._on_terminal = sys.stdin.isatty()

    def hold(self) -> None:
        """Answer until the input ends. Raises KeyboardInterrupt at the second Ctrl-C in a row."""
        interrupted = False
        while True:
            try:
                line = self._ask()
                if line is None:
                    return
                interrupted = False
                if line.strip():
                    self._answer(line)
            except KeyboardInterrupt:
                if interrupted or not self._on_terminal:
                    raise
                interrupted = True
                screen().print("\nCtrl-C again leaves", style="dim")
            except SplitinferError as error:
                if not self._on_terminal:
                    raise
                report(error, debug=False)

    def _ask(self) -> str | None:
        """The next line, None at the end of the input."""
        try:
            if not self._on_terminal:
                return next(sys.stdin, None)
            return input("> ")
        except EOFError:
            print()
            return None

    def _answer(self, line: str) -> None:
        """Stream one reply. What was written of an interrupted reply stays part of the conversation."""
        messages = [*self._messages, {"role": "user", "content": line.strip()}]
        written: list[str] = []
        try:
            with closing(self._engine.stream(self._render(messages), **self._request.arguments())) as pieces:
                with busy("reading"):
                    piece = next(pieces, None)
                while piece is not None:
                    written.append(piece.text)
                    print(piece.text, end="", flush=True)
                    piece = next(pieces, None)
            print(flush=True)
        finally:
            if written:
                self._messages = [*messages, {"role": "assistant", "content": "".join(written)}]
