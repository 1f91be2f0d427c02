"""Byte streams on the event loop: one Link drives one Connection over one non-blocking socket.

`add_reader` with `recv_into`, and `sendmsg` straight from the caller: the bytes of a call are in the kernel
before `start` returns, and nothing lies between the kernel and the memory a tensor lives in. TLS is the same
code over `ssl.MemoryBIO`. docs/transport.md has what the other ways cost.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any, Final, Protocol

from splitinfer.errors import (
    AuthenticationError,
    ConnectionLost,
    PeerError,
    TransportError,
)
from splitinfer.transport.certificates import map_tls_error
from splitinfer.transport.frames import CHUNK_NBYTES
from splitinfer.transport.link_rate import delivery_rate
from splitinfer.transport.outbox import Piece
from splitinfer.transport.polling import Polling
from splitinfer.transport.protocol import Connection
from splitinfer.transport.tls import TlsStream
from splitinfer.transport.vitals import TICK_SECONDS

__all__ = ["Link", "Owner"]

# Written at one go; a kernel that takes on and on must not keep the loop from everything else.
_WRITE_NBYTES: Final = CHUNK_NBYTES
_READS_PER_EVENT: Final = 4  # then the other connections have their turn
_LOOKS_PER_TURN: Final = 4
_TURN_SECONDS: Final = 0.02  # for so long whoever reads on his own keeps the loop from others
_MAX_PIECES: Final = 512  # the kernel takes 1024 at once (IOV_MAX)


class Stream(Protocol):
    """Non-blocking bytes. Both raise BlockingIOError where nothing can be done now, OSError when broken."""

    def recv_into(self, buffer: memoryview, /) -> int: ...
    def send(self, buffer: Piece, /) -> int: ...
    def sendmsg(self, buffers: Sequence[Piece], /) -> int: ...


class Owner(Protocol):
    """Whoever a Link works for. Called on the event loop, never from within the owner's own calls but `look`.

    A message is for `connection.accept` first; what either raises ends the connection. `on_message` may abort
    the link itself.
    """

    def on_message(self, message: Any, /) -> None: ...
    def on_lost(self, error: TransportError) -> None: ...


class Link:
    """Moves bytes between a socket and a Connection until either ends; then tells the owner once."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        connection: Connection,
        owner: Owner,
        tls: TlsStream | None = None,
        *,
        busy_poll: float = 0.0,
    ) -> None:
        self.connection = connection
        self.closed = False
        self._polling = Polling(loop, busy_poll)
        self._loop = loop
        self._sock = sock
        self.file = sock.fileno()
        self._tls = tls
        stream: Stream = tls or sock
        self._recv_into, self._send, self._sendmsg = stream.recv_into, stream.send, stream.sendmsg
        self._owner, self._on_message = owner, owner.on_message
        self._inbox, self._outbox = connection.inbox, connection.outbox
        self._buffer = connection.buffer()  # where the next bytes go
        self._writing = self._paused = False
        self._pauses = connection.role == "server"
        self._untold = 0  # messages that were read and are still to be passed on
        self._looks = 0  # since the loop told of bytes here
        self._turned = 0.0  # when it last did
        self._idle: asyncio.Future[None] | None = None
        loop.add_reader(self.file, self._event)
        self._timer = loop.call_later(TICK_SECONDS, self._tick)
        if tls is not None:
            loop.call_soon(self._read_rest)
        self.flush()

    @property
    def direct(self) -> int:
        """The descriptor, for whoever has a whole message for it now and calls `flush` after it; -1 where its
        bytes would overtake others or have to be encrypted."""
        if self.closed or self._writing or self._outbox.nbytes or self._tls is not None:
            return -1
        return self.file

    def room(self, nbytes: int) -> memoryview | None:
        """Where whoever waits for a message of so many bytes may read it himself, and tell `received`, or
        `skipped` where he has no more use for it; None where that cannot be."""
        inbox = self._inbox
        if self.closed or self._paused or self._untold or self._tls is not None or inbox.unfinished:
            return None
        if monotonic() - self._turned > _TURN_SECONDS:
            return None  # others have their turn
        self._buffer = inbox.buffer()
        return self._buffer if len(self._buffer) >= nbytes else None

    def skipped(self, nbytes: int) -> None:
        """So many bytes were read into `room`, and done with: the next ones may go there too."""
        self._inbox.nbytes += nbytes

    def look(self) -> None:
        """Read what has come already, without waiting for the loop to tell of it.

        Not while messages read before are still to be passed on, nor time and again before the loop tells of
        bytes here: it has others to serve.
        """
        if self._untold or self._looks >= _LOOKS_PER_TURN:
            return
        self._looks += 1
        self._buffer = self._inbox.buffer()
        self._read_rest()

    def flush(self) -> None:
        """Hand what waits to the kernel, as far as it takes it; the rest goes when it can."""
        if not (self._writing or self.closed):
            self._write()

    def _write(self) -> None:
        outbox, tls = self._outbox, self._tls
        stop = outbox.sent_nbytes + _WRITE_NBYTES
        try:
            while outbox.nbytes or (tls is not None and tls.unsent):
                pieces = outbox.ready
                if len(pieces) == 1:
                    nbytes = self._send(pieces[0])
                    if nbytes == outbox.nbytes:  # all there was, which is what mostly happens
                        outbox.nbytes = 0
                        outbox.sent_nbytes += nbytes
                        pieces.clear()
                        continue
                else:
                    nbytes = self._sendmsg(outbox.pieces()[:_MAX_PIECES])
                outbox.sent(nbytes)
                if outbox.sent_nbytes > stop and outbox.nbytes:
                    self._write_later()
                    return
            self._polling.begin()
        except BlockingIOError:
            outbox.flow = 0
            self._write_later()
        except OSError as error:
            # Not from within the owner's own call: it hears of it in the next turn of the loop.
            self._loop.call_soon(self.abort, _lost(error, self.connection.peer))

    def _write_later(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self.file, self._writable)

    def _writable(self) -> None:
        if self.closed:
            return
        self._write()
        if self._outbox.nbytes or (self._tls is not None and self._tls.unsent):
            if not self.connection.choked:
                self._read_again()
            return
        self._writing = False
        self._loop.remove_writer(self.file)
        self._read_again()
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _read_again(self) -> None:
        """The client takes its answers again."""
        if self._paused and not self.closed:
            self._paused = False
            self._loop.add_reader(self.file, self._event)
            self._loop.call_soon(self._read_rest)

    def _event(self) -> None:
        self._looks, self._turned = 0, monotonic()
        self._readable()

    def received(self, nbytes: int) -> None:
        """So many bytes were read into `room`: goes on as if they had been read here."""
        if not self.closed:
            self._readable(nbytes)

    def _readable(self, given: int = 0) -> None:
        """Read, pass on what is whole, send what that gave; again while the buffer came back full. Where so
        many bytes are `given`, they lie in the buffer already."""
        connection, inbox, outbox, tls = self.connection, self._inbox, self._outbox, self._tls
        try:
            for _ in range(_READS_PER_EVENT):
                room = len(self._buffer)
                nbytes = given or self._recv_into(self._buffer)
                given = 0
                self._polling.came()
                if not nbytes:
                    self.abort(connection.eof())
                    return
                messages = inbox.received(nbytes)
                self._untold = len(messages)
                for message in messages:
                    self._untold -= 1
                    self._on_message(message)
                    if self.closed:
                        return
                if outbox.nbytes:
                    self.flush()
                    if self._writing and self._pauses and connection.choked and not self.closed:
                        # Answers pile up that the client does not read: take no more calls. A client goes on
                        # reading, so that the two never wait for each other.
                        self._paused = True
                        self._loop.remove_reader(self.file)
                # While the answers are on their way, not before.
                self._buffer = inbox.buffer()
                if nbytes < room and (tls is None or not tls.more):
                    return
                if self.closed or self._paused:
                    return
            if tls is not None:
                # What TLS holds already, no event tells of.
                self._loop.call_soon(self._read_rest)
        except BlockingIOError:
            pass
        except TransportError as error:
            self._refuse(error)
        except OSError as error:
            self.abort(_lost(error, connection.peer))

    def _read_rest(self) -> None:
        if not self.closed and not self._paused:
            self._readable()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        if self.connection.compresses and (rate := delivery_rate(self._sock)) is not None:
            self.connection.set_link_rate(rate)
        try:
            self.connection.tick()
        except TransportError as error:
            self.abort(error)
            return
        self.flush()

    def _refuse(self, error: TransportError) -> None:
        """The peer broke the rules: say so if the socket takes it, and go."""
        if self.connection.role == "server" and isinstance(error, PeerError):
            with suppress(OSError, TransportError):
                self.connection.error(0, error)
                self.flush()
        self.abort(error)

    async def drained(self) -> None:
        """Returns once everything that waits is with the kernel."""
        while self._outbox.nbytes and not self.closed:
            self._idle = self._loop.create_future()
            await self._idle

    def abort(self, error: TransportError) -> None:
        """Close now, whatever is under way, and tell the owner why."""
        if self.closed:
            return
        self.closed = True
        self._timer.cancel()
        self._polling.came()  # nothing more will
        self._loop.remove_reader(self.file)
        self._loop.remove_writer(self.file)
        if self._tls is not None:
            self._tls.close()
        self._sock.close()
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        self._owner.on_lost(error)


def _lost(error: OSError, peer: str) -> TransportError:
    if isinstance(error, ssl.SSLError) and isinstance(
        refused := map_tls_error(error, peer), AuthenticationError
    ):
        # A server that asks for a certificate says so only after the client's part of the handshake is done.
        return refused
    return ConnectionLost(f"the connection to {peer} broke: {error.strerror or error}", peer=peer)
