"""The wire's frames: fixed head, tensor table, limits; pack and parse. docs/protocol.md is the text.

A frame is a 32-byte head, a tensor table (msgpack), a map called meta (msgpack), zeros up to a multiple of
64, and a body of tensors, each padded to a multiple of 64. So every frame is a multiple of 64 bytes long, and
a receiver that starts at an aligned address finds every tensor aligned.

Tables repeat from call to call, so both directions remember the last few: packing and parsing one is then a
dictionary look-up. What varies from call to call (time left, meta) stands outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from struct import Struct
from typing import Any, Final, NamedTuple

import msgpack
from msgpack import unpackb

from splitinfer.errors import LimitExceeded, LocalProtocolError, RemoteProtocolError
from splitinfer.transport.buffers import ALIGNMENT, aligned
from splitinfer.transport.tensors import DTYPE_BY_CODE, TensorSpec

__all__ = [
    "AUTH",
    "CANCEL",
    "CHUNK_NBYTES",
    "CREDIT",
    "DATA",
    "EMPTY_TABLE",
    "END",
    "ERROR",
    "GOAWAY",
    "HEAD",
    "HEAD_NBYTES",
    "HELLO",
    "ITEM",
    "LARGE_CHUNK_NBYTES",
    "MAGIC",
    "PING",
    "PONG",
    "REMEMBERED",
    "REMEMBERED_NBYTES",
    "REPLY",
    "REQUEST",
    "VERSION",
    "WELCOME",
    "ZEROS",
    "Entry",
    "Limits",
    "Table",
    "pack",
    "pack_frame",
    "pack_map",
    "pack_table",
    "unpack_map",
    "unpack_table",
]

VERSION: Final = 1
MAGIC: Final = b"SI" + bytes((VERSION,))

HELLO: Final = 1  # handshake, first each way
AUTH: Final = 2  # handshake, client's second
WELCOME: Final = 3  # handshake, server's second
ERROR: Final = 4  # the call failed; with id 0 the connection did
GOAWAY: Final = 5  # no new calls; those in flight will be answered
PING: Final = 6
PONG: Final = 7
REQUEST: Final = 8
REPLY: Final = 9  # the one answer
ITEM: Final = 10  # one answer of a stream
END: Final = 11  # a stream's end
DATA: Final = 12  # more of a body
CANCEL: Final = 13
CREDIT: Final = 14  # so many more ITEMs may come

# "SI" and the version, kind, value (ms left, credit), id, table nbytes, meta nbytes, body nbytes, zero
HEAD: Final = Struct("<3sBIQIIII")
HEAD_NBYTES: Final = HEAD.size
# A body larger than this travels in pieces, between which other frames pass.
CHUNK_NBYTES: Final = 256 * 1024
# The later ones where the kernel takes whatever it is given, so that nobody waits for long behind them.
LARGE_CHUNK_NBYTES: Final = 1 << 20
ZEROS: Final = tuple(bytes(n) for n in range(ALIGNMENT))

REMEMBERED: Final = 256
REMEMBERED_NBYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side accepts from the other, in bytes and counts. Checked before memory is taken."""

    max_table: int = 16 << 10  # method and tensor table of one frame
    max_meta: int = 256 << 10  # msgpack map of one frame
    max_body: int = 1 << 30  # tensors of one message, as sent and as decoded
    max_tensors: int = 64
    max_rank: int = 8
    max_calls: int = 1024  # in flight on one connection
    max_buffered: int = 4 << 30  # bodies in flight, or waiting to be sent, on one connection


class Entry(NamedTuple):
    """One tensor in a body: `nbytes` as sent, from `start`; encoding 0 is the tensor's own bytes."""

    spec: TensorSpec
    encoding: int
    nbytes: int
    start: int


class Table(NamedTuple):
    """A parsed tensor table: `body_nbytes` on the wire with padding, `nbytes` of memory once decoded."""

    method: str
    entries: tuple[Entry, ...]
    body_nbytes: int
    nbytes: int
    raw: bool


EMPTY_TABLE: Final = Table("", (), 0, 0, True)

# msgpack's own errors are ValueErrors; text that is not UTF-8 and a cut end are too.
_DAMAGED: Final = (ValueError, msgpack.UnpackException, RecursionError)
_packer = msgpack.Packer(use_bin_type=True)
pack: Final = _packer.pack


def pack_map(content: dict[str, Any], limit: int) -> bytes:
    """A meta map as msgpack, b"" for an empty one.

    Raises LocalProtocolError for what msgpack lacks (arrays belong among the tensors), LimitExceeded above
    `limit` bytes.
    """
    if not content:
        return b""
    try:
        packed: bytes = _packer.pack(content)
    except (TypeError, ValueError, OverflowError) as error:
        _packer.reset()
        raise LocalProtocolError(
            f"meta cannot be packed: {error}", remedy="Use None, bool, int, float, str, bytes, list and dict."
        ) from None
    if len(packed) > limit:
        raise _over("max_meta", len(packed), limit)
    return packed


