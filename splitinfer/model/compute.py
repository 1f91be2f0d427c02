"""Where arithmetic runs: here for a few rows, on one thread beside the event loop for many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import ParamSpec, TypeVar

import torch

__all__ = ["INLINE_ROWS", "compute", "submit"]

P = ParamSpec("P")
T = TypeVar("T")

# Up to here a layer is bound by reading its weights and holds the loop for a few milliseconds whatever the
# number of rows; a thread hop would cost tens of microseconds each way. A prefill block takes far longer:
# it goes to the thread so that bytes keep moving.
INLINE_ROWS = 16


@cache
def _executor() -> ThreadPoolExecutor:
    """One thread: jobs keep their order, and two of them never fight over the cores."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="splitinfer-compute")


def submit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    """Queues `function` for the compute thread, in inference mode. Needs a running event loop."""

    def job() -> T:
        with torch.inference_mode():
            return function(*args, **kwargs)

    return asyncio.get_running_loop().run_in_executor(_executor(), job)


async def compute(rows: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in inference mode, inline or on the compute thread by the number of rows.

    A cancelled caller still waits for a job that has begun: nobody may touch a cache that it writes to.
    """
    if rows <= INLINE_ROWS:
        with torch.inference_mode():
            return function(*args, **kwargs)
    future = submit(function, *args, **kwargs)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            await _settled(future)
        raise


async def _settled(future: asyncio.Future[T]) -> None:
    """Waits for the job. Cancelled once more, it returns early: the caller looks again whether it is done."""
    with suppress(asyncio.CancelledError):
        await asyncio.wait([future])
