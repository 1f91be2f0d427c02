"""Fewer bits on the wire: float tensors sent as bfloat16, float8 or int8 and widened on arrival. Lossy,
opt-in.

Agreed in the handshake, never assumed. Pure numpy on memoryviews, bit by bit where numpy lacks the type;
torch is not needed. Rounding is to nearest, ties to even.

| wire dtype | bits | scale | from | |---|---|---|---| | `bfloat16` | 16 | none | float32 | | `float8_e4m3fn`
| 8 | float32 per row: the row's largest magnitude becomes 448 | float32, float16, bfloat16 | | `int8` | 8 |
float32 per row: the row's largest magnitude becomes 127 | float32, float16, bfloat16 |

A row is the last dimension. With a scale, all rows' scales come first, little-endian float32, then the codes
in the tensor's own order. A row with a NaN or an infinity in it arrives as NaN throughout in the 8-bit types.
The errors, measured, are in docs/transport.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from splitinfer.errors import LocalProtocolError

__all__ = ["MIN_COLUMNS", "WIRE_DTYPES", "WireDtype", "narrow", "narrows", "widen", "wire_nbytes"]

WireDtype = Literal["bfloat16", "float8_e4m3fn", "int8"]
WIRE_DTYPES: Final[tuple[WireDtype, ...]] = ("bfloat16", "float8_e4m3fn", "int8")

# Narrow tensors travel whole: router weights are few bytes and each one scales a whole row of the answer.
MIN_COLUMNS: Final = 64

_SOURCES: Final[dict[str, tuple[str, ...]]] = {
    "bfloat16": ("float32",),
    "float8_e4m3fn": ("float32", "float16", "bfloat16"),
    "int8": ("float32", "float16", "bfloat16"),
}
_F8_MAX: Final = np.float32(448)
_I8_MAX: Final = np.float32(127)
_F32_TINY: Final = np.finfo(np.float32).tiny
# Adding it to a magnitude below 2**-6 puts one unit of float8's subnormals (2**-9) in float32's last bit.
_F8_SUBNORMAL_MAGIC: Final = np.float32(2**14)

_F32 = npt.NDArray[np.float32]
_U16 = npt.NDArray[np.uint16]
_U8 = npt.NDArray[np.uint8]


def narrows(wire: str, dtype: str, shape: Sequence[int]) -> bool:
    """True where a tensor of this dtype and shape travels as `wire`; otherwise it travels as it is."""
    return dtype in _SOURCES.get(wire, ()) and len(shape) > 0 and shape[-1] >= MIN_COLUMNS and 0 not in shape


def wire_nbytes(wire: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of this shape takes as `wire`. `shape` has at least one dimension."""
    items, rows = prod(shape), prod(shape[:-1])
    return 2 * items if wire == "bfloat16" else items + 4 * rows


def narrow(data: memoryview, wire: str, dtype: str, shape: Sequence[int]) -> memoryview:
    """The wire form of one contiguous tensor, in fresh memory of `wire_nbytes` bytes.

    Raises LocalProtocolError where `narrows` says no.
    """
    if not narrows(wire, dtype, shape):
        raise LocalProtocolError(f"a {dtype} tensor of shape {tuple(shape)} cannot travel as {wire}")
    values = _as_float32(data, dtype).reshape(-1, shape[-1])
    if wire == "bfloat16":
        return _to_bfloat16(values).reshape(-1).view(np.uint8).data
    out = np.empty(wire_nbytes(wire, shape), np.uint8)
    rows = values.shape[0]
    codes = out[4 * rows :].reshape(values.shape)
    peak = np.maximum(values.max(axis=1), -values.min(axis=1))
    largest = _I8_MAX if wire == "int8" else _F8_MAX
    # Never a denormal or zero scale: dividing by it would overflow. Rows that small (1e-36) lose places
    # instead.
    scale = np.maximum(peak / largest, _F32_TINY)
    scale[~np.isfinite(peak)] = np.nan
    out[: 4 * rows].view("<f4")[:] = scale
    with np.errstate(invalid="ignore"):
        scaled: _F32 = np.clip(values / scale[:, None], -largest, largest)
    if wire == "int8":
        np.copyto(
            codes.view(np.int8), np.rint(np.nan_to_num(scaled, copy=False), out=scaled), casting="unsafe"
        )
    else:
        _to_float8(scaled, codes)
    return out.data


def widen(encoded: memoryview, out: memoryview, wire: str, dtype: str, shape: Sequence[int]) -> None:
    """Undo `narrow` into `out`, the tensor's own bytes. Both lengths follow from `shape`: the caller made
    them.
    """
    columns = shape[-1]
    if wire == "bfloat16":
        _store_float32(_from_bfloat16(np.frombuffer(encoded, "<u2")), out, dtype)
        return
    rows = prod(shape[:-1])
    scale = np.frombuffer(encoded, "<f4", rows)[:, None]
    codes = np.frombuffer(encoded, np.uint8, rows * columns, 4 * rows).reshape(rows, columns)
    values = codes.view(np.int8).astype(np.float32) if wire == "int8" else _FLOAT8_VALUES.take(codes)
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(values, scale, out=values)
    _store_float32(values.reshape(-1), out, dtype)


def _as_float32(data: memoryview, dtype: str) -> _F32:
    if dtype == "bfloat16":
        return _from_bfloat16(np.frombuffer(data, "<u2"))
    source: npt.NDArray[Any] = np.frombuffer(data, "<f4" if dtype == "float32" else "<f2")
    return source.astype(np.float32, copy=False)


def _store_float32(values: _F32, out: memoryview, dtype: str) -> None:
    if dtype == "bfloat16":
        np.frombuffer(out, "<u2")[:] = _to_bfloat16(values)
    else:
        with np.errstate(over="ignore"):
            np.frombuffer(out, "<f4" if dtype == "float32" else "<f2")[:] = values


def _to_bfloat16(values: _F32) -> _U16:
    bits = values.view(np.uint32)
    # Half of the last kept place, less one where that place is even: carries into it exactly when rounding
    # up.
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    return rounded


def _from_bfloat16(codes: _U16) -> _F32:
    wide = codes.astype(np.uint32)
    np.left_shift(wide, 16, out=wide)
    return wide.view(np.float32)


def _to_float8(values: _F32, codes: _U8) -> None:
    """float8_e4m3fn codes of values within ±448; NaN becomes 0x7f."""
    bits = values.view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    # 20 mantissa bits go; the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    shifted = magnitude.view(np.float32) + _F8_SUBNORMAL_MAGIC
    subnormal = shifted.view(np.uint32) - _F8_SUBNORMAL_MAGIC.view(np.uint32)
    small = magnitude < np.float32(2**-6).view(np.uint32)
    code = np.where(small, subnormal, normal)
    code[magnitude > 0x7F800000] = 0x7F
    np.copyto(codes, code | ((bits >> 24) & 0x80), casting="unsafe")


def _float8_values() -> _F32:
    code = np.arange(256, dtype=np.uint32)
    exponent, mantissa = ((code >> 3) & 15).astype(np.int32), (code & 7).astype(np.float32)
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    values = np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)
    values[code & 0x7F == 0x7F] = np.nan
    return values


_FLOAT8_VALUES: Final = _float8_values()
