"""Tests beside noisy neighbours: a machine may be held up for seconds at any moment.

What has to come is awaited, for as long as it takes within reason; what takes time is tried again with more
of it. A lower bound on a time may stand as it is: nothing makes a clock run slow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["at_its_best", "run", "until", "with_more_time"]

LONG_SECONDS = 30.0
T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, for twenty seconds at most: a test that waits for ever says where."""

    async def limited() -> T:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(limited())


async def until(true: Callable[[], object]) -> None:
    """Returns once `true()` is. Raises TimeoutError after half a minute."""
    async with asyncio.timeout(LONG_SECONDS):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def with_more_time(check: Callable[[float], T], *units: float) -> T:
    """`check(unit)` for the first of `units`, in seconds, in which this machine is quick enough for it.

    Whatever it raises in the last of them is raised.
    """
    for unit in units[:-1]:
        try:
            return check(unit)
        except (AssertionError, OSError, TimeoutError):
            pass
    return check(units[-1])


def at_its_best(measure: Callable[[], float], enough: float, *, tries: int = 100) -> float:
    """The least that `measure` finds: other programs only ever make things slower. Stops below `enough`."""
    least = measure()
    for _ in range(tries - 1):
        if least < enough:
            break
        least = min(least, measure())
    return least
