"""`splitinfer chat`: a conversation on the terminal, one line a turn."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from splitinfer.cli.console import busy, report, screen
from splitinfer.cli.estimate import print_client
from splitinfer.cli.options import ENGINE, MODEL, Estimate, takes
from splitinfer.cli.session import Request, name_of, open_engine
from splitinfer.config import Settings
from splitinfer.errors import SplitinferError, TokenizerError

if TYPE_CHECKING:
    from splitinfer.cli.background import Background
    from splitinfer.engine import AsyncEngine

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer chat path/to/gemma
  splitinfer chat path/to/gemma --nodes host1:7077,host2:7077
  splitinfer chat path/to/gemma --system "Answer in one sentence."

Ctrl-C stops a reply, twice leaves; so does Ctrl-D. Without a terminal every
line of standard input is a turn.
"""

ROOM = 256  # tokens of the context kept free for a reply of unstated length


@takes(*MODEL, *ENGINE, sampling=True)
def command(
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the first turn.")
    ] = None,
    estimate: Estimate = False,
    *,
    settings: Settings,
    request: Request,
) -> None:
    """Talk to a model, with the chat template of its checkpoint."""
    if estimate:
        print_client(settings)
        return
    from splitinfer.cli.background import Background

    with Background() as background:
        opened = AsyncExitStack()
        engine = background.run(opened.enter_async_context(open_engine(settings)))
        try:
            Conversation(engine, background, settings, request, system).hold()
        finally:
            background.run(opened.aclose())


class Conversation:
    """The turns so far, and the engine that answers the next one."""

    def __init__(
        self,
        engine: AsyncEngine,
        background: Background,
        settings: Settings,
        request: Request,
        system: str | None,
    ) -> None:
        tokenizer = engine.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise TokenizerError(
                f"{name_of(settings)} has no chat template",
                path=settings.model,
                remedy="Use `splitinfer generate`, or a checkpoint trained for chat (chat_template.jinja).",
            )
        self._engine = engine
        self._background = background
        self._tokenizer = tokenizer
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
                    self._background.run(self._answer(line.strip()))
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

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation. The oldest turns leave `messages` where it grew too long."""
        first = 1 if messages[0]["role"] == "system" else 0
        room = self._engine.context - (self._request.max_tokens or ROOM)
        forgotten = 0
        while True:
            prompt = self._tokenizer.encode(self._tokenizer.render_chat(messages))
            if len(prompt) <= room or len(messages) <= first + 1:
                break
            del messages[first : first + 2]
            forgotten += 1
        if forgotten:
            turns = "the oldest turn" if forgotten == 1 else f"the {forgotten} oldest turns"
            screen().print(f"the conversation outgrew the context: {turns} forgotten", style="dim")
        return prompt

    async def _answer(self, line: str) -> None:
        """Stream one reply. What was written of an interrupted reply stays part of the conversation."""
        messages = [*self._messages, {"role": "user", "content": line}]
        written: list[str] = []
        try:
            stream = self._engine.stream(self._prompt(messages), **self._request.arguments())
            async with aclosing(stream) as pieces:
                with busy("reading"):
                    piece = await anext(pieces, None)
                while piece is not None:
                    written.append(piece.text)
                    print(piece.text, end="", flush=True)
                    piece = await anext(pieces, None)
            print(flush=True)
        finally:
            if written:
                self._messages = [*messages, {"role": "assistant", "content": "".join(written)}]
