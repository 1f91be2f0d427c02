"""The forms in which a tensor may travel: as it is, compressed, or in fewer bits. Picks one for each tensor
sent.

The handshake tells each end what the other can decode. The client decides what is worth doing, since it alone
knows what it dialled: it lists the lz4 forms unless its policy is off (`auto` on loopback), and a lossy one
only if its user asked for it. A server decodes them all and answers in what the client listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from splitinfer.errors import RemoteProtocolError, UsageError
from splitinfer.transport.compression import LZ4, LZ4_PLANES, MIN_NBYTES, Compressor, Mode, decompress
from splitinfer.transport.tensors import TensorSpec
from splitinfer.transport.wire_dtypes import WIRE_DTYPES, narrow, narrows, widen, wire_nbytes

__all__ = ["BFLOAT16", "FLOAT8", "INT8", "LOSSLESS", "TensorCodec"]

# What fits a new connection's congestion window leaves at once: fewer bytes would gain less than the attempt
# costs, which for a decoded row is more than everything else about its call.
AUTO_MIN_NBYTES: Final = 16 * 1024

BFLOAT16: Final = 3
FLOAT8: Final = 4
INT8: Final = 5

LOSSLESS: Final = frozenset((LZ4, LZ4_PLANES))
_WIRE_BY_CODE: Final = {BFLOAT16: "bfloat16", FLOAT8: "float8_e4m3fn", INT8: "int8"}
_CODE_BY_WIRE: Final = {name: code for code, name in _WIRE_BY_CODE.items()}


class TensorCodec:
    """One connection's codec (`protocol.Codec`).

    `wire_dtype` narrows float tensors, both ways; None leaves them alone. It is the client's to ask for.
    `link_rate` is the link's throughput in bytes/s where it is known beforehand.
    """

    def __init__(
        self,
        role: Literal["client", "server"],
        compression: Mode,
        *,
        loopback: bool = False,
        link_rate: float | None = None,
        wire_dtype: str | None = None,
    ) -> None:
        if wire_dtype is not None and wire_dtype not in WIRE_DTYPES:
            raise UsageError(
                f"no wire dtype {wire_dtype!r}", remedy=f"Choose one of {', '.join(WIRE_DTYPES)}."
            )
        # What the caller knows beforehand is not measured again: an emulated link's own limit, say.
        self._rate_known = link_rate is not None
        self._compressor = Compressor(compression, loopback=loopback, link_rate=link_rate)
        lossless = LOSSLESS if self._compressor.active else frozenset[int]()
        if role == "server":
            lossy = frozenset(_WIRE_BY_CODE)
        else:
            lossy = frozenset() if wire_dtype is None else frozenset((_CODE_BY_WIRE[wire_dtype],))
        self.encodings: frozenset[int] = lossless | lossy
        self._lossy = lossy
        self._auto = compression == "auto"
        self.min_nbytes = MIN_NBYTES

    @property
    def link_rate(self) -> float | None:
        """The link's throughput in bytes/s, for whoever measures it to set."""
        return self._compressor.link_rate

    @link_rate.setter
    def link_rate(self, rate: float | None) -> None:
        if not self._rate_known:
            self._compressor.link_rate = rate

    def agree(self, accepted: frozenset[int], rate: int) -> None:
        """The handshake is over: what the peer decodes, and what it knows of the link's throughput, in
        bytes/s; 0 is nothing."""
        lossy = self._lossy & accepted
        self.min_nbytes = AUTO_MIN_NBYTES if self._auto and not lossy else MIN_NBYTES
        if rate:
            self.link_rate = float(rate)
            self._rate_known = True

    def encode(
        self, spec: TensorSpec, data: memoryview, accepted: frozenset[int]
    ) -> tuple[int, Sequence[memoryview], int] | None:
        """(encoding, pieces, their nbytes together) in a form that the peer accepts; None: as it is."""
        for code in self._lossy & accepted:
            wire, dtype = _WIRE_BY_CODE[code], spec.dtype.name
            if narrows(wire, dtype, spec.shape):
                narrowed = narrow(data, wire, dtype, spec.shape)
                return code, (narrowed,), narrowed.nbytes
        if accepted >= LOSSLESS:
            encoded = self._compressor.encode(data, spec.dtype.itemsize)
            if encoded is not None:
                return encoded.codec, encoded.parts, encoded.nbytes
        return None

    def decode(self, encoding: int, spec: TensorSpec, wire: memoryview, out: memoryview) -> None:
        """Fill `out` (`spec.nbytes` bytes) from `wire`.

        Raises RemoteProtocolError for an encoding that was not agreed on, and for what does not fit `spec`.
        """
        if encoding not in self.encodings:
            raise RemoteProtocolError(f"a tensor came in encoding {encoding}, which was not agreed on")
        if encoding in LOSSLESS:
            decompress(wire, out, spec.dtype.itemsize, encoding)
            return
        name, dtype = _WIRE_BY_CODE[encoding], spec.dtype.name
        if not narrows(name, dtype, spec.shape) or wire.nbytes != wire_nbytes(name, spec.shape):
            raise RemoteProtocolError(
                f"{wire.nbytes} bytes of {name} for a {dtype} tensor of shape {spec.shape}"
            )
        widen(wire, out, name, dtype, spec.shape)
