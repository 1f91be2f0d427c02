"""lz4 on tensors: what to compress, when, and how the bytes lie. Never for what does not shrink.

Pure functions and one policy object on memoryviews: no socket, no event loop.

Layout of a compressed tensor (docs/protocol.md, "Compressed tensors"). The tensor's bytes are cut into blocks
of `BLOCK_NBYTES`, the last one shorter. With codec `LZ4` a block is one run of bytes; with `LZ4_PLANES` it is
`itemsize` runs, the first holding every item's lowest byte, the last every item's highest (the byte-plane
shuffle of Blosc and HDF5). A run is a little-endian u32 and its bytes: the u32's low 31 bits count the bytes
that follow, its top bit says that they are stored as they are. Otherwise they are one raw lz4 block.

Nothing in there says how large the result is: the reader computes it from the tensor's shape and dtype, block
by block, and refuses a run that yields one byte more or less.

The shuffle helps because in floating point only the plane of the exponents repeats. Planes stand alone so
that the mantissas, which never shrink, are stored without lz4 having to try.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final, Literal, NamedTuple

import lz4.block
import numpy as np
import numpy.typing as npt

from splitinfer.errors import RemoteProtocolError, UsageError

__all__ = [
    "BLOCK_NBYTES",
    "LZ4",
    "LZ4_PLANES",
    "MIN_NBYTES",
    "Compressor",
    "Encoded",
    "Mode",
    "compress",
    "decompress",
    "max_encoded_nbytes",
]

_Bytes = npt.NDArray[np.uint8]
Mode = Literal["off", "on", "auto"]

LZ4: Final = 1
LZ4_PLANES: Final = 2

# Large enough for lz4's 64 KiB window to be worth filling, small enough to stay in a core's L2 with its
# planes.
BLOCK_NBYTES: Final = 256 * 1024
# Below this a tensor shares a packet with its header: nothing is saved.
MIN_NBYTES: Final = 2048

_STORED: Final = 1 << 31
_PLANE_SIZES: Final = (2, 4, 8)

_SAMPLE_PIECES: Final = 3
_SAMPLE_PIECE_NBYTES: Final = 8192
# Less than this saved is within the noise of a link.
_MIN_SAVED: Final = 0.03
# The part of the sending time that may go into attempts that save nothing. The promise is 5 %; the rest is
# for what the clock does not see.
_VAIN_SHARE: Final = 0.03
# Sending time is reckoned at this rate (bytes/s) where the link's own is not known: faster than any loopback.
_FASTEST_RATE: Final = 10e9
# Where nobody measured the link, suppose a gigabit: slower ones gain more than was reckoned.
_SUPPOSED_RATE: Final = 125e6
# Undoing costs about this part of doing (measured: 0.6 GB/s against 2.3 GB/s).
_UNDO_SHARE: Final = 0.3
# Credit is capped so that a long raw stretch does not pay for a long vain one at once.
_MAX_CREDIT_SECONDS: Final = 0.005
_FIRST_COST_SECONDS: Final = 100e-6


class Encoded(NamedTuple):
    """A compressed tensor: `parts` follow each other on the wire and are `nbytes` long together."""

    codec: int
    parts: list[memoryview]
    nbytes: int


def max_encoded_nbytes(raw_nbytes: int) -> int:
    """Bytes that a compressed tensor can have at most: a sender never sends as many as the raw tensor has."""
    return max(raw_nbytes - 1, 0)


def compress(data: memoryview, itemsize: int, codec: int, *, max_nbytes: int | None = None) -> Encoded | None:
    """Compress the bytes of one tensor; None as soon as the result would exceed `max_nbytes` (default: raw -
    1).

    `data` is contiguous, of any format; its length is a multiple of `itemsize` (1, 2, 4 or 8). Parts that lz4
    cannot shrink are stored: with `LZ4` those are views of `data` itself.
    """
    block = np.frombuffer(data, np.uint8)
    limit = max_encoded_nbytes(block.nbytes) if max_nbytes is None else max_nbytes
    parts: list[memoryview] = []
    nbytes = 0
    for start in range(0, block.nbytes, BLOCK_NBYTES):
        for run in _runs(block[start : start + BLOCK_NBYTES], itemsize, codec):
            packed = lz4.block.compress(run, store_size=False)
            stored = len(packed) >= run.nbytes
            body = run.data if stored else memoryview(packed)
            parts.append(memoryview((body.nbytes | (_STORED if stored else 0)).to_bytes(4, "little")))
            parts.append(body)
            nbytes += 4 + body.nbytes
            if nbytes > limit:
                return None
    return Encoded(codec, parts, nbytes) if parts else None


def decompress(encoded: memoryview, out: memoryview, itemsize: int, codec: int) -> None:
    """Undo `compress` into `out`, whose length comes from the tensor's shape and dtype.

    Memory beyond `out`: two blocks. Raises RemoteProtocolError where `encoded` does not yield exactly `out`;
    `out` then holds anything.
    """
    if codec not in (LZ4, LZ4_PLANES) or (codec == LZ4_PLANES and itemsize not in _PLANE_SIZES):
        raise RemoteProtocolError(f"a tensor of {itemsize}-byte items came with unknown codec {codec}")
    source = encoded.cast("B") if encoded.format != "B" or encoded.ndim != 1 else encoded
    target = np.frombuffer(out, np.uint8)
    position = 0
    for start in range(0, target.nbytes, BLOCK_NBYTES):
        block = target[start : start + BLOCK_NBYTES]
        if codec == LZ4:
            run, position = _read_run(source, position, block.nbytes)
            block[:] = run
        else:
            planes = []
            for _ in range(itemsize):
                run, position = _read_run(source, position, block.nbytes // itemsize)
                planes.append(run)
            _join_planes(planes, block)
    if position != source.nbytes:
        raise RemoteProtocolError(f"a compressed tensor has {source.nbytes - position} bytes too many")


def _read_run(source: memoryview, position: int, nbytes: int) -> tuple[_Bytes, int]:
    """The run at `position`, which has to yield `nbytes` bytes, and the position after it."""
    body = position + 4
    if body > source.nbytes:
        raise RemoteProtocolError("a compressed tensor is cut short")
    head = int.from_bytes(source[position:body], "little")
    length = head & ~_STORED
    end = body + length
    # A run is never longer than what it yields: it would have been stored.
    if end > source.nbytes or length > nbytes:
        raise RemoteProtocolError(f"a compressed tensor claims {length} bytes for a run of {nbytes}")
    if head & _STORED:
        run = source[body:end]
    else:
        try:
            run = lz4.block.decompress(source[body:end], uncompressed_size=nbytes)
        except (lz4.block.LZ4BlockError, ValueError) as error:
            raise RemoteProtocolError(f"a compressed tensor is damaged: {error}") from None
    if len(run) != nbytes:
        raise RemoteProtocolError(f"a compressed run yields {len(run)} bytes where its tensor needs {nbytes}")
    return np.frombuffer(run, np.uint8), end


def _runs(block: _Bytes, itemsize: int, codec: int) -> Sequence[_Bytes]:
    if codec == LZ4:
        return (block,)
    # Shifts of whole words run at memory speed in numpy; a strided byte copy takes twice as long.
    words = block.view(f"<u{itemsize}")
    return [(words >> (8 * plane)).astype(np.uint8) for plane in range(itemsize)]


def _join_planes(planes: Sequence[_Bytes], block: _Bytes) -> None:
    words = block.view(f"<u{len(planes)}")
    np.copyto(words, planes[-1])
    for plane in reversed(planes[:-1]):
        np.left_shift(words, 8, out=words)
        np.bitwise_or(words, plane, out=words)


class Compressor:
    """One connection's policy for what it sends: `off`, `on`, or `auto`.

    `on` compresses whatever shrinks. `auto` does so where it also saves time on this link, by a sample first,
    and keeps an account: every byte sent earns a little time for samples, every attempt in vain is paid from
    it, so that data which does not shrink loses at most 5 % of the throughput, however it is cut into
    tensors. On loopback `auto` is off.

    `link_rate` is the link's throughput in bytes/s or None if not known; whoever knows may set it at any
    time.
    """

    __slots__ = ("_clock", "_credit", "_expected_cost", "_mode", "link_rate")

    def __init__(
        self,
        mode: Mode,
        *,
        loopback: bool = False,
        link_rate: float | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        if mode not in ("off", "on", "auto"):
            raise UsageError(f"compression cannot be {mode!r}", remedy="Choose off, on or auto.")
        self._mode: Mode = "off" if mode == "auto" and loopback else mode
        self.link_rate = link_rate
        self._clock = clock
        self._expected_cost = _FIRST_COST_SECONDS
        self._credit = _FIRST_COST_SECONDS

    @property
    def active(self) -> bool:
        """False where `encode` would always return None."""
        return self._mode != "off"

    def encode(self, data: memoryview, itemsize: int) -> Encoded | None:
        """The compressed form of one tensor's bytes, or None where they had better travel as they are."""
        nbytes = data.nbytes
        if self._mode == "off" or nbytes < MIN_NBYTES:
            return None
        if self._mode == "on":
            codec = _sample(data, itemsize)[0]
            return compress(data, itemsize, codec)
        return self._encode_if_faster(data, itemsize)

    def _encode_if_faster(self, data: memoryview, itemsize: int) -> Encoded | None:
        rate = self.link_rate
        earned = data.nbytes * _VAIN_SHARE / (rate or _FASTEST_RATE)
        self._credit = min(self._credit + earned, _MAX_CREDIT_SECONDS)
        if self._credit < self._expected_cost:
            return None
        start = self._clock()
        codec, saved, sampled_nbytes = _sample(data, itemsize)
        cost = self._clock() - start
        self._expected_cost += (cost - self._expected_cost) / 4
        seconds_per_byte = cost / sampled_nbytes
        if saved >= _MIN_SAVED and saved / (rate or _SUPPOSED_RATE) > seconds_per_byte * (1 + _UNDO_SHARE):
            encoded = compress(data, itemsize, codec, max_nbytes=int(data.nbytes * (1 - _MIN_SAVED)))
            if encoded is not None:
                return encoded
            cost = self._clock() - start
        self._credit -= cost
        return None


def _sample(data: memoryview, itemsize: int) -> tuple[int, float, int]:
    """(better codec, part of the bytes it saves, bytes looked at) from its start, middle and end."""
    whole = np.frombuffer(data, np.uint8)
    if whole.nbytes > _SAMPLE_PIECES * _SAMPLE_PIECE_NBYTES:
        # Starts are multiples of 8 so that items stay whole.
        step = (whole.nbytes - _SAMPLE_PIECE_NBYTES) // (_SAMPLE_PIECES - 1) // 8 * 8
        starts = [piece * step for piece in range(_SAMPLE_PIECES)]
        whole = np.concatenate([whole[start : start + _SAMPLE_PIECE_NBYTES] for start in starts])
    best, least = LZ4, whole.nbytes
    for codec in (LZ4_PLANES, LZ4) if itemsize in _PLANE_SIZES else (LZ4,):
        sizes = [
            min(len(lz4.block.compress(run, store_size=False)), run.nbytes) + 4
            for run in _runs(whole, itemsize, codec)
        ]
        if sum(sizes) < least:
            best, least = codec, sum(sizes)
    return best, 1 - least / max(whole.nbytes, 1), max(whole.nbytes, 1)
