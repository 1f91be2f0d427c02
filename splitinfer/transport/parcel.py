"""A message laid out before its tensors are there: they are written where they go onto the wire.

A small call like the one before differs from it in tensors, id and time left only. Whoever computes the
tensors writes them into the frame, where they need not be copied again, and may hand the frame to the kernel
too: from C, within the call that computed them, with nothing of Python between the last product and the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any, Final

from splitinfer.errors import LimitExceeded
from splitinfer.transport.buffers import POOL, aligned
from splitinfer.transport.frames import (
    HEAD_NBYTES,
    REPLY,
    REQUEST,
    Limits,
    pack_frame,
    pack_map,
    pack_table,
)
from splitinfer.transport.tensors import Tensor, spec_named

__all__ = ["NUMBER", "PARCEL_NBYTES", "Parcel", "Posted"]

PARCEL_NBYTES: Final = 32 * 1024  # of tensors: larger ones gain nothing
NUMBER: Final = 0xFFFF_FFFF  # as the last value of a parcel's meta: a number that will be written there

_STAMP: Final = Struct("<IQ")  # a head's value and id
_STAMP_START: Final = 4


class Parcel:
    """A call's request, or with no method an answer: tensors of `specs` (dtype by name, shape), and `meta`.

    Write to `tensors`, which are views on `frame`; once it is posted it is free for the next message.
    `number` is the last value of `meta`, where that was given as NUMBER: four bytes, big-endian.

    Raises LocalProtocolError for dtypes that cannot be sent and meta that cannot be packed, LimitExceeded
    beyond PARCEL_NBYTES.
    """

    __slots__ = (
        "_fits",
        "_meta_nbytes",
        "_table",
        "body_nbytes",
        "frame",
        "id",
        "method",
        "number",
        "owner",
        "tensors",
    )

    def __init__(
        self,
        method: str,
        specs: Sequence[tuple[str, tuple[int, ...]]],
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.method = method
        self.id = 0
        self.owner: object = None
        self._fits: Limits | None = None  # the last that it was found to keep within
        self._table = [spec_named(dtype, shape) for dtype, shape in specs]
        self.body_nbytes = sum(aligned(spec.nbytes) for spec in self._table)
        if self.body_nbytes > PARCEL_NBYTES:
            raise LimitExceeded(
                f"a parcel holds {PARCEL_NBYTES:,} bytes, not {self.body_nbytes:,}",
                limit_name="PARCEL_NBYTES",
                value=self.body_nbytes,
                limit=PARCEL_NBYTES,
                remedy="Send it as an ordinary call.",
            )
        table, packed = self._pack(Limits()), pack_map(meta or {}, Limits().max_meta)
        self._meta_nbytes = len(packed)
        head = pack_frame(REQUEST if method else REPLY, 0, table, packed, self.body_nbytes)
        self.frame = POOL.take(len(head) + self.body_nbytes)
        self.frame[:] = head + bytes(self.body_nbytes)
        meta_end = HEAD_NBYTES + len(table) + len(packed)
        self.number = self.frame[meta_end - 4 : meta_end]
        start, self.tensors = len(head), list[Tensor]()
        for spec in self._table:
            data = self.frame[start : start + spec.nbytes]
            self.tensors.append(Tensor(spec.dtype.name, spec.shape, data))
            start += aligned(spec.nbytes)

    def stamp(self, owner: object, id: int, value: int) -> None:
        """Write the id, which is one of the connection `owner`, and for a request the milliseconds left."""
        self.owner = owner
        self.id = id
        _STAMP.pack_into(self.frame, _STAMP_START, value, id)

    def fits(self, limits: Limits) -> bool:
        """Whether a peer of these limits takes it."""
        if limits is not self._fits:
            try:
                self._pack(limits)
            except LimitExceeded:
                return False
            if self._meta_nbytes > limits.max_meta:
                return False
            self._fits = limits
        return True

    def _pack(self, limits: Limits) -> bytes:
        return pack_table(self.method, [(spec, 0, spec.nbytes) for spec in self._table], limits)


class Posted:
    """What a handler answers with when `call.stamp` gave it leave: the answer is in `parcel`, and the kernel
    took its first `sent` bytes."""

    __slots__ = ("parcel", "sent")

    def __init__(self, parcel: Parcel, sent: int = 0) -> None:
        self.parcel = parcel
        self.sent = sent
