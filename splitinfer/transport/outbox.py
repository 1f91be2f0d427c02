"""Messages out, as pieces of memory in the order in which they go to the kernel. No I/O, no clock.

A tensor is not copied: its owner's memoryview is handed out as it is, unless the whole body is so small that
one buffer costs less than several. A body above CHUNK_NBYTES waits aside and goes out piece by piece when
nothing else is waiting, so a small message is never behind more than one piece of a large one. Messages of
one id never overtake each other. Where the link takes whatever it is given, the pieces are longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from numpy import ndarray

from splitinfer.errors import LimitExceeded, LocalProtocolError
from splitinfer.transport.buffers import aligned
from splitinfer.transport.frames import (
    CHUNK_NBYTES,
    DATA,
    HEAD,
    HEAD_NBYTES,
    LARGE_CHUNK_NBYTES,
    MAGIC,
    REMEMBERED,
    REMEMBERED_NBYTES,
    ZEROS,
    Limits,
    pack,
    pack_frame,
    pack_map,
    pack_table,
)
from splitinfer.transport.parcel import Parcel
from splitinfer.transport.tensors import Array, Tensor, TensorSpec, data_of, is_plain, joinable, spec_of

__all__ = ["Codec", "Outbox", "Piece"]

Piece: TypeAlias = "bytes | memoryview"

# One copy of a body up to this size costs less than a longer list of pieces for the kernel.
JOIN_NBYTES: Final = 16 * 1024
# So many pieces in a row that the kernel took whole, as loopback does: the link is no slower than the copy.
_LARGE_AFTER: Final = 4
_DATA: Final = attrgetter("data")


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

    def agree(self, accepted: frozenset[int], rate: int, /) -> None:
        """The handshake is over: what the peer decodes, and the link's throughput in bytes/s where it knows
        that, so that measuring it is over; 0 is that it does not."""

    def encode(
        self, spec: TensorSpec, data: memoryview, accepted: frozenset[int], /
    ) -> tuple[int, Sequence[Piece], int] | None:
        """(encoding, pieces, their nbytes together) in an encoding the peer accepts; None: as it is."""


class _Small(NamedTuple):
    """How to send a small message with tensors of certain dtypes and shapes.

    `padded`: a place for each tensor and the zeros behind it in turn, None where all of these are empty.
    `bytes_of` makes a tensor something for `join`; None for numpy arrays, which are that themselves.
    """

    table: bytes
    nbytes: int
    padded: list[Any] | None
    bytes_of: Callable[[Any], Any] | None


class _Bulk:
    """A large body under way: its first frame's head until that has gone, the rest of it, what follows it."""

    __slots__ = ("head", "id", "left", "pieces", "then")

    def __init__(self, id: int, head: bytes, pieces: Sequence[Piece], left: int) -> None:
        self.id = id
        self.head = head
        self.pieces = deque(pieces)
        self.left = left
        self.then: deque[tuple[bytes, Sequence[Piece], int]] = deque()

    def take(self, nbytes: int) -> list[Piece]:
        """The next `nbytes` bytes of the body."""
        self.left -= nbytes
        taken: list[Piece] = []
        while nbytes:
            piece = self.pieces.popleft()
            if len(piece) > nbytes:
                view = memoryview(piece)
                self.pieces.appendleft(view[nbytes:])
                piece = view[:nbytes]
            taken.append(piece)
            nbytes -= len(piece)
        return taken


