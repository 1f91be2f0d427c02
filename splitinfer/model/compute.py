"""Where arithmetic runs: here for a few rows, on one thread beside the event loop for many."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

import torch

from splitinfer.errors import UsageError

__all__ = ["INLINE_ROWS", "INLINE_SECONDS", "compute", "run", "runs_inline", "submit", "took", "use_threads"]

# What `torch.inference_mode()` is a wrapper of: a decoded row enters it some hundred times a token.
_InferenceMode: Any = getattr(torch._C, "_InferenceMode", torch.inference_mode)
P = ParamSpec("P")
T = TypeVar("T")

# Up to here a layer is bound by reading its weights and holds the loop for a few milliseconds whatever the
# number of rows; a thread hop would cost tens of microseconds each way. A prefill block takes far longer:
# it goes to the thread so that bytes keep moving.
INLINE_ROWS = 16
# What took longer than this goes to the thread too, the next time: weights that come from a cold disk hold a
# single row for seconds, and a peer that hears nothing for so long takes the connection for dead.
INLINE_SECONDS = 0.1


@cache
def _executor() -> ThreadPoolExecutor:
    """One thread: jobs keep their order, and two of them never fight over the cores."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="splitinfer-compute")


_last_seconds: dict[str, float] = {}  # what the last job of each kind took


def use_threads(threads: int | None) -> None:
    """Bounds the arithmetic of this process (None: torch's choice). Raises UsageError for less than one."""
    if threads is None:
        return
    if not isinstance(threads, int) or threads < 1:
        raise UsageError(f"{threads!r} threads cannot compute", remedy="Choose 1 or more for threads.")
    torch.set_num_threads(threads)


def _kind(function: Callable[..., object]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def took(function: Callable[..., object], seconds: float) -> None:
    """A job of this kind was done elsewhere than in `run`, in so many seconds."""
    _last_seconds[_kind(function)] = seconds


def runs_inline(rows: int, function: Callable[..., object]) -> bool:
    """Whether a job of this kind may run on the event loop: few rows, and the last one was quick."""
    return rows <= INLINE_ROWS and _last_seconds.get(_kind(function), math.inf) <= INLINE_SECONDS


def run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` here and now, in inference mode."""
    start = perf_counter()
    with _InferenceMode(True):
        result = function(*args, **kwargs)
    _last_seconds[_kind(function)] = perf_counter() - start
    return result


def submit(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    """Queues `function` for the compute thread, in inference mode. Needs a running event loop."""
    return asyncio.get_running_loop().run_in_executor(_executor(), partial(run, function, *args, **kwargs))


async def compute(rows: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in inference mode, inline or on the compute thread, as `runs_inline` says.

    A cancelled caller still waits for a job that has begun: nobody may touch a cache that it writes to.
    """
    if runs_inline(rows, function):
        return run(function, *args, **kwargs)
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
