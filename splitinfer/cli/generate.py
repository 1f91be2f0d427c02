"""`splitinfer generate`: a prompt in, text out.

Text goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitinfer.cli.console import busy, run
from splitinfer.cli.estimate import print_client
from splitinfer.cli.options import ENGINE, Estimate, Json, takes
from splitinfer.cli.session import Request, as_json, open_engine, print_figures
from splitinfer.config import Settings
from splitinfer.errors import UsageError

if TYPE_CHECKING:
    from splitinfer.generation import Completion, Piece

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer generate "import os" --temperature 0.7    the demo model
  splitinfer generate "def f(" --nodes host1:7077,host2:7077 --max-tokens 64
  splitinfer generate --file prompt.txt --temperature 0.7 --seed 1
  echo "import os" | splitinfer generate --json | jq .usage
  splitinfer generate --model path/to/gemma --context 32768 --estimate
  splitinfer generate --token-ids 2,5,7    when there is no tokenizer
"""


@takes("model", *ENGINE, sampling=True)
def command(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", show_default=False, help="Default: standard input."),
    ] = None,
    file: Annotated[str | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
    token_ids: Annotated[
        str | None, typer.Option(metavar="IDS", help='The prompt as token ids: "2,5,7".')
    ] = None,
    json_: Json = False,
    estimate: Estimate = False,
    *,
    settings: Settings,
    request: Request,
) -> None:
    """Continue a prompt.

    Text goes to standard output as it comes, figures to standard error.
    One newline at the end of a file or of standard input is not part of the
    prompt.
    """
    if estimate:
        print_client(settings)
        return
    work = _complete if json_ else _stream
    run(work(settings, read_prompt(prompt, file, token_ids), request))


def read_prompt(prompt: str | None, file: str | None, token_ids: str | None) -> str | list[int]:
    """The prompt from the one place that has it. Raises `UsageError` for none, several, or an empty one."""
    given = {"PROMPT": prompt, "--file": file, "--token-ids": token_ids}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"the prompt is given twice: {' and '.join(named)}", remedy="Give it once.")
    if token_ids is not None:
        return _parse_ids(token_ids)
    if prompt is not None:
        text, place = prompt, "the prompt"
    elif file is not None:
        text, place = _read_file(file), file
    elif sys.stdin.isatty():
        raise UsageError(
            "there is no prompt", remedy='Give one: splitinfer generate "import os", or --file FILE.'
        )
    else:
        text, place = _decode(sys.stdin.buffer.read(), "standard input"), "standard input"
    if not text:
        raise UsageError(f"{place} is empty", remedy="Give at least one character to continue from.")
    return text


def _read_file(file: str) -> str:
    try:
        return _decode(Path(file).read_bytes(), file)
    except OSError as error:
        raise UsageError(
            f"--file {file}: {error.strerror}", remedy="Name a file that can be read."
        ) from error


def _decode(data: bytes, place: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{place} is not UTF-8 text (byte {error.start})", remedy="Convert it first."
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def _parse_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.replace(" ", ",").split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(
            f"--token-ids {text!r} is not a list of token ids", remedy="Write --token-ids 2,5,7."
        )
    return [int(part) for part in parts]


async def _complete(settings: Settings, prompt: str | Sequence[int], request: Request) -> None:
    async with open_engine(settings) as engine:
        with busy("generating"):
            completion = await engine.generate(prompt, **request.arguments())
        print(json.dumps(as_json(completion, settings), ensure_ascii=False))


async def _stream(settings: Settings, prompt: str | Sequence[int], request: Request) -> None:
    async with open_engine(settings) as engine:
        write = _Writer(spells=engine.tokenizer is not None)
        completion: Completion | None = None
        async with aclosing(engine.stream(prompt, **request.arguments())) as pieces:
            with busy("reading the prompt"):
                piece = await anext(pieces, None)
            try:
                while piece is not None:
                    write(piece)
                    completion = piece.completion or completion
                    piece = await anext(pieces, None)
            finally:
                write.end()
        if completion is not None:
            print_figures(completion)


class _Writer:
    """Puts pieces on standard output as they come: text, or token ids where there is no tokenizer."""

    def __init__(self, *, spells: bool) -> None:
        self._spells = spells
        self._last = ""

    def __call__(self, piece: Piece) -> None:
        text = piece.text
        if not self._spells:
            text = "".join(f",{token}" for token in piece.token_ids)
            text = text if self._last else text.removeprefix(",")
        if text:
            self._last = text[-1]
            sys.stdout.write(text)
            sys.stdout.flush()

    def end(self) -> None:
        """Leave the terminal at the start of a line."""
        if self._last not in ("", "\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
