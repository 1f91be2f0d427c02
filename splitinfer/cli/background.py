"""An event loop in a thread of its own: connections stay alive while the main thread waits for a person."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from threading import Thread
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from splitinfer.cli.console import new_event_loop

__all__ = ["Background"]

T = TypeVar("T")
WAKE_SECONDS = 0.1


class Background:
    """Runs coroutines for the main thread, one at a time. Use as a context manager."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="background", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, or what it raises.

        Ctrl-C cancels `work`; once it has ended, KeyboardInterrupt is raised. Nothing is raised in the midst
        of anything: what runs here may hold locks, or draw on the terminal from a thread of its own.
        """
        outcome: Future[T] = Future()
        tasks: list[asyncio.Task[None]] = []

        async def guarded() -> None:
            try:
                outcome.set_result(await work)
            except BaseException as error:
                outcome.set_exception(error)

        def begin() -> None:
            tasks.append(self._loop.create_task(guarded()))

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        def interrupted(number: int, frame: FrameType | None) -> None:
            self._loop.call_soon_threadsafe(cancel)

        before = signal.signal(signal.SIGINT, interrupted)
        try:
            self._loop.call_soon_threadsafe(begin)
            # A signal that another thread took is seen here only when this one wakes up.
            while not wait((outcome,), timeout=WAKE_SECONDS).done:
                pass
            return outcome.result()
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, before)
