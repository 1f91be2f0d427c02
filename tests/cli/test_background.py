"""Coroutines for the main thread: results, errors, and an interrupt that lets everything end first."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from threading import current_thread, main_thread

import pytest

from splitinfer.cli.background import Background


@pytest.fixture
def background() -> Iterator[Background]:
    with Background() as background:
        yield background


def test_results_and_errors_come_back(background: Background) -> None:
    async def where() -> bool:
        await asyncio.sleep(0)
        return current_thread() is main_thread()

    async def fail() -> None:
        raise LookupError("x")

    assert background.run(where()) is False
    with pytest.raises(LookupError, match="x"):
        background.run(fail())


def test_an_interrupt_cancels_and_waits_for_the_end(background: Background) -> None:
    happened: list[str] = []

    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(10)
        finally:
            await asyncio.sleep(0.05)
            happened.append("closed")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        background.run(work())
    assert happened == ["closed"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_the_work_survives_is_no_error(background: Background) -> None:
    async def stubborn() -> int:
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return 7
        return 0

    assert background.run(stubborn()) == 7
