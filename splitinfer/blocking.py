"""The engine for code that does not await: `Engine` runs an `AsyncEngine` on an event loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from threading import Thread, current_thread
from typing import Any, Self, TypeVar
from weakref import finalize

import numpy as np
import numpy.typing as npt

from splitinfer.dispatch import NodeInfo
from splitinfer.engine import AsyncEngine, EngineConfig, Prompt
from splitinfer.errors import UsageError
from splitinfer.generation import Completion, Piece
from splitinfer.model.config import ModelConfig
from splitinfer.model.tokenizer import Tokenizer

__all__ = ["Engine", "load"]

T = TypeVar("T")

CLOSE_SECONDS = 30.0  # for saying goodbye, and for the step under way


class Engine:
    """`AsyncEngine` without `await`: same arguments, same results, same errors.

    It opens at once and may be shared between threads. Close it, or use it as a context manager:

        with splitinfer.load("path", nodes=["host:7077"]) as engine:
            print(engine.generate("Once", max_tokens=64).text)
    """

    def __init__(
        self,
        model: str | Path,
        nodes: Sequence[str] | None = None,
        *,
        config: EngineConfig | None = None,
        **settings: Any,
    ) -> None:
        self._engine = AsyncEngine(model, nodes, config=config, **settings)
        self._loop = _new_event_loop()
        self._thread: Thread | None = Thread(target=self._loop.run_forever, name="splitinfer", daemon=True)
        self._thread.start()
        # An engine that nobody closes ends when it is forgotten, at the latest before the interpreter does: a
        # loop that still ran then would crash the process.
        self._end = finalize(self, _end_loop, self._engine, self._loop, self._thread)
        try:
            self._run(self._engine.open())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections, forget the weights, end the thread. Safe to repeat."""
        self._thread = None
        self._end()

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """See `AsyncEngine.generate`."""
        return self._run(self._engine.generate(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Piece]:
        """See `AsyncEngine.stream`. Leaving the iteration early ends the generation."""
        pieces = self._engine.stream(prompt, **options)
        turn = asyncio.Lock()  # a step that an interrupt cancelled ends before the generation is closed

        async def following() -> Piece | None:
            async with turn:
                return await anext(pieces, None)

        async def leave() -> None:
            async with turn:
                await pieces.aclose()

        try:
            while (piece := self._run(following())) is not None:
                yield piece
        finally:
            if self._thread is not None:
                self._run(leave())

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See `AsyncEngine.logits`."""
        return self._run(self._engine.logits(token_ids))

    @property
    def config(self) -> ModelConfig:
        """The model's architecture."""
        return self._engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, if it has one."""
        return self._engine.tokenizer

    @property
    def nodes(self) -> list[NodeInfo]:
        """The nodes and what each holds; empty when the experts run here."""
        return self._engine.nodes

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the engine's loop and wait. An interrupt here cancels it there."""
        if self._thread is None:
            work.close()
            raise UsageError("the engine is closed", remedy="Open another with splitinfer.load(...).")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                with suppress(CancelledError, TimeoutError):
                    future.exception(timeout=5.0)
            raise


def _end_loop(engine: AsyncEngine, loop: asyncio.AbstractEventLoop, thread: Thread) -> None:
    """Closes what the engine holds, then its loop."""
    if thread is current_thread():  # its last reference was dropped by its own loop
        loop.stop()
        return
    closing = asyncio.run_coroutine_threadsafe(engine.close(), loop)
    try:
        closing.result(CLOSE_SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_SECONDS)
        if not thread.is_alive():
            loop.close()


def load(model: str | Path, nodes: Sequence[str] | None = None, **settings: Any) -> Engine:
    """Open `model` (a path or hub id), with its experts on `nodes` ("host:port"; None: here too).

    `settings` are the fields of `EngineConfig`. Raises what opening an `AsyncEngine` raises.
    """
    return Engine(model, nodes, **settings)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # no wheel for this platform: asyncio's own loop serves, a little slower
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
