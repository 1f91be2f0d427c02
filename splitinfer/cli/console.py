"""What every command shares: the terminal, the event loop, and the way from an exception to an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from splitinfer.errors import SplitinferError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from rich.console import Console

__all__ = ["busy", "human_size", "new_event_loop", "plain", "prepare_threads", "report", "run", "screen"]

T = TypeVar("T")

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def screen(*, stderr: bool = True) -> Console:
    """A rich console on the stream as it is now, so that redirections and tests see what they should."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


@contextmanager
def busy(label: str) -> Iterator[None]:
    """A spinner with the seconds beside `label` while the block runs; nothing unless on a terminal."""
    console = screen()
    if not console.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(label, total=None)
        yield


def new_event_loop() -> AbstractEventLoop:
    """uvloop's where it is installed, else asyncio's own."""
    import asyncio  # here, because --help does not need it

    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Ctrl-C cancels it."""
    import asyncio

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def prepare_threads() -> None:
    """Make OpenMP's threads wait asleep. Must run before torch is imported; what the user set stays.

    Spinning threads of two processes on the same cores stall each other for milliseconds at a time, and a
    client beside a node on one machine is the first thing everybody tries.
    """
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("KMP_BLOCKTIME", "0")):
        os.environ.setdefault(name, value)


def report(error: BaseException, *, debug: bool) -> int:
    """Print an error for a person on standard error; the process's exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, SplitinferError):
        message, remedy, code = str(error), error.remedy, error.exit_code
    elif isinstance(error, OSError) and error.filename is not None:
        message, remedy, code = f"{error.filename}: {error.strerror}", "", 1
    else:
        message, code = f"{type(error).__name__}: {error}".removesuffix(": "), 1
        remedy = "" if debug else "This is unexpected: run it again with --debug to see where it happened."
    print_error(message, remedy)
    return code


def print_error(message: str, remedy: str) -> None:
    """`error: message` and, on the next line, what to do about it; without markup or wrapping."""
    from rich.text import Text

    console = screen()
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if remedy:
        console.print(Text(remedy), soft_wrap=True)
    sys.stderr.flush()


def human_size(nbytes: float) -> str:
    """Bytes for people: 999 B, 5.6 kB, 1.2 GB (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON knows them."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
