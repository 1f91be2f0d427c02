"""The client's side of one connection, from the first byte to the last."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from time import monotonic
from typing import Any, Final, Self

from splitinfer.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    LinkError,
    TransportError,
)
from splitinfer.transport.addresses import Address
from splitinfer.transport.calls import AnyCall, StreamCall
from splitinfer.transport.certificates import (
    TLSConfig,
    channel_binding,
    check_peer,
    client_context,
    map_tls_error,
)
from splitinfer.transport.codec import TensorCodec
from splitinfer.transport.config import ClientConfig
from splitinfer.transport.deadlines import Deadlines
from splitinfer.transport.endpoints import dial
from splitinfer.transport.frames import END, ERROR, ITEM, PONG, REPLY, WELCOME
from splitinfer.transport.messages import Message
from splitinfer.transport.parcel import Parcel
from splitinfer.transport.protocol import Connection
from splitinfer.transport.security import TokenAuthenticator
from splitinfer.transport.sockets import Link
from splitinfer.transport.tensors import Array
from splitinfer.transport.tls import TlsStream

__all__ = ["Session", "Stats"]

_MAX_SECONDS: Final = 4_000_000  # what 32 bits of milliseconds hold: 46 days


@dataclass(slots=True)
class Stats:
    """What went over the wire, in bytes with everything included; calls made; connections opened."""

    sent_nbytes: int = 0
    received_nbytes: int = 0
    calls: int = 0
    connects: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(
            self.sent_nbytes + other.sent_nbytes,
            self.received_nbytes + other.received_nbytes,
            self.calls + other.calls,
            self.connects + other.connects,
        )


class Session:
    """One open connection. `link.closed` says that it is gone; its calls have failed by then."""

    def __init__(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.connection = connection
        self.link: Link
        self._loop = loop
        self._opened: asyncio.Future[None] = loop.create_future()
        self._deadlines = Deadlines(loop, self._sweep)
        self._pings: dict[int, tuple[float, asyncio.Future[float]]] = {}
        self._last_ping = 0
        self.looking = False

    @classmethod
    async def open(
        cls, address: str, config: ClientConfig, loop: asyncio.AbstractEventLoop, *, via: str = ""
    ) -> Self:
        """Connect and shake hands; `via` is what to dial in place of `address`.

        Raises ConnectError, AuthenticationError, VersionMismatch, and so on.
        """
        try:
            async with asyncio.timeout(config.connect_timeout):
                return await cls._open(address, config, loop, via or address)
        except TimeoutError as error:
            if isinstance(error, TransportError):
                raise
            raise ConnectError(
                f"{address}: no answer within {config.connect_timeout:g} s",
                peer=address,
                remedy="Check host, port and firewall.",
            ) from None

    @classmethod
    async def _open(
        cls, address: str, config: ClientConfig, loop: asyncio.AbstractEventLoop, via: str
    ) -> Self:
        target = Address.parse(address)
        sock = await dial(Address.parse(via), address)
        tls = None
        try:
            if config.tls is not None:
                context = client_context(config.tls)
                name = config.tls.server_name or target.name
                tls = TlsStream(sock, context, server_side=False, server_name=name)
                await _handshake(tls, config.tls, address, loop)
        except BaseException:
            sock.close()
            raise
        connection = Connection(
            "client",
            limits=config.limits,
            authenticator=TokenAuthenticator(config.token) if config.token else None,
            binding=channel_binding(tls.peer_certificate) if tls else b"",
            codec=_codec_of(config, target),
            peer=address,
        )
        session = cls(connection, loop)
        session.link = Link(loop, sock, connection, session, tls, busy_poll=config.busy_poll)
        try:
            await session._opened
        except BaseException:
            session.link.abort(ConnectionLost("given up", peer=address))
            raise
        return session

    @property
    def info(self) -> dict[str, Any]:
        return self.connection.info

    @property
    def stats(self) -> Stats:
        connection = self.connection
        return Stats(connection.outbox.sent_nbytes, connection.inbox.nbytes, connection.made, 0)

    def send(self, method: str, tensors: Sequence[Array], meta: dict[str, Any] | None, timeout: float) -> int:
        """Send a call's request now; returns its id, for `expect` at once.

        Raises LocalProtocolError, Overloaded: then nothing was sent.
        """
        id = self.connection.request(method, tensors, meta, _milliseconds(timeout))
        self.link.flush()
        return id

    def stamp(self, parcel: Parcel, timeout: float) -> bool:
        """Make a parcel a call to come. False where it cannot go as it is."""
        return self.connection.stamp(parcel, _milliseconds(timeout))

    def post(self, parcel: Parcel, sent: int) -> int:
        """Send what is left of it; returns its id, for `expect` at once."""
        id = self.connection.post(parcel, sent)
        self.link.flush()
        return id

    def expect(self, call: AnyCall, id: int, method: str, timeout: float) -> None:
        """Whose the answers are. Apart from `send` so that the other side works already meanwhile."""
        self.connection.adopt(id, call)
        call.id = id
        call.session = self
        call.method = method
        call.timeout = timeout
        call.deadline = deadline = monotonic() + timeout
        if deadline < self._deadlines.at:
            self._deadlines.watch(deadline)

    def look(self) -> None:
        """See whether answers have come."""
        self.looking = True
        try:
            self.link.look()
        finally:
            self.looking = False

    def received(self, nbytes: int) -> None:
        """So many bytes were read into the link's `room`."""
        self.looking = True
        try:
            self.link.received(nbytes)
        finally:
            self.looking = False

    def settle(self, sent: int, received: int) -> None:
        """A call was made and answered by whoever wrote to `direct` and read into `room`: count it."""
        self.connection.made += 1
        self.connection.outbox.sent_nbytes += sent
        self.link.skipped(received)

    def forget(self, call: AnyCall) -> None:
        """Nobody waits for this call any more: tell the server, unless it has answered."""
        self.connection.cancel(call.id)
        self.link.flush()

    def allow(self, call: StreamCall) -> None:
        """One more answer of a stream may come."""
        self.connection.credit(call.id, 1)
        self.link.flush()

    async def ping(self) -> float:
        self._last_ping += 1
        id, pong = self._last_ping, asyncio.Future[float](loop=self._loop)
        self._pings[id] = monotonic(), pong
        self.connection.ping(id)
        self.link.flush()
        try:
            return await pong
        finally:
            self._pings.pop(id, None)

    def close(self, why: str) -> None:
        self.link.abort(ConnectionLost(why, peer=self.connection.peer))

    # ---- what the link tells

    def on_message(self, message: Message) -> None:
        kind = message.kind
        if kind == REPLY:
            caller = self.connection.answered(message.id)
            if caller is not None:
                caller.answer(message)
        elif not self.connection.accept(message):
            return
        elif kind in (ITEM, END, ERROR):
            message.caller.take(message)
        elif kind == PONG:
            sent, pong = self._pings.get(message.id, (0.0, None))
            if pong is not None and not pong.done():
                pong.set_result(monotonic() - sent)
        elif kind == WELCOME and not self._opened.done():
            self._opened.set_result(None)

    def on_lost(self, error: TransportError) -> None:
        self._deadlines.close()
        if not self._opened.done():
            # Nothing was under way yet, so nothing was lost.
            lost = isinstance(error, ConnectionLost)
            remedy = error.remedy or "Check that the node runs there: splitinfer node."
            self._opened.set_exception(
                ConnectError(str(error), peer=error.peer, remedy=remedy) if lost else error
            )
        for call in self.connection.callers:
            call.fail(self._lost(error))
        for _, pong in self._pings.values():
            if not pong.done():
                pong.set_exception(self._lost(error))

    def _lost(self, error: TransportError) -> LinkError:
        """A fresh exception for each call: they are raised in different places."""
        lost = ConnectionLost(str(error), peer=self.connection.peer, remedy=error.remedy)
        lost.__cause__ = error
        return lost

    def _sweep(self, now: float) -> float:
        earliest = inf
        for call in self.connection.callers:
            if call.deadline <= now:
                self.forget(call)
                peer = self.connection.peer
                call.fail(
                    DeadlineExceeded(
                        f"{peer} did not answer {call.method!r} within {call.timeout:.3g} s",
                        timeout=call.timeout,
                        peer=peer,
                    )
                )
            else:
                earliest = min(earliest, call.deadline)
        return earliest


async def _handshake(
    stream: TlsStream, tls: TLSConfig, address: str, loop: asyncio.AbstractEventLoop
) -> None:
    try:
        await stream.handshake(loop)
    except ssl.SSLError as error:
        raise map_tls_error(error, address) from None
    except OSError as error:
        raise ConnectError(
            f"{address}: no TLS connection ({error})", peer=address, remedy="Check that both sides use TLS."
        ) from None
    check_peer(stream.peer_certificate, tls, address)


def _milliseconds(timeout: float) -> int:
    """What the wire says of it."""
    if 0 < timeout < _MAX_SECONDS:
        return ceil(timeout * 1000)
    return _MAX_SECONDS * 1000 if timeout > 0 else 1


def _codec_of(config: ClientConfig, target: Address) -> TensorCodec | None:
    """None where every tensor travels as it is."""
    link = config.link
    codec = TensorCodec(
        "client",
        config.compression,
        loopback=target.is_local and link is None,
        link_rate=link.bandwidth / 8 if link and link.bandwidth else None,
        wire_dtype=config.wire_dtype,
    )
    return codec if codec.encodings else None
