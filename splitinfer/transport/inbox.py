"""Bytes in, messages out: where each byte lands, and when a message is whole. No I/O, no clock.

Whoever reads the stream puts the next bytes into `buffer` and says with `received` how many. Small frames
gather in a slab and their tensors are views on it. A larger body gets a buffer of its own, and from then on
its bytes are read straight into it: nothing is copied but what arrived together with the head. Bodies in
pieces (DATA) may interleave with other frames.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple, Protocol

from splitinfer.errors import RemoteProtocolError, VersionMismatch
from splitinfer.transport.buffers import POOL, BufferPool, aligned
from splitinfer.transport.frames import (
    CHUNK_NBYTES,
    CREDIT,
    DATA,
    EMPTY_TABLE,
    ERROR,
    HEAD,
    HEAD_NBYTES,
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
from splitinfer.transport.messages import Message
from splitinfer.transport.tensors import Tensor, TensorSpec

__all__ = ["Decoder", "Inbox"]

SLAB_NBYTES: Final = 64 * 1024
# A body up to this size is waited for in the slab; of a larger one at most a slab's worth is copied once.
SMALL_NBYTES: Final = 24 * 1024
_MIN_READ: Final = 8 * 1024
_FULL: Final = SLAB_NBYTES - _MIN_READ
_FRAME_NBYTES: Final = 64  # the shortest frame
_HEAD_START: Final = Struct("<4sIQI")  # magic and kind, value, id, table nbytes
_LEADS: Final = frozenset(MAGIC + bytes((kind,)) for kind in (REQUEST, REPLY, ITEM))


class Decoder(Protocol):
    """Undoes an encoding other than 0: fills `out` (`spec.nbytes` bytes) from `wire`.

    Raises RemoteProtocolError for an encoding not agreed on, and where `wire` does not yield exactly `out`.
    """

    def __call__(self, encoding: int, spec: TensorSpec, wire: memoryview, out: memoryview, /) -> None: ...


class _Landing:
    """A body under way: `data` takes it, or is None where it was refused and its bytes go nowhere."""

    __slots__ = ("data", "dropped", "filled", "message", "table")

    def __init__(self, message: Message, table: Table, data: memoryview | None) -> None:
        self.message = message
        self.table = table
        self.data = data
        self.filled = 0
        self.dropped = False


class _Known(NamedTuple):
    """What sizes and table of a small frame say. The places are within the frame."""

    frame_nbytes: int
    meta: slice | None
    method: str
    nbytes: int
    tensors: tuple[tuple[str, tuple[int, ...], slice], ...]  # dtype, shape, place


class Inbox:
    """One connection's incoming half. `buffer` is where the next bytes belong; it is never empty.

    `admit(message)` is asked before memory is taken for a body that does not fit the slab: False means that
    it is to be skipped; it raises to end the connection.
    """

    def __init__(
        self,
        limits: Limits,
        admit: Callable[[Message], bool],
        *,
        decode: Decoder | None = None,
        pool: BufferPool = POOL,
        make: type[Message] = Message,
    ) -> None:
        self.nbytes = 0  # received in all
        self._admit = admit
        self._decode = decode
        self._make = make
        self._pool = pool
        self._slab = pool.take(SLAB_NBYTES)
        self._start = 0  # of the first frame not yet parsed, a multiple of 64
        self._end = 0  # of the bytes received
        self._need = HEAD_NBYTES  # bytes of that frame without which looking again is of no use
        self._known: dict[bytes, _Known] = {}  # by what stands between a head's id and the meta
        self._landings: dict[int, _Landing] = {}
        self._into: _Landing | None = None  # whose body the next bytes are
        self._into_left = 0
        self.buffer = self._slab
        self.allow(limits, handshake_only=False)

    def allow(self, limits: Limits, *, handshake_only: bool) -> None:
        """What is accepted from now on."""
        self._limits = limits
        self._last_kind = ERROR if handshake_only else CREDIT

    @property
    def unfinished(self) -> bool:
        """True where something has begun and is not whole: a frame, or a body in pieces."""
        return self._start < self._end or self._into is not None or bool(self._landings)

    def received(self, nbytes: int) -> list[Message]:
        """`nbytes` bytes were put into `buffer`; returns the messages that are whole now, in order.

        Raises RemoteProtocolError, VersionMismatch, or what `admit` raises: the connection is beyond repair.
        """
        self.nbytes += nbytes
        if not self._landings:
            slab, start = self._slab, self._start
            end = self._end + nbytes
            lead, value, id, table_nbytes = _HEAD_START.unpack_from(slab, start)
            known = self._known.get(slab[start + 16 : start + HEAD_NBYTES + table_nbytes].tobytes())
            if known is not None and known[0] == end - start and lead in _LEADS:
                # One small frame like one before: what was checked then need not be checked again.
                _, where, method, size, places = known
                frame = slab[start:end]
                meta = unpack_map(frame[where]) if where else {}
                tensors = [Tensor(dtype, shape, frame[place]) for dtype, shape, place in places]
                self._start = self._end = end
                self._need = HEAD_NBYTES
                if end <= _FULL:
                    self.buffer = slab[end:]
                else:
                    self._aim()
                return [self._make(lead[3], id, value, meta, tensors, method, size)]
        messages: list[Message] = []
        if self._into is not None:
            self._received_piece(self._into, nbytes, messages)
        else:
            self._end += nbytes
            while self._end - self._start >= self._need and self._parse(messages):
                pass
        self._aim()
        return messages

    def drop(self, id: int) -> bool:
        """Forget a body under way: no more of it will come. True if there was one."""
        landing = self._landings.get(id)
        if landing is None:
            return False
        if landing is self._into:
            landing.dropped = True  # what has come of this piece is still to be skipped
        else:
            del self._landings[id]
        return True

    def _parse(self, messages: list[Message]) -> bool:
        """Take one frame out of the slab. False where more bytes are needed; `_need` then says how many."""
        start, slab = self._start, self._slab
        magic, kind, value, id, table_nbytes, meta_nbytes, body_nbytes, zero = HEAD.unpack_from(slab, start)
        if magic != MAGIC:
            raise _stranger(magic)
        if (
            zero
            or not 0 < kind <= self._last_kind
            or table_nbytes > self._limits.max_table
            or meta_nbytes > self._limits.max_meta
            or body_nbytes > CHUNK_NBYTES
            or body_nbytes & 63
        ):
            sizes = f"{table_nbytes}, {meta_nbytes} and {body_nbytes} bytes"
            raise RemoteProtocolError(f"a frame of kind {kind} with {sizes} is not allowed here")
        meta_start = start + HEAD_NBYTES + table_nbytes
        meta_end = meta_start + meta_nbytes
        body = (meta_end + 63) & -64
        if self._end < body:
            self._need = body - start
            return False
        if REQUEST <= kind <= ITEM:
            table = EMPTY_TABLE
            if table_nbytes:
                table = unpack_table(slab[start + HEAD_NBYTES : meta_start], self._limits)
            small = table.raw and body_nbytes == table.body_nbytes and body_nbytes <= SMALL_NBYTES
            if small and self._end < body + body_nbytes:
                self._need = body + body_nbytes - start
                return False
            meta = unpack_map(slab[meta_start:meta_end]) if meta_nbytes else {}
            message = self._make(kind, id, value, meta, (), table.method, table.nbytes)
            if small:
                self._take_small(message, table, body, messages)
                if table_nbytes <= REMEMBERED_NBYTES:
                    self._remember(slab[start + 16 : meta_start].tobytes(), meta_nbytes, table)
            else:
                self._land(message, table, body, body_nbytes, messages)
        elif kind == DATA:
            if table_nbytes or meta_nbytes:
                raise RemoteProtocolError("a piece of a body with more than a body")
            self._land_more(id, body, body_nbytes, messages)
        else:
            if table_nbytes or body_nbytes:
                raise RemoteProtocolError(f"a frame of kind {kind} with tensors")
            meta = unpack_map(slab[meta_start:meta_end]) if meta_nbytes else {}
            message = self._make(kind, id, value, meta, (), "", 0)
            if kind <= WELCOME:
                message.packed_meta = slab[meta_start:meta_end].tobytes()
            messages.append(message)
            self._start = body
        self._need = HEAD_NBYTES
        return True

    def _take_small(self, message: Message, table: Table, body: int, messages: list[Message]) -> None:
        """A message that is whole in the slab."""
        if message.id in self._landings:
            raise _interleaved()
        slab = self._slab
        message.tensors = [
            Tensor(spec.dtype.name, spec.shape, slab[body + first : body + first + nbytes])
            for spec, _, nbytes, first in table.entries
        ]
        messages.append(message)
        self._start = body + table.body_nbytes

    def _remember(self, key: bytes, meta_nbytes: int, table: Table) -> None:
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        start = 16 + len(key)
        end = start + meta_nbytes
        body = (end + 63) & -64
        tensors = tuple(
            (spec.dtype.name, spec.shape, slice(body + first, body + first + nbytes))
            for spec, _, nbytes, first in table.entries
        )
        meta = slice(start, end) if meta_nbytes else None
        self._known[key] = _Known(body + table.body_nbytes, meta, table.method, table.nbytes, tensors)

    def _land(self, message: Message, table: Table, body: int, nbytes: int, messages: list[Message]) -> None:
        """The first piece of a body that gets a buffer of its own."""
        if message.id in self._landings:
            raise _interleaved()
        if nbytes > table.body_nbytes or (nbytes < table.body_nbytes and nbytes != CHUNK_NBYTES):
            raise RemoteProtocolError(f"a first piece of {nbytes} bytes for a body of {table.body_nbytes}")
        message.admitted = self._admit(message)
        data = self._pool.take(table.body_nbytes) if message.admitted else None
        landing = self._landings[message.id] = _Landing(message, table, data)
        self._begin_piece(landing, body, nbytes, messages)

    def _land_more(self, id: int, body: int, nbytes: int, messages: list[Message]) -> None:
        """Another piece."""
        landing = self._landings.get(id)
        if landing is None:
            raise RemoteProtocolError("a piece of a body that nothing announced")
        left = landing.table.body_nbytes - landing.filled
        if nbytes != min(left, CHUNK_NBYTES):
            raise RemoteProtocolError(f"a piece of {nbytes} bytes where {left} are missing")
        self._begin_piece(landing, body, nbytes, messages)

    def _begin_piece(self, landing: _Landing, body: int, nbytes: int, messages: list[Message]) -> None:
        """Copy what came with the head; the rest will be read into place."""
        here = min(nbytes, self._end - body)
        if landing.data is not None:
            landing.data[landing.filled : landing.filled + here] = self._slab[body : body + here]
        landing.filled += here
        self._start = body + here
        if here == nbytes:
            self._piece_done(landing, messages)
            return
        self._into, self._into_left = landing, nbytes - here
        # The slab is empty; the next frame has to start at an aligned place in it.
        self._start = self._end = aligned(self._end)

    def _received_piece(self, into: _Landing, nbytes: int, messages: list[Message]) -> None:
        into.filled += nbytes
        self._into_left -= nbytes
        if not self._into_left:
            self._piece_done(into, messages)

    def _piece_done(self, landing: _Landing, messages: list[Message]) -> None:
        self._into = None
        if landing.filled < landing.table.body_nbytes and not landing.dropped:
            return
        del self._landings[landing.message.id]
        if landing.dropped:
            return
        if landing.data is not None:
            landing.message.tensors = self._decoded(landing.table, landing.data)
        messages.append(landing.message)

    def _decoded(self, table: Table, body: memoryview) -> list[Tensor]:
        tensors = []
        for spec, encoding, nbytes, start in table.entries:
            data = body[start : start + nbytes]
            if encoding:
                if self._decode is None:
                    raise RemoteProtocolError(f"a tensor in encoding {encoding}, which was not agreed on")
                wire, data = data, self._pool.take(spec.nbytes)
                self._decode(encoding, spec, wire, data)
            tensors.append(Tensor(spec.dtype.name, spec.shape, data))
        return tensors

    def _aim(self) -> None:
        """Set `buffer`. A new slab once this one is nearly full or too short for the frame that has begun.

        A slab is not written again from its start: tensors made from it may be alive. It goes back to the
        pool when they are gone.
        """
        into = self._into
        if into is not None and into.data is not None:
            self.buffer = into.data[into.filled : into.filled + self._into_left]
            return
        held, size = self._end - self._start, len(self._slab)
        if size - self._end < (1 if held else _MIN_READ) or self._start + self._need > size:
            slab = self._pool.take(max(SLAB_NBYTES, aligned(self._need + _FRAME_NBYTES)))
            slab[:held] = self._slab[self._start : self._end]
            self._slab, self._start, self._end = slab, 0, held
        if into is not None:
            self.buffer = self._slab[self._end : self._end + self._into_left]
        elif self._landings:
            # Between the pieces of a large body read one head at a time, so that the next piece's bytes go
            # where they belong and not through the slab.
            self.buffer = self._slab[self._end : max(self._start + self._need, self._end + _FRAME_NBYTES)]
        else:
            self.buffer = self._slab[self._end :]


def _interleaved() -> RemoteProtocolError:
    return RemoteProtocolError("a message began before the one of the same id was whole")


def _stranger(magic: bytes) -> RemoteProtocolError | VersionMismatch:
    if magic[:2] != MAGIC[:2]:
        return RemoteProtocolError(
            "the peer does not speak splitinfer's protocol", remedy="Check host and port."
        )
    return VersionMismatch(
        f"the peer speaks version {magic[2]} of the wire, this side {VERSION}",
        ours=VERSION,
        theirs=magic[2],
        remedy="Install the same version of splitinfer on both sides.",
    )
