"""`connect` and the Channel: many calls in flight on one connection, made anew when it broke."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from splitinfer.errors import ConnectError, ConnectionLost, DeadlineExceeded, LinkError
from splitinfer.transport.addresses import Address
from splitinfer.transport.calls import SingleCall, StreamCall
from splitinfer.transport.config import ClientConfig
from splitinfer.transport.link import EmulatedLink
from splitinfer.transport.messages import Reply
from splitinfer.transport.parcel import Parcel
from splitinfer.transport.session import Session, Stats
from splitinfer.transport.tensors import Array

__all__ = ["Channel", "connect"]

_BACKOFF_SECONDS: Final = 0.05, 2.0  # before the second attempt; at most


async def connect(address: str, *, config: ClientConfig | None = None) -> Channel:
    """A channel to the server at `address`, open and greeted: `channel.info` is what it says of itself.

    Raises UsageError for what is not an address, ConnectError, AuthenticationError, VersionMismatch,
    RemoteProtocolError, Overloaded.
    """
    channel = Channel(address, config or ClientConfig())
    try:
        await channel.reconnect()
    except BaseException:
        await channel.close()
        raise
    return channel


class Channel:
    """One server, as seen from a client. Belongs to the event loop it was made on.

    Arrays given to a call must stay as they are until it is answered: they are sent from where they lie.
    When the connection breaks, the calls in flight fail with ConnectionLost at once; the next call connects
    again, with jittered backoff, for at most `config.reconnect_timeout` seconds. `info` is then read anew;
    `on_info`, if set, gets it before any call is made, and may raise to refuse the server.
    """

    def __init__(self, address: str, config: ClientConfig) -> None:
        self.address = str(Address.parse(address))
        self.config = config
        self.info: dict[str, Any] = {}
        self.on_info: Callable[[dict[str, Any]], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._session: Session | None = None
        self._closed = False
        self._emulated: EmulatedLink | None = None
        self._past = Stats()
        self._reconnecting: asyncio.Task[Session] | None = None
        self._waiting: set[asyncio.Task[None]] = set()
        self._failures = 0
        self._retry_at = 0.0
        self._failure: LinkError | None = None

    # ---- calls

    def start(
        self,
        method: str,
        tensors: Sequence[Array] = (),
        meta: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> asyncio.Future[Reply]:
        """Make a call; its bytes are with the kernel, as far as that takes them, before this returns.

        `timeout` is in seconds and travels along. The future yields the reply or raises ConnectionLost,
        ConnectError, DeadlineExceeded, Overloaded, RemoteError; cancelling it cancels the work at the server.
        Raises LocalProtocolError for what cannot be sent, Overloaded where the server drains.
        """
        if timeout is None:
            timeout = self.config.call_timeout
        session = self._session
        if session is not None and not session.link.closed:
            id = session.send(method, tensors, meta, timeout)
            call = SingleCall(loop=self._loop)
            session.expect(call, id, method, timeout)
        else:
            call = SingleCall(loop=self._loop)
            task = self._loop.create_task(self._start_later(call, method, tensors, meta, timeout))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
        return call

    def stamp(self, parcel: Parcel, timeout: float) -> bool:
        """Make a parcel a call to come, of at most `timeout` seconds. False where that cannot be, and `start`
        has to be asked."""
        session = self._session
        return session is not None and not session.link.closed and session.stamp(parcel, timeout)

    def direct(self, parcel: Parcel) -> int | None:
        """Where a parcel that was stamped may be written to as soon as it is filled: a descriptor, -1 for
        nowhere; None where it has to be stamped anew. `post` has to come before anything is awaited."""
        session = self._session
        if session is None or session.link.closed or parcel.owner is not session.connection:
            return None
        if session.connection.draining:
            return None
        return session.link.direct

    def room(self, nbytes: int) -> memoryview | None:
        """Where whoever wrote a parcel to `direct` may read its answer of so many bytes; None where it has to
        come as others do. After it, before anything is awaited: `settle` if what he read was the answer and
        nothing else, `post` if not."""
        return None if self._session is None else self._session.link.room(nbytes)

    def settle(self, sent: int, received: int) -> None:
        """A parcel went to `direct`, its answer came into `room`: a call of so many bytes."""
        assert self._session is not None
        self._session.settle(sent, received)

    def post(
        self, parcel: Parcel, sent: int = 0, received: int = 0, *, timeout: float
    ) -> asyncio.Future[Reply]:
        """Make the call for which a parcel was stamped, of which the kernel took `sent` bytes; the rest
        follows, and the parcel is free again. The future is that of `start`. `received` bytes have come into
        `room` already."""
        session = self._session
        call = SingleCall(loop=self._loop)
        if session is None or session.link.closed:
            call.fail(ConnectionLost("the connection has ended", peer=self.address))
        else:
            session.expect(call, session.post(parcel, sent), parcel.method, timeout)
            if received:
                session.received(received)
        return call

    def look(self) -> None:
        """Take answers that have come already; before a wait, for whoever had other work since `start`.

        Saves a turn of the event loop where the answer is there, and costs a microsecond or two where not.
        """
        if self._session is not None:
            self._session.look()

    @property
    def file(self) -> int:
        """The descriptor of the socket that answers come from, for whoever waits for something else besides
        and would `look` then; -1 while there is no connection."""
        session = self._session
        return -1 if session is None or session.link.closed else session.link.file

    async def call(
        self,
        method: str,
        tensors: Sequence[Array] = (),
        meta: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Reply:
        """`start`, awaited."""
        return await self.start(method, tensors, meta, timeout=timeout)

    async def stream(
        self,
        method: str,
        tensors: Sequence[Array] = (),
        meta: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> AsyncIterator[Reply]:
        """The replies of a method that answers with several; `timeout` covers them all.

        The server runs at most a few replies ahead of whoever iterates. Leaving the loop early cancels the
        work at the server, once the iterator is closed (`contextlib.aclosing` does that at once).
        """
        call = StreamCall(loop=self._loop)
        deadline = monotonic() + (self.config.call_timeout if timeout is None else timeout)
        session = await self.reconnect(deadline)
        timeout = deadline - monotonic()
        session.expect(call, session.send(method, tensors, meta, timeout), method, timeout)
        try:
            while (reply := await call.next()) is not None:
                yield reply
        finally:
            session.forget(call)

    async def ping(self, *, timeout: float = 5.0) -> float:
        """Seconds to the server and back, without a handler in between."""
        session = await self.reconnect(monotonic() + timeout)
        try:
            async with asyncio.timeout(timeout):
                return await session.ping()
        except TimeoutError:
            raise _late(self.address, timeout) from None

    # ---- the connection

    @property
    def stats(self) -> Stats:
        """Bytes and calls over all connections so far, as they were on the wire."""
        return self._past + self._session.stats if self._session is not None else self._past

    @property
    def connected(self) -> bool:
        """True where the next call needs no new connection."""
        return self._session is not None and not self._session.link.closed

    async def reconnect(self, deadline: float = inf) -> Session:
        """See that there is a connection. Raises as `connect` does, DeadlineExceeded at `deadline`."""
        if self._session is not None and not self._session.link.closed:
            return self._session
        if self._reconnecting is None or self._reconnecting.done():
            self._reconnecting = self._loop.create_task(self._connect_again())
            self._reconnecting.add_done_callback(_retrieve)
        start = monotonic()
        # One attempt serves all who wait for it, so giving up must not cancel it.
        await asyncio.wait(
            (self._reconnecting,), timeout=None if deadline == inf else max(0.0, deadline - start)
        )
        if not self._reconnecting.done():
            raise _late(self.address, deadline - start)
        if self._reconnecting.cancelled():
            raise ConnectionLost("the channel was closed", peer=self.address)
        return self._reconnecting.result()

    async def _connect_again(self) -> Session:
        give_up = monotonic() + (self.config.reconnect_timeout if self._past.connects else 0.0)
        while True:
            if self._closed:
                raise ConnectionLost("the channel was closed", peer=self.address)
            if self._retry_at > give_up and self._failure is not None:
                raise ConnectError(str(self._failure), peer=self.address, remedy=self._failure.remedy)
            await asyncio.sleep(max(0.0, self._retry_at - monotonic()))
            try:
                via = await self._via()
                session = await Session.open(self.address, self.config, self._loop, via=via)
            except LinkError as error:
                least, most = _BACKOFF_SECONDS
                pause = min(most, least * 2 ** min(self._failures, 10))
                self._failures += 1
                self._failure = error
                self._retry_at = monotonic() + random.uniform(pause / 2, pause)
                if self._retry_at > give_up:
                    raise
            else:
                return self._adopt(session)

    async def _via(self) -> str:
        """What to dial: the emulated link's own address where there is one."""
        if self.config.link is None:
            return self.address
        if self._emulated is None:
            emulated = EmulatedLink(self.config.link, self.address)
            try:
                await asyncio.to_thread(emulated.start)
            except asyncio.CancelledError:
                emulated.close()
                raise
            self._emulated = emulated
        return self._emulated.address

    def _adopt(self, session: Session) -> Session:
        if self._session is not None:
            self._past = self._past + self._session.stats
        self._past.connects += 1
        self._session, self._failures, self._retry_at = session, 0, 0.0
        if self.on_info is not None:
            try:
                self.on_info(session.info)
            except BaseException:
                session.close("the server's info was refused")
                raise
        self.info = session.info
        return session

    async def _start_later(
        self,
        call: SingleCall,
        method: str,
        tensors: Sequence[Array],
        meta: dict[str, Any] | None,
        timeout: float,
    ) -> None:
        deadline = monotonic() + timeout
        try:
            session = await self.reconnect(deadline)
            if not call.done():
                timeout = deadline - monotonic()
                session.expect(call, session.send(method, tensors, meta, timeout), method, timeout)
        except Exception as error:
            call.fail(error)

    async def close(self) -> None:
        """Close the connection; calls in flight fail with ConnectionLost."""
        self._closed = True
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        if self._session is not None:
            self._session.close("the channel was closed")
        if self._waiting:
            await asyncio.wait(self._waiting)
        if self._emulated is not None:
            await asyncio.to_thread(self._emulated.close)
            self._emulated = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


def _retrieve(task: asyncio.Task[Session]) -> None:
    if not task.cancelled():
        task.exception()


def _late(address: str, timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"{address} did not answer within {timeout:.3g} s", timeout=timeout, peer=address)
