"""Bytes in, messages out: where each byte lands, and when a message is whole. No I/O, no clock.

Whoever reads the stream puts the next bytes into `buffer()` and says with `received` how many. Small frames
gather in a slab and their tensors are views on it. A larger body gets a buffer of its own, and from then on
its bytes are read straight into it: nothing is copied but what arrived together with the head. Bodies in
pieces (DATA) may interleave with other frames.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, Final, NamedTuple, Protocol

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
    LARGE_CHUNK_NBYTES,
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
_FRAME_NBYTES: Final = 64  # the shortest frame
# A frame of a known layout is taken apart in one go: its kind with the magic as one number, value, id, what
# identifies the layout, and the meta. The last two have the sizes of that layout.
_KNOWN_FRAME: Final = "<IIQ{}s{}s"
_KINDS: Final = {int.from_bytes(MAGIC + bytes((kind,)), "little"): kind for kind in (REQUEST, REPLY, ITEM)}
_LAYOUT_START: Final = 16  # in a head: what identifies a layout is between the id and the meta
_PLAIN: Final = frozenset((type(None), bool, int, float, str, bytes))


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


class _Layout(NamedTuple):
    """What sizes and table of a small frame say, learnt from one that was checked."""

    frame_nbytes: int
    key: bytes  # the bytes that say so
    fields: Callable[[memoryview, int], tuple[Any, ...]]  # as `_KNOWN_FRAME`
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]  # dtype, shape, start and end in the frame
    method: str
    nbytes: int


_NO_LAYOUT: Final = _Layout(1 << 62, b"", Struct("").unpack_from, (), "", 0)


class Inbox:
    """One connection's incoming half.

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
        self._layouts: dict[bytes, _Layout] = {}
        self._layout = _NO_LAYOUT  # the last one that came
        self._metas: dict[bytes, dict[str, Any]] = {b"": {}}
        self._landings: dict[int, _Landing] = {}
        self._into: _Landing | None = None  # whose body the next bytes are
        self._into_left = 0
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
        """`nbytes` bytes were put into `buffer()`; returns the messages that are whole now, in order.

        Raises RemoteProtocolError, VersionMismatch, or what `admit` raises: the connection is beyond repair.
        """
        self.nbytes += nbytes
        messages: list[Message] = []
        if self._into is not None:
            self._received_piece(self._into, nbytes, messages)
            return messages
        self._end += nbytes
        while self._take_known(messages) and self._parse(messages):
            pass
        return messages

    def _take_known(self, messages: list[Message]) -> bool:
        """Take frames out of the slab that are laid out like the last small one: what was checked then need
        not be checked again. False where nothing is left to look at.
        """
        start, end = self._start, self._end
        if not self._landings:
            slab, first = self._slab, start
            frame_nbytes, layout, fields, places, method, nbytes = self._layout
            while end - start >= frame_nbytes:
                lead, value, id, key, packed = fields(slab, start)
                kind = _KINDS.get(lead)
                if key != layout or kind is None:
                    break
                tensors = []
                for dtype, shape, begin, stop in places:
                    tensors.append(Tensor(dtype, shape, slab[start + begin : start + stop]))
                meta = self._metas.get(packed)
                meta = self._new_meta(kind, packed) if meta is None else meta.copy()
                messages.append(self._make(kind, id, value, meta, tensors, method, nbytes))
                start += frame_nbytes
            if start > first:
                self._start, self._need = start, HEAD_NBYTES
        return end - start >= self._need

    def _new_meta(self, kind: int, packed: bytes) -> dict[str, Any]:
        """Unpack a meta, and remember it: those of calls repeat, where those of answers rarely do."""
        meta = unpack_map(packed)
        flat = all(type(value) in _PLAIN for value in meta.values())
        if kind == REQUEST and flat and len(packed) <= REMEMBERED_NBYTES:
            if len(self._metas) > REMEMBERED:
                self._metas = {b"": {}}
            self._metas[packed] = meta.copy()
        return meta

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
            or body_nbytes > LARGE_CHUNK_NBYTES
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
            key = slab[start + _LAYOUT_START : meta_start].tobytes()
            layout = self._layouts.get(key)
            if layout is not None and not self._landings:
                self._layout = layout
                self._need = layout.frame_nbytes
                return self._end - start >= self._need
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
                    self._remember(key, meta_nbytes, table)
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
        if len(self._layouts) >= REMEMBERED:
            self._layouts.clear()
        body = (_LAYOUT_START + len(key) + meta_nbytes + 63) & -64
        tensors = tuple(
            (spec.dtype.name, spec.shape, body + first, body + first + nbytes)
            for spec, _, nbytes, first in table.entries
        )
        fields = Struct(_KNOWN_FRAME.format(len(key), meta_nbytes)).unpack_from
        layout = _Layout(body + table.body_nbytes, key, fields, tensors, table.method, table.nbytes)
        self._layouts[key] = self._layout = layout

    def _land(self, message: Message, table: Table, body: int, nbytes: int, messages: list[Message]) -> None:
        """The first piece of a body that gets a buffer of its own."""
        if message.id in self._landings:
            raise _interleaved()
        if nbytes != min(table.body_nbytes, CHUNK_NBYTES):
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
        if nbytes not in (min(left, CHUNK_NBYTES), min(left, LARGE_CHUNK_NBYTES)):
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

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty.

        A new slab once this one is nearly full or too short for the frame that has begun. A slab is not
        written again from its start: tensors made from it may be alive. It goes back to the pool when they
        are gone.
        """
        into = self._into
        if into is not None and into.data is not None:
            return into.data[into.filled : into.filled + self._into_left]
        held, size = self._end - self._start, len(self._slab)
        if size - self._end < (1 if held else _MIN_READ) or self._start + self._need > size:
            slab = self._pool.take(max(SLAB_NBYTES, aligned(self._need + _FRAME_NBYTES)))
            slab[:held] = self._slab[self._start : self._end]
            self._slab, self._start, self._end = slab, 0, held
        if into is not None:
            return self._slab[self._end : self._end + self._into_left]
        if self._landings:
            # Between the pieces of a large body read one head at a time, so that the next piece's bytes go
            # where they belong and not through the slab.
            return self._slab[self._end : max(self._start + self._need, self._end + _FRAME_NBYTES)]
        return self._slab[self._end :]


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
