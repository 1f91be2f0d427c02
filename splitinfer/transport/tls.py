"""TLS over a non-blocking socket, with the two calls that a Link makes on a socket.

The record layer is `ssl.MemoryBIO`: the protocol above and the socket below stay the same as without TLS.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from splitinfer.transport.outbox import Piece

__all__ = ["TlsStream"]

_READ_NBYTES: Final = 64 * 1024
_LEAVE_SECONDS: Final = 1.0
_WRITE_NBYTES: Final = 64 * 1024  # encrypted before the socket is asked again


class TlsStream:
    """Decrypts into the buffer it is given. Raises BlockingIOError for "not now", else OSError."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_name: str | None = None,
    ) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._encrypted = memoryview(b"")
        self._received = memoryview(bytearray(_READ_NBYTES))
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side, server_name)

    async def handshake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises ssl.SSLError (certificate not trusted, and so on), ConnectionResetError."""
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                await loop.sock_sendall(self._sock, self._outgoing.read())
                data = await loop.sock_recv(self._sock, _READ_NBYTES)
                if not data:
                    raise ConnectionResetError("closed during the TLS handshake") from None
                self._incoming.write(data)
            except ssl.SSLError:
                with suppress(OSError):  # the alert tells the peer why
                    await loop.sock_sendall(self._sock, self._outgoing.read())
                raise
            else:
                await loop.sock_sendall(self._sock, self._outgoing.read())
                return

    @property
    def peer_certificate(self) -> bytes | None:
        """The peer's certificate in DER, None where it showed none."""
        return self._object.getpeercert(True)

    @property
    def more(self) -> bool:
        """True where bytes are here already, so that the socket will not become readable for them."""
        return self._object.pending() > 0 or self._incoming.pending > 0

    @property
    def unsent(self) -> bool:
        """True where encrypted bytes wait for the socket."""
        return len(self._encrypted) > 0 or self._outgoing.pending > 0

    async def leave(self, loop: asyncio.AbstractEventLoop) -> None:
        """After a handshake that failed: wait a moment for the peer to go, so that it reads the alert.

        Closing with bytes unread would reset the connection, and the alert with it.
        """
        with suppress(OSError, TimeoutError):
            self._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LEAVE_SECONDS):
                while await loop.sock_recv(self._sock, _READ_NBYTES):
                    pass

    def recv_into(self, buffer: memoryview) -> int:
        """Decrypt whatever is here, record by record, before the socket is asked for more."""
        filled = 0
        while True:
            try:
                nbytes: int = self._object.read(len(buffer) - filled, buffer[filled:])  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                if filled:
                    return filled
                taken = self._sock.recv_into(self._received)
                if not taken:
                    return 0
                self._incoming.write(self._received[:taken])
                continue
            except ssl.SSLZeroReturnError:
                return filled
            filled += nbytes
            if not nbytes or filled == len(buffer) or not self.more:
                return filled

    def sendmsg(self, buffers: Sequence[Piece]) -> int:
        """How many bytes were encrypted: they are on their way, taken by the socket or not."""
        self._push()
        taken = 0
        for piece in buffers:
            taken += self._object.write(memoryview(piece)[: _WRITE_NBYTES - taken])
            if taken >= _WRITE_NBYTES:
                break
        with suppress(BlockingIOError):
            self._push()
        return taken

    def send(self, buffer: Piece) -> int:
        return self.sendmsg((buffer,))

    def _push(self) -> None:
        while self.unsent:
            if not self._encrypted:
                self._encrypted = memoryview(self._outgoing.read())
            self._encrypted = self._encrypted[self._sock.send(self._encrypted) :]

    def close(self) -> None:
        """Say goodbye if the socket takes it."""
        with suppress(OSError):
            self._object.unwrap()
        with suppress(OSError):
            self._push()