class Outbox:
    """One connection's outgoing half. `nbytes` bytes wait in all, `sent_nbytes` have gone so far; `ready` is
    what goes to the kernel next.

    The handshake sets `limits`, which are the peer's, and `codec` with the encodings it may use, `accepted`.
    `flow` counts the pieces that went whole one after another; the owner sets it to 0 where the kernel took
    nothing at all. Pieces are longer while it is high.
    """

    __slots__ = (
        "_bulk",
        "_bulk_by_id",
        "_small",
        "accepted",
        "codec",
        "flow",
        "limits",
        "nbytes",
        "ready",
        "sent_nbytes",
    )

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.accepted: frozenset[int] = frozenset()
        self.nbytes = 0
        self.sent_nbytes = 0
        self.flow = 0
        self.codec: Codec | None = None
        self._small: dict[Any, _Small] = {}  # by method, dtypes and shapes
        self.ready: list[Piece] = []
        self._bulk: deque[_Bulk] = deque()
        self._bulk_by_id: dict[int, _Bulk] = {}

    # ---- messages

    def send(
        self,
        kind: int,
        id: int,
        method: str,
        tensors: Sequence[Array],
        meta: dict[str, Any] | None,
        value: int = 0,
    ) -> None:
        """Queue a message with tensors. Raises LocalProtocolError, LimitExceeded: then nothing was queued."""
        try:
            # A small message like one before. Whatever surprises here goes the careful way, which says why.
            key: Any = method
            for tensor in tensors:
                key = key, tensor.dtype, tensor.shape
            table, nbytes, padded, bytes_of = self._small[key]
            packed = pack(meta) if meta else b""
            size = HEAD_NBYTES + len(table) + len(packed)
            body: Any = map(bytes_of, tensors) if bytes_of else tensors
            if padded is not None:
                between = padded.copy()
                between[::2] = body
                body = between
            head = HEAD.pack(MAGIC, kind, value, id, len(table), len(packed), nbytes, 0)
            frame = b"".join([head, table, packed, ZEROS[-size & 63], *body])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            self._send_carefully(kind, id, method, tensors, meta, value)
            return
        if (
            self._bulk
            or len(packed) > self.limits.max_meta
            or (bytes_of and len(frame) != aligned(size) + nbytes)
        ):
            self._send_carefully(kind, id, method, tensors, meta, value)
        else:
            self.nbytes += len(frame)
            self.ready.append(frame)

    def _send_carefully(
        self,
        kind: int,
        id: int,
        method: str,
        tensors: Sequence[Array],
        meta: dict[str, Any] | None,
        value: int,
    ) -> None:
        specs = [spec_of(tensor) for tensor in tensors]
        datas = [data_of(tensor) for tensor in tensors]
        table = pack_table(method, [(spec, 0, spec.nbytes) for spec in specs], self.limits)
        packed = pack_map(meta or {}, self.limits.max_meta)
        nbytes = sum(aligned(spec.nbytes) for spec in specs)
        body: list[Piece] = []
        if self.codec is not None and nbytes >= self.codec.min_nbytes:
            table, nbytes = self._encode(self.codec, method, specs, datas, body)
        else:
            for spec, data in zip(specs, datas, strict=True):
                body += data, ZEROS[-spec.nbytes & 63]
            if nbytes <= JOIN_NBYTES and len(table) <= REMEMBERED_NBYTES:
                self._remember(method, tensors, table, specs)
        if sum(map(len, body)) != nbytes:
            raise _misfit()
        limit = self.limits.max_buffered
        if self.nbytes + nbytes > limit:
            raise LimitExceeded(
                f"{self.nbytes:,} bytes wait to be sent already",
                limit_name="max_buffered",
                value=self.nbytes + nbytes,
                limit=limit,
                remedy="Wait for answers before sending more.",
            )
        head = pack_frame(kind, id, table, packed, min(nbytes, CHUNK_NBYTES), value)
        if nbytes <= JOIN_NBYTES:
            self.add(id, b"".join((head, *body)))
        else:
            self.add(id, head, body, nbytes)

    def _encode(
        self, codec: Codec, method: str, specs: list[TensorSpec], datas: list[memoryview], body: list[Piece]
    ) -> tuple[bytes, int]:
        """Put each tensor into `body` in the form that the codec chooses; returns the table and the size."""
        rows, nbytes = [], 0
        for spec, data in zip(specs, datas, strict=True):
            encoded = codec.encode(spec, data, self.accepted)
            encoding, pieces, size = encoded or (0, (data,), data.nbytes)
            rows.append((spec, encoding, size))
            body += *pieces, ZEROS[-size & 63]
            nbytes += aligned(size)
        return pack_table(method, rows, self.limits), nbytes

    def _remember(self, method: str, tensors: Sequence[Array], table: bytes, specs: list[TensorSpec]) -> None:
        if not all(is_plain(tensor) for tensor in tensors):
            return
        key: Any = method
        for tensor in tensors:
            key = key, tensor.dtype, tensor.shape
        if len(self._small) >= REMEMBERED:
            self._small.clear()
        kinds = {type(tensor) for tensor in tensors}
        bytes_of = None if kinds <= {ndarray} else _DATA if kinds == {Tensor} else joinable
        padded = [part for spec in specs for part in (b"", ZEROS[-spec.nbytes & 63])]
        nbytes = sum(aligned(spec.nbytes) for spec in specs)
        self._small[key] = _Small(table, nbytes, padded if any(padded) else None, bytes_of)

    def takes(self, parcel: Parcel) -> bool:
        """Whether it may go as it lies: the peer takes it, and in no other form."""
        if self.codec is not None and parcel.body_nbytes >= self.codec.min_nbytes:
            return False
        return parcel.fits(self.limits) and self.nbytes + len(parcel.frame) <= self.limits.max_buffered

    def post(self, parcel: Parcel, sent: int) -> None:
        """Queue what is left of a parcel, of which `sent` bytes have gone."""
        self.sent_nbytes += sent
        if sent < len(parcel.frame):
            self.add(parcel.id, bytes(parcel.frame[sent:]))

    def add(self, id: int, head: bytes, body: Sequence[Piece] = (), body_nbytes: int = 0) -> None:
        """Queue frames: `head` is a whole frame, or the first one of a message up to its body, of which it
        carries the first CHUNK_NBYTES bytes at most.
        """
        self.nbytes += len(head) + body_nbytes
        if self._bulk_by_id and id in self._bulk_by_id:
            self._bulk_by_id[id].then.append((head, body, body_nbytes))
        elif body_nbytes > CHUNK_NBYTES:
            bulk = self._bulk_by_id[id] = _Bulk(id, head, body, body_nbytes)
            self._bulk.append(bulk)
        else:
            self.ready.append(head)
            self.ready += body

    def drop(self, id: int) -> bool | None:
        """Forget what has not gone yet of a large body, and what was to follow it.

        True where none of it has gone, so that the peer knows nothing of it; None where there was none.
        """
        bulk = self._bulk_by_id.pop(id, None)
        if bulk is None:
            return None
        self._bulk.remove(bulk)
        self.nbytes -= bulk.left + len(bulk.head) + sum(len(head) + n for head, _, n in bulk.then)
        return bool(bulk.head)

    # ---- bytes

    def pieces(self) -> list[Piece]:
        """What to hand to the kernel next, in order; empty where nothing waits. Say `sent` afterwards."""
        if not self.ready and self._bulk:
            self._take_chunk()
        return self.ready

    def sent(self, nbytes: int) -> None:
        """The kernel took the first `nbytes` bytes of `pieces()`."""
        self.sent_nbytes += nbytes
        self.nbytes = left = self.nbytes - nbytes
        pieces = self.ready
        if not left:
            pieces.clear()
            return
        whole = 0
        # Empty pieces go with what is before them: one left alone would never count as sent.
        while whole < len(pieces) and nbytes >= len(pieces[whole]):
            nbytes -= len(pieces[whole])
            whole += 1
        del pieces[:whole]
        if nbytes:
            pieces[0] = memoryview(pieces[0])[nbytes:]
        if pieces:
            self.flow = 0

    def _take_chunk(self) -> None:
        """Move one piece of the large body whose turn it is to where the kernel takes it from."""
        bulk = self._bulk.popleft()
        large = self.flow >= _LARGE_AFTER and not bulk.head  # a head has its piece's size in it already
        self.flow += 1
        nbytes = min(bulk.left, LARGE_CHUNK_NBYTES if large else CHUNK_NBYTES)
        if bulk.head:
            self.ready.append(bulk.head)
            bulk.head = b""
        else:
            head = pack_frame(DATA, bulk.id, body_nbytes=nbytes)
            self.ready.append(head)
            self.nbytes += len(head)
        self.ready += bulk.take(nbytes)
        if bulk.left:
            self._bulk.append(bulk)
            return
        del self._bulk_by_id[bulk.id]
        while bulk.then:
            head, body, body_nbytes = bulk.then.popleft()
            self.nbytes -= len(head) + body_nbytes  # `add` counts it again
            self.add(bulk.id, head, body, body_nbytes)
            follower = self._bulk_by_id.get(bulk.id)
            if follower is not None:
                follower.then = bulk.then
                return


def _misfit() -> LocalProtocolError:
    return LocalProtocolError("a Tensor's data is not of the size that its dtype and shape say")
