"""The connection as a pure state machine: bytes in, messages out; calls in, pieces of memory out.

No socket, no event loop, no clock, no torch: whoever drives it moves the bytes and calls `tick` once a
second. Any TransportError that `received`, `eof` or `tick` raises is the connection's end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from splitinfer.errors import ConnectionLost, RemoteProtocolError, TransportError
from splitinfer.transport.buffers import POOL, BufferPool
from splitinfer.transport.frames import (
    CANCEL,
    CREDIT,
    END,
    ERROR,
    GOAWAY,
    ITEM,
    PING,
    PONG,
    REPLY,
    REQUEST,
    WELCOME,
    Limits,
    pack_frame,
    pack_map,
)
from splitinfer.transport.handshake import MAX_HELLO, Authenticator, Handshake, Role, error_from, error_map
from splitinfer.transport.inbox import Inbox
from splitinfer.transport.messages import Call, Message
from splitinfer.transport.outbox import Codec, Outbox
from splitinfer.transport.parcel import Parcel
from splitinfer.transport.refusals import cancelled, misplaced, no_room_here, no_room_there, unasked
from splitinfer.transport.tensors import Array
from splitinfer.transport.vitals import Vitals

__all__ = ["STREAM_WINDOW", "Connection"]

STREAM_WINDOW: Final = 8  # ITEMs that may come before the first CREDIT

_HIGH_WATER: Final = 8 << 20  # above it nothing more is taken on: no PONG, and a server stops reading
_MAX_ERROR: Final = 1 << 16
_NOBODY: Final = object()


class Connection:
    """One end of one connection. `limits` bound what this end accepts.

    `info` makes what a server says of itself; `binding` is what both ends know of the TLS session beneath.
    Put received bytes into `buffer()` and call `received`; send what `outbox.pieces()` gives and call
    `outbox.sent`.
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
        self.open = False
        self.draining = False  # the server has said GOAWAY
        self.outbox = Outbox(self.limits)
        self._codec = codec
        self.inbox = Inbox(
            self.limits,
            self._admit,
            decode=codec.decode if codec else None,
            pool=pool,
            make=Message if role == "client" else Call,
        )
        # The protocol's own part of a message out of the inbox; True where the caller has to see it.
        self.accept = self._accept_answer if role == "client" else self._accept_request
        self._handshake = Handshake(
            role,
            limits=self.limits,
            encodings=codec.encodings if codec else frozenset(),
            make_info=info,
            authenticator=authenticator,
            binding=binding,
            link_rate=int(codec.link_rate or 0) if codec else 0,
            peer=peer,
        )
        self.made = 0  # calls so far
        self._last_id = 0  # more, where a parcel that was stamped was not needed
        # A client's calls in flight, by id: whose they are, None once cancelled here.
        self._callers: dict[int, Any] = {}
        # A server's: the bytes held for each.
        self._held: dict[int, int] = {}
        self._held_nbytes = 0
        self._credit: dict[int, int] = {}
        self._vitals = Vitals()
        if role == "server":
            self.inbox.allow(Limits(max_table=1, max_meta=MAX_HELLO, max_body=1), handshake_only=True)
        for frame in self._handshake.start():
            self.outbox.add(0, frame)

    @property
    def info(self) -> dict[str, Any]:
        """What the server says of itself; empty until the connection is open."""
        return self._handshake.info

    @property
    def calls(self) -> int:
        """Calls in flight."""
        return len(self._callers) + len(self._held)

    @property
    def choked(self) -> bool:
        """True where so much waits to be sent that a server should read no more."""
        return self.outbox.nbytes >= _HIGH_WATER

    # ---- bytes in

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        return self.inbox.buffer()

    def received(self, nbytes: int) -> list[Message]:
        """`nbytes` bytes were put into `buffer()`: the messages that concern the caller.

        REQUEST, CANCEL and CREDIT on a server; REPLY, ITEM, END, ERROR, PONG, GOAWAY and the WELCOME that
        opens the connection on a client.
        """
        return [message for message in self.inbox.received(nbytes) if self.accept(message)]

    def eof(self) -> TransportError:
        """The peer closed its side: why the connection is lost."""
        when = (
            " in the middle of a frame" if self.inbox.unfinished else "" if self.open else " without a word"
        )
        return ConnectionLost(
            f"{self.peer} closed the connection{when}",
            peer=self.peer,
            remedy="" if self.open else "Check what listens there, and that both sides use TLS or neither.",
        )

    def answered(self, id: int) -> Any:
        """A REPLY has come: whose it is, None where that one has cancelled the call."""
        try:
            return self._callers.pop(id)
        except KeyError:
            raise unasked(self.peer) from None

    def _accept_answer(self, message: Message) -> bool:
        """A client's `accept`."""
        kind, id = message.kind, message.id
        if kind == REPLY:
            message.caller = self.answered(id)
            return message.caller is not None
        if kind in (END, ERROR, ITEM):
            if kind == ERROR and id == 0:
                raise error_from(message.meta, self.peer)
            message.caller = self._caller(id)
            if kind == ITEM:
                self._spend_credit(id)
            else:
                self._forget(id)
            return message.caller is not None
        if kind == GOAWAY:
            self.draining = True
            return True
        return self._accept_either(message)

    def _accept_request(self, message: Message) -> bool:
        """A server's `accept`."""
        kind, id = message.kind, message.id
        if kind == REQUEST:
            return self.admit(message)
        if kind == CANCEL:
            return self._accept_cancel(id)
        if kind == CREDIT:
            return id in self._held
        return self._accept_either(message)

    def _accept_either(self, message: Message) -> bool:
        kind, id = message.kind, message.id
        if kind == PING:
            if not self.choked:
                self.outbox.add(0, pack_frame(PONG, id))
            return False
        if kind == PONG:
            return id != 0
        if kind <= WELCOME and not self.open:
            return self._accept_handshake(message)
        raise misplaced(kind, self.peer)

    def _accept_handshake(self, message: Message) -> bool:
        handshake = self._handshake
        for frame in handshake.receive(message):
            self.outbox.add(0, frame)
        if handshake.hello is not None:
            self.outbox.limits, self.outbox.accepted = handshake.hello.limits, handshake.hello.encodings
            if self._codec is not None and self._codec.encodings & handshake.hello.encodings:
                self.outbox.codec = self._codec
                self._codec.agree(handshake.hello.encodings, handshake.hello.link_rate)
        if not handshake.done:
            return False
        self.open = True
        self.inbox.allow(self.limits, handshake_only=False)
        return self.role == "client"

    def _admit(self, message: Message) -> bool:
        """Asked by the inbox before memory is taken for a message."""
        if self.role == "client" and message.kind != REQUEST:
            return self._caller(message.id) is not None
        if self.role == "server" and message.kind == REQUEST:
            return self.admit(message)
        raise misplaced(message.kind, self.peer)

    def admit(self, message: Message) -> bool:
        """A REQUEST has come, or begun: False where there is no room for it, which the caller is told."""
        if message.admitted is not None:
            return message.admitted
        id, held = message.id, self._held
        if id in held or id == 0:
            raise RemoteProtocolError(f"request id {id} is not free", peer=self.peer)
        held_nbytes = self._held_nbytes + message.nbytes
        if len(held) >= self.limits.max_calls or held_nbytes > self.limits.max_buffered or self.draining:
            error = no_room_here(self.draining, self.limits.max_calls, len(held), self._held_nbytes)
            held[id] = 0
            self.error(id, error)
            return False
        held[id] = message.nbytes
        self._held_nbytes = held_nbytes
        return True

    def _caller(self, id: int) -> Any:
        """Whose call this is, None once it was cancelled. Raises RemoteProtocolError where there is none."""
        caller = self._callers.get(id, _NOBODY)
        if caller is _NOBODY:
            raise unasked(self.peer)
        return caller

    def _forget(self, id: int) -> None:
        """A stream has ended, or a call has failed."""
        del self._callers[id]
        self._credit.pop(id, None)
        self.inbox.drop(id)
        if self.outbox.drop(id) is not None:
            # It failed while its body was still on the way: tell the server that no more of it comes.
            self.outbox.add(0, pack_frame(CANCEL, id))

    def _spend_credit(self, id: int) -> None:
        left = self._credit.get(id, STREAM_WINDOW)
        if not left:
            raise RemoteProtocolError("more items of a stream than were allowed", peer=self.peer)
        self._credit[id] = left - 1

    def _accept_cancel(self, id: int) -> bool:
        dropped = self.inbox.drop(id)
        if id in self._held:
            if not dropped:
                return True
            self.error(id, cancelled())
        elif not dropped and self.outbox.drop(id) is not None:
            # The answer was on its way; what is missing of it will not come.
            self.outbox.add(0, pack_frame(ERROR, id, meta=pack_map(error_map(cancelled()), _MAX_ERROR)))
        return False

    # ---- a client's calls

    def request(
        self,
        method: str,
        tensors: Sequence[Array],
        meta: dict[str, Any] | None,
        milliseconds_left: int,
        caller: Any = True,
    ) -> int:
        """Queue one call; returns its id. `caller` comes back with each answer, as `message.caller`.

        Raises LocalProtocolError, Overloaded; then nothing was queued.
        """
        callers = self._callers
        if self.draining or len(callers) >= self.outbox.limits.max_calls:
            raise no_room_there(self.draining, self.outbox.limits.max_calls, self.peer)
        id = self._last_id + 1
        self.outbox.send(REQUEST, id, method, tensors, meta, milliseconds_left)
        self._last_id = id
        self.made += 1
        callers[id] = caller
        return id

    def stamp(self, parcel: Parcel, milliseconds_left: int) -> bool:
        """Make a parcel a call to come. False where it cannot go as it is, and `request` has to be asked."""
        outbox = self.outbox
        if self.draining or len(self._callers) >= outbox.limits.max_calls or not outbox.takes(parcel):
            return False
        self._last_id += 1  # whatever becomes of it: an id that may have gone is not given again
        parcel.stamp(self, self._last_id, milliseconds_left)
        return True

    def post(self, parcel: Parcel, sent: int) -> int:
        """Queue what is left of a parcel, of which `sent` bytes have gone; returns the call's id."""
        self.made += 1
        self.outbox.post(parcel, sent)
        self._callers[parcel.id] = True
        return parcel.id

    def adopt(self, id: int, caller: Any) -> None:
        """A request made without a `caller` gets one."""
        self._callers[id] = caller

    @property
    def callers(self) -> list[Any]:
        """Whoever waits for an answer."""
        return [caller for caller in self._callers.values() if caller is not None]

    def cancel(self, id: int) -> None:
        """The caller has no more use for this call's answer."""
        if self._callers.get(id) is not None:
            if self.outbox.drop(id):
                del self._callers[id]
            else:
                self._callers[id] = None  # until its answer or its ERROR is there
                self.outbox.add(0, pack_frame(CANCEL, id))

    def credit(self, id: int, items: int) -> None:
        """So many more ITEMs of a stream may come."""
        if id in self._callers:
            self._credit[id] = self._credit.get(id, STREAM_WINDOW) + items
            self.outbox.add(0, pack_frame(CREDIT, id, value=items))

    # ---- a server's answers. To a call that is not in flight any more they do nothing.

    def reply(self, id: int, tensors: Sequence[Array], meta: dict[str, Any]) -> None:
        """The answer to a call. Raises LocalProtocolError; then nothing was queued and the call is open."""
        if id in self._held:
            self.outbox.send(REPLY, id, "", tensors, meta)
            self._held_nbytes -= self._held.pop(id)

    def stamp_answer(self, id: int, parcel: Parcel) -> bool:
        """Make a parcel the answer to a call. False where it cannot go as it is, and `reply` is needed."""
        if id not in self._held or not self.outbox.takes(parcel):
            return False
        parcel.stamp(self, id, 0)
        return True

    def post_answer(self, id: int, parcel: Parcel, sent: int) -> None:
        """Queue what is left of an answer of which `sent` bytes have gone."""
        self.outbox.post(parcel, sent)
        self._held_nbytes -= self._held.pop(id)

    def item(self, id: int, tensors: Sequence[Array], meta: dict[str, Any]) -> None:
        """One answer of a stream; the caller counts credit. Raises LocalProtocolError as `reply` does."""
        if id in self._held:
            self.outbox.send(ITEM, id, "", tensors, meta)

    def end(self, id: int) -> None:
        """The end of a stream."""
        if id in self._held:
            self._held_nbytes -= self._held.pop(id)
            self.outbox.add(id, pack_frame(END, id))

    def error(self, id: int, error: BaseException) -> None:
        """The call failed, or with id 0 the connection."""
        if id == 0 or id in self._held:
            self._held_nbytes -= self._held.pop(id, 0)
            self.outbox.add(id, pack_frame(ERROR, id, meta=pack_map(error_map(error), _MAX_ERROR)))

    def goaway(self) -> None:
        """Calls made from now on are refused; those in flight will be answered."""
        if self.open and not self.draining:
            self.outbox.add(0, pack_frame(GOAWAY))
        self.draining = True

    # ---- both

    def ping(self, id: int = 0) -> None:
        """The peer answers with a PONG of the same id; one of id 0 is not reported."""
        self.outbox.add(0, pack_frame(PING, id))

    @property
    def compresses(self) -> bool:
        """True where what is sent depends on the link's throughput."""
        return self.outbox.codec is not None

    def set_link_rate(self, rate: float | None) -> None:
        """The link's throughput in bytes/s was measured."""
        if self.outbox.codec is not None:
            self.outbox.codec.link_rate = rate

    def tick(self) -> None:
        """`TICK_SECONDS` have passed. Raises ConnectionLost for a peer that is gone or too slow."""
        self._vitals.tick(self)