def unpack_map(data: bytes | memoryview) -> dict[str, Any]:
    """Undo `pack_map`. Raises RemoteProtocolError for anything but one map with text keys."""
    try:
        content = unpackb(data, max_ext_len=0, ext_hook=_no_extension)
    except _DAMAGED as error:
        raise _damaged(error) from None
    if type(content) is not dict:
        raise RemoteProtocolError("a frame's meta is not a map")
    return content


def _no_extension(code: int, data: bytes) -> None:
    raise RemoteProtocolError(f"a frame's msgpack holds extension type {code}")


def pack_table(method: str, tensors: Sequence[tuple[TensorSpec, int, int]], limits: Limits) -> bytes:
    """A table for (spec, encoding, nbytes on the wire) each; b"" for no method and no tensors."""
    if not method and not tensors:
        return b""
    if len(tensors) > limits.max_tensors:
        raise _over("max_tensors", len(tensors), limits.max_tensors)
    for spec, _, _ in tensors:
        if len(spec.shape) > limits.max_rank:
            raise _over("max_rank", len(spec.shape), limits.max_rank)
    total = sum(max(aligned(nbytes), aligned(spec.nbytes)) for spec, _, nbytes in tensors)
    if total > limits.max_body:
        raise _over("max_body", total, limits.max_body)
    rows = [[spec.dtype.code, encoding, nbytes, *spec.shape] for spec, encoding, nbytes in tensors]
    packed: bytes = _packer.pack([method, rows])
    if len(packed) > limits.max_table:
        raise _over("max_table", len(packed), limits.max_table)
    return packed


def unpack_table(data: memoryview, limits: Limits) -> Table:
    """Undo `pack_table`, believing nothing: raises RemoteProtocolError for what breaks a rule or a limit."""
    try:
        content = unpackb(data, max_ext_len=0, ext_hook=_no_extension)
    except _DAMAGED as error:
        raise _damaged(error) from None
    if (
        type(content) is not list
        or len(content) != 2
        or type(content[0]) is not str
        or type(content[1]) is not list
    ):
        raise RemoteProtocolError("a tensor table is not [method, tensors]")
    method, rows = content
    if len(rows) > limits.max_tensors:
        raise RemoteProtocolError(f"a message of {len(rows)} tensors; the limit is {limits.max_tensors}")
    entries: list[Entry] = []
    start = total = 0
    for row in rows:
        entry = _entry(row, start, limits)
        entries.append(entry)
        start += aligned(entry.nbytes)
        total += aligned(entry.spec.nbytes)
        if max(start, total) > limits.max_body:
            raise RemoteProtocolError(
                f"a message of {max(start, total)} bytes; the limit is {limits.max_body}"
            )
    return Table(method, tuple(entries), start, total, all(entry.encoding == 0 for entry in entries))


def _entry(row: Any, start: int, limits: Limits) -> Entry:
    if type(row) is not list or not 3 <= len(row) <= 3 + limits.max_rank:
        raise RemoteProtocolError("a tensor's row in the table is not [dtype, encoding, nbytes, dimensions]")
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in row):
        raise RemoteProtocolError("a tensor's row in the table holds something other than counts")
    code, encoding, nbytes, *shape = row
    dtype = DTYPE_BY_CODE.get(code)
    if dtype is None:
        raise RemoteProtocolError(f"unknown dtype {code}")
    spec = TensorSpec(dtype, tuple(shape))
    # Python's integers do not overflow; numpy's do, so a zero must not hide a huge other dimension.
    if prod(size or 1 for size in shape) * dtype.itemsize > max(limits.max_body, 16):
        raise RemoteProtocolError(f"a tensor of shape {shape} is larger than {limits.max_body} bytes")
    if nbytes > spec.nbytes or (encoding == 0 and nbytes != spec.nbytes):
        raise RemoteProtocolError(f"{nbytes} bytes for a {dtype.name} tensor of shape {shape}")
    return Entry(spec, encoding, nbytes, start)


def pack_frame(
    kind: int, id: int = 0, table: bytes = b"", meta: bytes = b"", body_nbytes: int = 0, value: int = 0
) -> bytes:
    """A frame up to its body, padded. `body_nbytes` is the size of the body in this frame."""
    head = HEAD.pack(MAGIC, kind, value, id, len(table), len(meta), body_nbytes, 0)
    return b"".join((head, table, meta, ZEROS[-(HEAD_NBYTES + len(table) + len(meta)) & 63]))


def _damaged(error: Exception) -> RemoteProtocolError:
    return RemoteProtocolError(f"a frame's msgpack is damaged: {type(error).__name__}")


def _over(name: str, value: int, limit: int) -> LimitExceeded:
    return LimitExceeded(
        f"{name} is {limit:,}, this would be {value:,}; nothing was sent",
        limit_name=name,
        value=value,
        limit=limit,
        remedy=f"Send less at once, or raise {name} on both sides.",
    )
