"""Bytes in, messages out: where each byte lands, and when a message is whole. No I/O, no clock.

Whoever reads the stream asks `buffer()` where the next bytes belong, puts some there and says how many with
`received()`. Small frames gather in a slab and their tensors are views on it. A larger body gets a buffer of
its own, and from then on its bytes are read straight into it: nothing is copied but what arrived together
with the head. Bodies in pieces (DATA) may interleave with other frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from splitinfer.errors import RemoteProtocolError, VersionMismatch
from splitinfer.transport.buffers import POOL, BufferPool, aligned
from splitinfer.transport.frames import (
    CHUNK_NBYTES,
    DATA,
    EMPTY_TABLE,
    ERROR,
    HEAD,
    ITEM,
    MAGIC,
    REMEMBERED,
    REMEMBERED_NBYTES,
    REPLY,
    REQUEST,
    VERSION,
    WELCOME,
    Limits,
    Table,
    unpack_map,
    unpack_table,
)
from splitinfer.transport.tensors import Tensor, TensorSpec

__all__ = ["Decoder", "Inbox", "Message"]

_HEAD_NBYTES: Final = 32
_FRAME_NBYTES: Final = 64  # the shortest frame
SLAB_NBYTES: Final = 64 * 1024
# A body up to this size is waited for in the slab; of a larger one at most a slab's worth is copied once.
SMALL_NBYTES: Final = 24 * 1024
_MIN_READ: Final = 8 * 1024
_WITH_TABLE: Final = frozenset((REQUEST, REPLY, ITEM))
_LAST_KIND: Final = 14


class Decoder(Protocol):
    """Undoes an encoding other than 0: fills `out` (`spec.nbytes` bytes) from `wire`.

    Raises RemoteProtocolError for an encoding not agreed on, and where `wire` does not yield exactly `out`.
    """

    def __call__(self, encoding: int, spec: TensorSpec, wire: memoryview, out: memoryview, /) -> None: ...


class Message:
    """One whole frame, or message put together from several. `tensors` is None where it was refused.

    `packed_meta` is kept of handshake frames only: the proofs cover it byte by byte.
    """

    __slots__ = ("id", "kind", "meta", "method", "nbytes", "packed_meta", "tensors", "value")

    def __init__(
        self,
        kind: int,
        id: int,
        value: int,
        meta: dict[str, Any],
        method: str = "",
        tensors: list[Tensor] | None = None,
        nbytes: int = 0,
    ) -> None:
        self.kind = kind
        self.id = id
        self.value = value
        self.meta = meta
        self.method = method
        self.tensors = tensors
        self.nbytes = nbytes
        self.packed_meta = b""


class _Landing:
    """A body under way: `data` takes it, or is None where it was refused and its bytes go nowhere."""

    __slots__ = ("data", "filled", "message", "table")

    def __init__(self, message: Message, table: Table, data: memoryview | None) -> None:
        self.message = message
        self.table = table
        self.data = data
        self.filled = 0


class Inbox:
    """One connection's incoming half.

    `admit(message)` is asked once a message's size is known and before memory is taken for it: False means
    that its body is to be skipped; it raises to end the connection. `limits` and `handshaking` are set anew
    by the connection when the handshake is done.
    """

    def __init__(
        self,
        limits: Limits,
        admit: Callable[[Message], bool],
        *,
        decode: Decoder | None = None,
        pool: BufferPool = POOL,
    ) -> None:
        self.limits = limits
        self.handshaking = False  # True on a server until the client has proved itself
        self.frames = 0  # whole ones so far: what a check for slow writers looks at
        self.nbytes = 0
        self._admit = admit
        self._decode = decode
        self._pool = pool
        self._slab = pool.take(SLAB_NBYTES)
        self._start = 0  # of the first frame not yet parsed, a multiple of 64
        self._end = 0  # of the bytes received
        self._need = _HEAD_NBYTES  # bytes of that frame without which looking again is of no use
        self._tables: dict[bytes, Table] = {}
        self._landings: dict[int, _Landing] = {}
        self._into: _Landing | None = None  # whose body the next bytes are
        self._into_left = 0

    @property
    def unfinished(self) -> bool:
        """True where something has begun and is not whole: a frame, or a body in pieces."""
        return self._start < self._end or self._into is not None or bool(self._landings)

    def buffer(self) -> memoryview:
        """Where the next bytes belong. Never empty."""
        into = self._into
        if into is None:
            if self._landings:
                # Between the pieces of a large body read one head at a time, so that the next piece's bytes
                # go where they belong and not through the slab.
                return self._slab[self._end : max(self._start + self._need, self._end + _FRAME_NBYTES)]
            return self._slab[self._end :]
        if into.data is None:
            return self._slab[self._end : self._end + self._into_left]
        return into.data[into.filled : into.filled + self._into_left]

    def received(self, nbytes: int) -> list[Message]:
        """`nbytes` bytes were put into `buffer()`; returns the messages that are whole now, in order.

        Raises RemoteProtocolError, VersionMismatch, or what `admit` raises: the connection is beyond repair.
        """
        self.nbytes += nbytes
        messages: list[Message] = []
        into = self._into
        if into is not None:
            into.filled += nbytes
            self._into_left -= nbytes
            if not self._into_left:
                self._piece_done(into, messages)
            return messages
        self._end += nbytes
        while self._end - self._start >= self._need and self._parse(messages):
            self._need = _HEAD_NBYTES
        self._make_room()
        return messages

    def drop(self, id: int) -> bool:
        """Forget a body under way: no more of it will come. True if there was one."""
        return self._landings.pop(id, None) is not None

    def _parse(self, messages: list[Message]) -> bool:
        """Take one frame out of the slab. False where more bytes are needed; `_need` then says how many."""
        start = self._start
        head = HEAD.unpack_from(self._slab, start)
        magic, version, kind, value, id, table_nbytes, meta_nbytes, body_nbytes, zero = head
        limits = self.limits
        if magic != MAGIC or version != VERSION:
            raise self._stranger(magic, version)
        if zero or not 0 < kind <= _LAST_KIND or body_nbytes > CHUNK_NBYTES or body_nbytes & 63:
            raise RemoteProtocolError(
                f"a frame of kind {kind} with a body of {body_nbytes} bytes breaks the rules"
            )
        if table_nbytes > limits.max_table or meta_nbytes > limits.max_meta:
            raise RemoteProtocolError(
                f"a frame's head claims {table_nbytes} and {meta_nbytes} bytes: over the limit"
            )
        if self.handshaking and kind > ERROR:
            raise RemoteProtocolError(f"a frame of kind {kind} before the handshake was done")
        meta_start = start + _HEAD_NBYTES + table_nbytes
        body = (meta_start + meta_nbytes + 63) & -64
        if self._end < body:
            self._need = body - start
            return False
        if kind in _WITH_TABLE:
            table = self._table(start + _HEAD_NBYTES, table_nbytes) if table_nbytes else EMPTY_TABLE
            whole = body_nbytes == table.body_nbytes and body_nbytes <= SMALL_NBYTES
            if whole and self._end < body + body_nbytes:
                self._need = body + body_nbytes - start
                return False
            meta = unpack_map(self._slab[meta_start : meta_start + meta_nbytes]) if meta_nbytes else {}
            message = Message(kind, id, value, meta, table.method, None, table.nbytes)
            if not whole:
                return self._land(message, table, body, body_nbytes, messages)
            if self._admit(message):
                message.tensors = self._tensors(table, self._slab[body : body + body_nbytes])
            messages.append(message)
            self._start = body + body_nbytes
        elif kind == DATA:
            return self._land_more(id, table_nbytes + meta_nbytes, body, body_nbytes, messages)
        else:
            if table_nbytes or body_nbytes:
                raise RemoteProtocolError(f"a frame of kind {kind} carries tensors")
            meta = unpack_map(self._slab[meta_start : meta_start + meta_nbytes]) if meta_nbytes else {}
            message = Message(kind, id, value, meta)
            if kind <= WELCOME:
                message.packed_meta = bytes(self._slab[meta_start : meta_start + meta_nbytes])
            messages.append(message)
            self._start = body
        self.frames += 1
        return True

    def _stranger(self, magic: bytes, version: int) -> RemoteProtocolError | VersionMismatch:
        if magic != MAGIC:
            return RemoteProtocolError(
                "the peer does not speak splitinfer's protocol", remedy="Check host and port."
            )
        return VersionMismatch(
            f"the peer speaks version {version} of the wire, this side {VERSION}",
            ours=VERSION,
            theirs=version,
            remedy="Install the same version of splitinfer on both sides.",
        )

    def _table(self, start: int, nbytes: int) -> Table:
        key = bytes(self._slab[start : start + nbytes])
        table = self._tables.get(key)
        if table is None:
            table = unpack_table(memoryview(key), self.limits)
            if nbytes <= REMEMBERED_NBYTES:
                if len(self._tables) >= REMEMBERED:
                    self._tables.clear()
                self._tables[key] = table
        return table

    def _land(self, message: Message, table: Table, body: int, nbytes: int, messages: list[Message]) -> bool:
        """The first piece of a body that gets a buffer of its own."""
        if message.id in self._landings:
            raise RemoteProtocolError("a message began before the one of the same id was whole")
        if nbytes > table.body_nbytes or (nbytes < table.body_nbytes and nbytes != CHUNK_NBYTES):
            raise RemoteProtocolError(f"a first piece of {nbytes} bytes for a body of {table.body_nbytes}")
        data = self._pool.take(table.body_nbytes) if self._admit(message) else None
        landing = self._landings[message.id] = _Landing(message, table, data)
        self._begin_piece(landing, body, nbytes, messages)
        return True

    def _land_more(self, id: int, extra: int, body: int, nbytes: int, messages: list[Message]) -> bool:
        """Another piece."""
        landing = self._landings.get(id)
        if landing is None or extra:
            raise RemoteProtocolError("a piece of a body that nothing announced")
        left = landing.table.body_nbytes - landing.filled
        if nbytes != min(left, CHUNK_NBYTES):
            raise RemoteProtocolError(f"a piece of {nbytes} bytes where {left} are missing")
        self._begin_piece(landing, body, nbytes, messages)
        return True

    def _begin_piece(self, landing: _Landing, body: int, nbytes: int, messages: list[Message]) -> None:
        """Copy what came with the head; the rest will be read into place."""
        here = min(nbytes, self._end - body)
        if landing.data is not None:
            landing.data[landing.filled : landing.filled + here] = self._slab[body : body + here]
        landing.filled += here
        self._start = body + here
        self._into, self._into_left = landing, nbytes - here
        if nbytes == here:
            self._piece_done(landing, messages)
        else:
            # The slab is empty; the next frame has to start at an aligned place in it.
            self._start = self._end = aligned(self._end)

    def _piece_done(self, landing: _Landing, messages: list[Message]) -> None:
        self._into = None
        self.frames += 1
        table = landing.table
        if landing.filled == table.body_nbytes:
            if self._landings.pop(landing.message.id, None) is not landing:
                return  # dropped meanwhile
            if landing.data is not None:
                landing.message.tensors = self._tensors(table, landing.data)
            messages.append(landing.message)

    def _tensors(self, table: Table, body: memoryview) -> list[Tensor]:
        if table.raw:
            return [
                Tensor(spec.dtype.name, spec.shape, body[start : start + nbytes])
                for spec, _, nbytes, start in table.entries
            ]
        tensors = []
        for spec, encoding, nbytes, start in table.entries:
            data = body[start : start + nbytes]
            if encoding:
                if self._decode is None:
                    raise RemoteProtocolError(
                        f"a tensor came in encoding {encoding}, which was not agreed on"
                    )
                out = self._pool.take(spec.nbytes)
                self._decode(encoding, spec, data, out)
                data = out
            tensors.append(Tensor(spec.dtype.name, spec.shape, data))
        return tensors

    def _make_room(self) -> None:
        """See that `buffer()` has room for what is needed next: a new slab once this one is nearly full.

        A slab is not written again from its start: tensors made from it may be alive. It goes back to the
        pool when they are gone.
        """
        held = self._end - self._start
        room = len(self._slab) - self._end
        if self._start + self._need <= len(self._slab) and (room >= _MIN_READ or (held and room)):
            return
        slab = self._pool.take(max(SLAB_NBYTES, aligned(self._need + _FRAME_NBYTES)))
        slab[:held] = self._slab[self._start : self._end]
        self._slab, self._start, self._end = slab, 0, held
