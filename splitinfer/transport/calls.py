"""The calls in flight on a client's connection: futures and streams that wait for answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, Protocol, Self, TypeAlias

from splitinfer.errors import LocalProtocolError
from splitinfer.transport.frames import ERROR, ITEM
from splitinfer.transport.handshake import error_from
from splitinfer.transport.messages import Message, Reply
from splitinfer.transport.protocol import Connection

__all__ = ["AnyCall", "CallOwner", "SingleCall", "StreamCall"]


class CallOwner(Protocol):
    """What a call asks of the session on which it was made."""

    connection: Connection
    looking: bool  # a task is reading: none may be entered from within it

    def forget(self, call: AnyCall) -> None:
        """Nobody waits for this call any more."""

    def allow(self, call: StreamCall) -> None:
        """One more answer of a stream may come."""


class SingleCall(asyncio.Future[Reply]):
    """A call in flight: a future that knows its session, so that cancelling it reaches the server.

    A task that alone awaits it goes on within the read that brought the answer, and not in the next turn of
    the loop. Whatever else waits is called as asyncio does it.
    """

    __slots__ = ("_alone", "_shared", "deadline", "id", "method", "session", "timeout")
    deadline: float
    id: int
    method: str
    timeout: float

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.session: CallOwner | None = None
        self._alone: tuple[Callable[[Any], object], Context] | None = None  # asyncio does not know of it
        self._shared = False

    def add_done_callback(
        self, callback: Callable[[Self], object], *, context: Context | None = None
    ) -> None:
        task = isinstance(getattr(callback, "__self__", None), asyncio.Task)
        if task and context is not None and not self._shared and not self.done():
            self._alone = callback, context
        else:
            self._share()
            super().add_done_callback(callback, context=context)
        self._shared = True

    def _share(self) -> None:
        """Leave it to asyncio to wake whoever waits."""
        if self._alone is not None:
            (wake, context), self._alone = self._alone, None
            super().add_done_callback(wake, context=context)

    def cancel(self, msg: Any | None = None) -> bool:
        self._share()
        if self.session is not None:
            self.session.forget(self)
        return super().cancel(msg)

    def answer(self, reply: Reply) -> None:
        """The one answer has come. A call that is done already is not in flight: `forget` saw to that."""
        if self.session is not None and self.session.looking:
            self._share()
        self.set_result(reply)
        if self._alone is not None:
            (wake, context), self._alone = self._alone, None
            context.run(wake, self)

    def take(self, message: Message) -> None:
        """Something else has come."""
        assert self.session is not None
        if message.kind == ERROR:
            self.fail(error_from(message.meta, self.session.connection.peer))
        else:
            self.fail(
                LocalProtocolError(f"{self.method!r} answers with a stream", remedy="Use channel.stream.")
            )
            self.session.forget(self)

    def fail(self, error: Exception) -> None:
        if not self.done():
            self._share()
            self.set_exception(error)


class StreamCall:
    """A call with many answers. Holds what has come and was not asked for yet: the credit bounds it."""

    __slots__ = (
        "_came",
        "_error",
        "_loop",
        "_over",
        "_waiter",
        "deadline",
        "id",
        "method",
        "session",
        "timeout",
    )
    deadline: float
    id: int
    method: str
    session: CallOwner
    timeout: float

    def __init__(self, *, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._came: deque[Reply] = deque()
        self._over = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def answer(self, reply: Reply) -> None:
        """A method that answers once is a stream of one."""
        self._came.append(reply)
        self._over = True
        self._wake()

    def take(self, message: Message) -> None:
        """An item, the end or an error has come."""
        if message.kind == ITEM:
            self._came.append(message)
        elif message.kind == ERROR:
            self.fail(error_from(message.meta, self.session.connection.peer))
        else:
            self._over = True
        self._wake()

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._over = True
        self._wake()

    async def next(self) -> Reply | None:
        """The next answer, None after the last one. Raises what ended the stream early, after what came."""
        while not self._came:
            if self._error is not None:
                raise self._error
            if self._over:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        if not self._over:
            self.session.allow(self)
        return self._came.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


AnyCall: TypeAlias = SingleCall | StreamCall
