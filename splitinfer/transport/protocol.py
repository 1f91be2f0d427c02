"""The connection as a pure state machine: bytes in, messages out; calls in, pieces of memory out.

No socket, no event loop, no clock, no torch: whoever drives it moves the bytes and calls `tick` once a
second. Any TransportError that `received`, `eof` or `tick` raises is the connection's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from secrets import token_bytes
from typing import Any, Final, Protocol

from splitinfer import __version__
from splitinfer.errors import (
    AuthenticationError,
    ConnectionLost,
    LimitExceeded,
    Overloaded,
    RemoteError,
    RemoteProtocolError,
    TransportError,
)
from splitinfer.transport.buffers import POOL, BufferPool
from splitinfer.transport.frames import (
    AUTH,
    CANCEL,
    CHUNK_NBYTES,
    CREDIT,
    END,
    ERROR,
    GOAWAY,
    HELLO,
    ITEM,
    PING,
    PONG,
    REPLY,
    REQUEST,
    WELCOME,
    ZEROS,
    Layout,
    Limits,
    layout_of,
    pack_frame,
    pack_map,
    pack_table,
)
from splitinfer.transport.handshake import (
    MAX_HELLO,
    NONCE_NBYTES,
    Authenticator,
    Hello,
    Role,
    error_from,
    error_map,
)
from splitinfer.transport.inbox import Inbox, Message
from splitinfer.transport.outbox import Outbox, Piece
from splitinfer.transport.tensors import Array, TensorSpec, data_of, spec_of

__all__ = ["STREAM_WINDOW", "TICK_SECONDS", "Codec", "Connection"]

TICK_SECONDS: Final = 1.0
STREAM_WINDOW: Final = 8  # ITEMs that may come before the first CREDIT

_PING_AFTER: Final = 1  # silent ticks
_LOST_AFTER: Final = 4
_HANDSHAKE_TICKS: Final = 10
_STALL_TICKS: Final = 10
_STALL_NBYTES: Final = 16 * 1024  # at least this much has to move in so many ticks: 13 kbit/s
_HIGH_WATER: Final = 8 << 20  # above it nothing more is taken on: no PONG, and a server stops reading


class Codec(Protocol):
    """Other forms in which a tensor may travel. `encodings` are those that this side can decode.

    It is not asked for messages whose tensors have less than `min_nbytes` bytes together. `link_rate` is the
    link's throughput in bytes/s, set by whoever measures it; None where nobody knows.
    """

    encodings: frozenset[int]
    min_nbytes: int
    link_rate: float | None

    def decode(self, encoding: int, spec: TensorSpec, wire: memoryview, out: memoryview, /) -> None:
        """As `inbox.Decoder`."""

    def encode(
        self, spec: TensorSpec, data: memoryview, accepted: frozenset[int]
    ) -> tuple[int, Sequence[Piece], int] | None:
        """(encoding, pieces, their nbytes together) in an encoding the peer accepts; None: as it is."""


class _Stall:
    """Finds a peer that moves too few bytes while some are due."""

    __slots__ = ("_mark", "_ticks")

    def __init__(self) -> None:
        self._mark = 0
        self._ticks = 0

    def found(self, due: bool, moved: int) -> bool:
        if not due or moved - self._mark >= _STALL_NBYTES:
            self._mark, self._ticks = moved, 0
        else:
            self._ticks += 1
        return self._ticks >= _STALL_TICKS


class Connection:
    """One end of one connection. `info` is what a server says of itself; on the client it arrives.

    `limits` bound what this end accepts; `peer_limits`, known once `open`, what it may send.
    """

    def __init__(
        self,
        role: Role,
        *,
        limits: Limits | None = None,
        info: Callable[[], dict[str, Any]] | None = None,
        authenticator: Authenticator | None = None,
        binding: bytes = b"",
        codec: Codec | None = None,
        peer: str = "",
        pool: BufferPool = POOL,
    ) -> None:
        self.role = role
        self.peer = peer
        self.limits = limits or Limits()
        self.peer_limits = self.limits
        self.info: dict[str, Any] = {}
        self.open = False
        self.draining = False  # the one who answers has said GOAWAY
        self.outbox = Outbox()
        self.inbox = Inbox(self.limits, self._admit, decode=codec.decode if codec else None, pool=pool)
        self._make_info = info
        self._authenticator = authenticator
        self._transcript = binding
        self._codec = codec
        self._encoding: Codec | None = None  # the codec, once the peer has listed a form of it
        self._accepted: frozenset[int] = frozenset()
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._last_id = 0
        # Calls in flight. A client's: True until it was cancelled here. A server's: bytes held for it.
        self._calls: dict[int, int] = {}
        self._held_nbytes = 0
        self._credit: dict[int, int] = {}
        self._greeted = False
        self._heard = True
        self._silent_ticks = self._open_ticks = 0
        self._reading, self._writing = _Stall(), _Stall()
        if role == "client":
            self._send_hello()
        else:
            # Until the token was proved: handshake frames only, and small ones.
            self.inbox.handshaking = True
            self.inbox.limits = Limits(max_table=1, max_meta=MAX_HELLO, max_body=1)

    # ---- bytes in

    def buffer(self) -> memoryview:
        """Where the next bytes belong."""
        return self.inbox.buffer()

    def received(self, nbytes: int) -> list[Message]:
        """`nbytes` bytes were put into `buffer()`: the messages that concern the caller.

        REQUEST and CANCEL on a server; REPLY, ITEM, END, ERROR, PONG, GOAWAY and the WELCOME that opens the
        connection on a client.
        """
        self._heard = True
        messages = self.inbox.received(nbytes)
        # Nearly always there is one, and nearly always it is for the caller.
        if len(messages) == 1:
            return messages if self._accept(messages[0]) else []
        return [message for message in messages if self._accept(message)]

    def eof(self) -> TransportError:
        """The peer closed its side: why the connection is lost."""
        when = (
            "in the middle of a frame" if self.inbox.unfinished else "without a word" if not self.open else ""
        )
        return ConnectionLost(f"{self.peer} closed the connection {when}".rstrip(), peer=self.peer)

    def _accept(self, message: Message) -> bool:
        """The protocol's own part of a message; True where the caller has to see it."""
        kind = message.kind
        if kind == REQUEST:
            return message.tensors is not None
        if kind in (REPLY, ITEM, END, ERROR):
            return self._accept_answer(message)
        if kind == PING:
            if self.outbox.nbytes < _HIGH_WATER:
                self.outbox.add(0, pack_frame(PONG, message.id))
            return False
        if kind == CANCEL and self.role == "server":
            return self._accept_cancel(message.id)
        if kind == CREDIT and self.role == "server":
            return message.id in self._calls
        if kind == PONG:
            return message.id != 0
        if kind == GOAWAY and self.role == "client":
            self.draining = True
            return True
        if not self.open:
            return self._shake_hands(message)
        raise RemoteProtocolError(f"a frame of kind {kind} has no place here", peer=self.peer)

    def _admit(self, message: Message) -> bool:
        """Asked by the inbox before memory is taken for a message."""
        id = message.id
        if message.kind != REQUEST:
            state = self._calls.get(id)
            if self.role != "client" or state is None:
                raise RemoteProtocolError("an answer to a call that was not made", peer=self.peer)
            return bool(state)
        if self.role != "server" or id == 0 or id in self._calls:
            raise RemoteProtocolError(f"request id {id} is not free", peer=self.peer)
        full = ""
        if self.draining:
            full = "the node is draining"
        elif len(self._calls) >= self.limits.max_calls:
            full = f"{len(self._calls)} calls are in flight on this connection"
        elif self._held_nbytes + message.nbytes > self.limits.max_buffered:
            full = f"calls in flight on this connection hold {self._held_nbytes:,} bytes"
        self._calls[id] = 0
        if full:
            self.error(id, Overloaded(full, remedy="Try again later, or another node."))
            return False
        self._calls[id] = message.nbytes
        self._held_nbytes += message.nbytes
        return True

    def _accept_answer(self, message: Message) -> bool:
        id, kind = message.id, message.kind
        if id == 0 and kind == ERROR:
            raise error_from(message.meta, self.peer)
        known = self._calls.get(id)
        if self.role != "client" or known is None:
            raise RemoteProtocolError("an answer to a call that was not made", peer=self.peer)
        if kind == ITEM:
            left = self._credit.get(id, STREAM_WINDOW)
            if not left:
                raise RemoteProtocolError("more items of a stream than were allowed", peer=self.peer)
            self._credit[id] = left - 1
            return bool(known)
        del self._calls[id]
        if kind != REPLY:
            self._credit.pop(id, None)
            self.inbox.drop(id)
            if kind == ERROR and self.outbox.drop(id) is not None:
                # Refused while its body was still on the way: tell the peer that no more of it comes.
                self.outbox.add(0, pack_frame(CANCEL, id))
        return bool(known)

    def _accept_cancel(self, id: int) -> bool:
        if id in self._calls:
            if not self.inbox.drop(id):
                return True
            self.error(id, _cancelled())
        elif self.inbox.drop(id) is False and self.outbox.drop(id) is not None:
            # The answer was on its way; what is missing of it will not come.
            self.outbox.add(0, pack_frame(ERROR, id, meta=pack_map(error_map(_cancelled()), 1 << 16)))
        return False

    # ---- handshake

    def _send_hello(self) -> None:
        self._own_hello = Hello(
            token_bytes(NONCE_NBYTES),
            self.limits,
            f"splitinfer/{__version__}",
            self._codec.encodings if self._codec else frozenset(),
            self.role == "server" and self._authenticator is not None,
        )
        self._own_meta = pack_map(self._own_hello.to_map(), MAX_HELLO)
        self.outbox.add(0, pack_frame(HELLO, meta=self._own_meta))

    def _shake_hands(self, message: Message) -> bool:
        """One handshake frame, each of which has one place. True for the WELCOME that opens a client."""
        kind, client = message.kind, self.role == "client"
        if kind == HELLO and not self._greeted:
            self._greeted = True
            self._greet(message)
            return False
        if self._greeted and kind == (WELCOME if client else AUTH):
            proof = message.meta.get("proof", b"")
            self._check_proof("server" if client else "client", proof if type(proof) is bytes else b"")
            if client:
                info = message.meta.get("info", {})
                if type(info) is not dict:
                    raise RemoteProtocolError("the peer's info is not a map", peer=self.peer)
                self.info = info
            else:
                self.info = self._make_info() if self._make_info else {}
                meta = {"proof": self._prove(), "info": self.info}
                self.outbox.add(0, pack_frame(WELCOME, meta=pack_map(meta, self.peer_limits.max_meta)))
            self.open = True
            self.inbox.handshaking = False
            self.inbox.limits = self.limits
            return client
        raise RemoteProtocolError(f"a handshake frame of kind {kind} out of its turn", peer=self.peer)

    def _greet(self, message: Message) -> None:
        hello = Hello.from_map(message.meta)
        theirs = message.packed_meta
        self.peer_limits = hello.limits
        self._accepted = hello.encodings
        if self._codec is not None and hello.encodings & self._codec.encodings:
            self._encoding = self._codec
        if self.role == "server":
            self._send_hello()
            self._transcript = theirs + self._own_meta + self._transcript
            return
        self._transcript = self._own_meta + theirs + self._transcript
        if hello.auth and self._authenticator is None:
            raise AuthenticationError(
                f"{self.peer} asks for a token", peer=self.peer, remedy="Give the token's file."
            )
        if self._authenticator is not None and not hello.auth:
            raise AuthenticationError(
                f"{self.peer} asks for no token, so it cannot prove that it is yours",
                peer=self.peer,
                remedy="Start the node with the token, or connect without one.",
            )
        self.outbox.add(0, pack_frame(AUTH, meta=pack_map({"proof": self._prove()}, MAX_HELLO)))

    def _prove(self) -> bytes:
        return self._authenticator.prove(self.role, self._transcript) if self._authenticator else b""

    def _check_proof(self, role: Role, proof: bytes) -> None:
        if self._authenticator is not None and not self._authenticator.verify(role, self._transcript, proof):
            raise AuthenticationError(
                f"{self.peer} does not know the token", peer=self.peer, remedy="Use one token on both sides."
            )

    # ---- calls out

    def request(
        self, method: str, tensors: Sequence[Array], meta: dict[str, Any], milliseconds_left: int
    ) -> int:
        """Queue one call; returns its id. Raises LocalProtocolError, Overloaded; then nothing was queued."""
        if self.draining:
            raise Overloaded(f"{self.peer} is draining", peer=self.peer, remedy="Use another node.")
        if len(self._calls) >= self.peer_limits.max_calls:
            limit = self.peer_limits.max_calls
            raise LimitExceeded(
                f"{limit} calls are in flight to {self.peer}",
                limit_name="max_calls",
                value=limit + 1,
                limit=limit,
            )
        id = self._last_id + 1
        self._send(REQUEST, id, method, tensors, meta, milliseconds_left)
        self._last_id = id
        self._calls[id] = 1
        return id

    def cancel(self, id: int) -> None:
        """The caller has no more use for this call's answer."""
        if self._calls.get(id):
            if self.outbox.drop(id):
                del self._calls[id]
            else:
                self._calls[id] = 0  # until its answer or its ERROR is there
                self.outbox.add(0, pack_frame(CANCEL, id))

    def credit(self, id: int, items: int) -> None:
        """So many more ITEMs of a stream may come."""
        if id in self._calls:
            self._credit[id] = self._credit.get(id, STREAM_WINDOW) + items
            self.outbox.add(0, pack_frame(CREDIT, id, value=items))

    # ---- answers out

    def reply(self, id: int, tensors: Sequence[Array], meta: dict[str, Any]) -> None:
        """The answer to a call. Raises LocalProtocolError; then nothing was queued and the call is open."""
        if id in self._calls:
            self._send(REPLY, id, "", tensors, meta, 0)
            self._held_nbytes -= self._calls.pop(id)

    def item(self, id: int, tensors: Sequence[Array], meta: dict[str, Any]) -> None:
        """One answer of a stream. The caller counts credit."""
        if id in self._calls:
            self._send(ITEM, id, "", tensors, meta, 0)

    def end(self, id: int) -> None:
        """The end of a stream."""
        if id in self._calls:
            self._held_nbytes -= self._calls.pop(id)
            self.outbox.add(id, pack_frame(END, id))

    def error(self, id: int, error: BaseException) -> None:
        """The call failed, or with id 0 the connection."""
        if id == 0 or id in self._calls:
            self._held_nbytes -= self._calls.pop(id, 0)
            self.outbox.add(id, pack_frame(ERROR, id, meta=pack_map(error_map(error), 1 << 16)))

    # ---- both ways

    @property
    def compresses(self) -> bool:
        """True where what is sent depends on the link's throughput."""
        return self._encoding is not None

    def set_link_rate(self, rate: float | None) -> None:
        """The link's throughput in bytes/s was measured."""
        if self._encoding is not None:
            self._encoding.link_rate = rate

    def ping(self, id: int = 0) -> None:
        """The peer answers with a PONG of the same id."""
        self.outbox.add(0, pack_frame(PING, id))

    def goaway(self) -> None:
        """Calls made from now on are refused; those in flight will be answered."""
        if self.open and not self.draining:
            self.outbox.add(0, pack_frame(GOAWAY))
        self.draining = True

    @property
    def calls(self) -> int:
        """Calls in flight."""
        return len(self._calls)

    @property
    def choked(self) -> bool:
        """True where so much waits to be sent that a server should read no more."""
        return self.outbox.nbytes >= _HIGH_WATER

    def tick(self) -> None:
        """One second has passed. Raises ConnectionLost for a peer that is gone or too slow."""
        # While choked a server does not listen; whether the peer is there shows in what it takes.
        self._silent_ticks = 0 if self._heard or self.choked else self._silent_ticks + 1
        self._heard = False
        if self._silent_ticks >= _LOST_AFTER:
            raise ConnectionLost(f"{self.peer} has been silent for {_LOST_AFTER} s", peer=self.peer)
        if self._silent_ticks == _PING_AFTER and self.open:
            self.ping()
        self._open_ticks += 1
        if not self.open and self._open_ticks >= _HANDSHAKE_TICKS:
            raise ConnectionLost(f"{self.peer} did not finish the handshake", peer=self.peer)
        if self._writing.found(self.outbox.nbytes > 0, self.outbox.sent_nbytes):
            raise ConnectionLost(f"{self.peer} reads too slowly", peer=self.peer)
        if self._reading.found(self.inbox.unfinished and not self.choked, self.inbox.nbytes):
            raise ConnectionLost(f"{self.peer} sends too slowly", peer=self.peer)

    def _send(
        self, kind: int, id: int, method: str, tensors: Sequence[Array], meta: dict[str, Any], value: int
    ) -> None:
        limits = self.peer_limits
        packed = pack_map(meta, limits.max_meta) if meta else b""
        table, padding, nbytes = layout_of(method, tensors, limits, self._layouts)
        if self._encoding and nbytes >= self._encoding.min_nbytes:
            table, body, nbytes = self._encoded(self._encoding, method, tensors)
        else:
            body = []
            for tensor, zeros in zip(tensors, padding, strict=True):
                body.append(data_of(tensor))
                if zeros:
                    body.append(zeros)
        if self.outbox.nbytes + nbytes > limits.max_buffered:
            raise LimitExceeded(
                f"{self.outbox.nbytes:,} bytes already wait for {self.peer}",
                limit_name="max_buffered",
                value=self.outbox.nbytes + nbytes,
                limit=limits.max_buffered,
                peer=self.peer,
                remedy="Wait for answers before sending more.",
            )
        first = min(nbytes, CHUNK_NBYTES)
        self.outbox.add(id, pack_frame(kind, id, table, packed, first, value), body, nbytes)

    def _encoded(self, codec: Codec, method: str, tensors: Sequence[Array]) -> tuple[bytes, list[Piece], int]:
        """Table, body and its nbytes with each tensor in the form that the codec chose."""
        rows, body, total = [], list[Piece](), 0
        for tensor in tensors:
            spec, data = spec_of(tensor), data_of(tensor)
            encoded = codec.encode(spec, data, self._accepted)
            encoding, pieces, nbytes = encoded or (0, (data,), data.nbytes)
            rows.append((spec, encoding, nbytes))
            body += pieces
            body.append(ZEROS[-nbytes % 64])
            total += nbytes + len(body[-1])
        return pack_table(method, rows, self.peer_limits), body, total


def _cancelled() -> RemoteError:
    return RemoteError("the call was cancelled", code="cancelled")
