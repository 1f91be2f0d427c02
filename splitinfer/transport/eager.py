"""Run a coroutine's first step at once, and make it a task only if it has to wait.

A handler that answers without waiting costs no task and no turn of the event loop. From Python 3.12 on
asyncio does this itself (`eager_start`); before, the first step runs under a stand-in for the task that will
be made if there is a second one, so that `current_task()`, `asyncio.timeout()` and context variables work as
they should.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Generator
from contextvars import copy_context
from typing import Any, TypeVar

__all__ = ["start"]

T = TypeVar("T")

if sys.version_info >= (3, 12):

    def start(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T | asyncio.Task[T]:
        """The result, if `work` came to its end without waiting, or the task that goes on with it.

        Raises what `work` raises in its first step.
        """
        task = asyncio.Task(work, loop=loop, eager_start=True)
        return task.result() if task.done() else task

else:
    from asyncio.tasks import _enter_task, _leave_task

    def start(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T | asyncio.Task[T]:
        """The result, if `work` came to its end without waiting, or the task that goes on with it.

        Raises what `work` raises in its first step.
        """
        stand_in: Any = _StandIn(work)
        context = copy_context()
        before = None
        try:
            _enter_task(loop, stand_in)
        except RuntimeError:  # one task is current already
            before = asyncio.current_task(loop)
            assert before is not None
            _leave_task(loop, before)
            _enter_task(loop, stand_in)
        try:
            waits_for = context.run(work.send, None)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            _leave_task(loop, stand_in)
            if before is not None:
                _enter_task(loop, before)
        task = stand_in.task = loop.create_task(_Rest(work, waits_for), context=context)
        return task


class _StandIn:
    """What `current_task()` is during the first step. Later it passes everything on to the real task."""

    __slots__ = ("__weakref__", "_work", "task")

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = work
        self.task: asyncio.Task[Any] | None = None

    def get_coro(self) -> Coroutine[Any, Any, Any]:
        return self._work

    def get_name(self) -> str:
        return self.task.get_name() if self.task is not None else "first step"

    def done(self) -> bool:
        return self.task is not None and self.task.done()

    def cancelling(self) -> int:
        return self.task.cancelling() if self.task is not None else 0

    def uncancel(self) -> int:
        return self.task.uncancel() if self.task is not None else 0

    def cancel(self, msg: Any = None) -> bool:
        return self.task.cancel(msg) if self.task is not None else False


class _Rest(Coroutine[Any, Any, T]):
    """`work` from its second step on: what the first one waits for is handed out once more."""

    def __init__(self, work: Coroutine[Any, Any, T], waits_for: Any) -> None:
        self._work = work
        self._waits_for = waits_for

    def send(self, value: Any) -> Any:
        if self._waits_for is not None:
            waits_for, self._waits_for = self._waits_for, None
            return waits_for
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        self._waits_for = None
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise RuntimeError("only a task runs this")
