"""Tensors at the border: numpy and torch arrays to memoryviews and back, and the table of dtypes.

Nothing is copied unless an array is not contiguous. torch is imported only where a torch tensor is given or
asked for; numpy has no bfloat16 and no float8, so those come back through `torch()` or as `uint8`.
"""

from __future__ import annotations

import sys
from ctypes import string_at
from math import prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, Union, cast

import numpy as np

from splitinfer.errors import LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPES",
    "DTYPE_BY_CODE",
    "Array",
    "DType",
    "Joinable",
    "Tensor",
    "TensorSpec",
    "data_of",
    "is_plain",
    "joinable",
    "spec_named",
    "spec_of",
]

NumpyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class DType(NamedTuple):
    """One row of the table: `code` is its number on the wire, `numpy` is None where numpy lacks it."""

    name: str
    code: int
    itemsize: int
    numpy: np.dtype[Any] | None


def _row(name: str, code: int, itemsize: int, in_numpy: bool = True) -> DType:
    return DType(name, code, itemsize, np.dtype(name).newbyteorder("<") if in_numpy else None)


_TABLE: Final = (
    _row("bool", 1, 1),
    _row("uint8", 2, 1),
    _row("int8", 3, 1),
    _row("uint16", 4, 2),
    _row("int16", 5, 2),
    _row("uint32", 6, 4),
    _row("int32", 7, 4),
    _row("uint64", 8, 8),
    _row("int64", 9, 8),
    _row("float16", 10, 2),
    _row("float32", 11, 4),
    _row("float64", 12, 8),
    _row("complex64", 13, 8),
    _row("complex128", 14, 16),
    _row("bfloat16", 15, 2, in_numpy=False),
    _row("float8_e4m3fn", 16, 1, in_numpy=False),
    _row("float8_e5m2", 17, 1, in_numpy=False),
)
DTYPES: Final = {row.name: row for row in _TABLE}
_LENT: Final[dict[int, np.dtype[Any]]] = {1: np.dtype(np.uint8), 2: np.dtype(np.int16)}
DTYPE_BY_CODE: Final = {row.code: row for row in _TABLE}


class TensorSpec(NamedTuple):
    """What a tensor is, without its bytes."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Tensor:
    """A typed view on a buffer: what arrives in `call.tensors` and `reply.tensors`, and may be sent again.

    `data` is a flat memoryview of `nbytes` bytes, little-endian, C order. A received one is a view on the
    receive buffer, writable and 64-byte aligned; the buffer is used again once the last view on it is gone.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        self.dtype = dtype
        self.shape = shape
        self.data = data

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numpy(self) -> NumpyArray:
        """The tensor as a numpy array on the same memory.

        Raises LocalProtocolError for bfloat16 and float8, RemoteProtocolError for a bool that is neither 0
        nor 1.
        """
        dtype = DTYPES[self.dtype].numpy
        if dtype is None:
            raise LocalProtocolError(
                f"numpy has no {self.dtype}",
                remedy="Take .torch(), or numpy.frombuffer(tensor.data, numpy.uint8) for the bare bytes.",
            )
        if self.dtype == "bool":
            self._check_bool()
        return np.ndarray(self.shape, dtype, self.data)

    def torch(self) -> torch.Tensor:
        """The tensor as a torch CPU tensor on the same memory. Raises RemoteProtocolError as `numpy` does."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.dtype == "bool":
            self._check_bool()
        if not self.data.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        # Twice as fast as torch.frombuffer, with a numpy type of the same size where numpy lacks this one.
        row = DTYPES[self.dtype]
        lent: NumpyArray = np.ndarray(self.shape, row.numpy or _LENT[row.itemsize], self.data)
        if self.data.readonly:  # a sender's own Tensor, read back; torch has no read-only tensors
            lent = lent.copy()
        tensor = torch.from_numpy(lent)
        return tensor if tensor.dtype is dtype else tensor.view(dtype)

    def _check_bool(self) -> None:
        if np.frombuffer(self.data, np.uint8).max(initial=0) > 1:
            raise RemoteProtocolError("a bool tensor holds a byte that is neither 0 nor 1")

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {list(self.shape)})"


Array: TypeAlias = Union[NumpyArray, "torch.Tensor", Tensor]
Joinable: TypeAlias = "bytes | memoryview | NumpyArray"


def data_of(array: Array) -> memoryview:
    """The array's own bytes as a flat memoryview; a copy only where it is not contiguous.

    Raises LocalProtocolError for what is neither a numpy array, a torch CPU tensor nor a Tensor.
    """
    kind = type(array)
    if kind is np.ndarray:
        return _numpy_data(cast(NumpyArray, array))
    if kind is Tensor:
        return cast(Tensor, array).data
    if isinstance(array, (np.ndarray, np.generic)):
        return _numpy_data(np.asarray(array))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu" or array.layout is not torch.strided:
            raise LocalProtocolError(
                f"a {array.layout} tensor on {array.device} cannot be sent", remedy="Send tensor.cpu()."
            )
        tensor = array.detach()
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg().contiguous()
        if not tensor.numel():
            return memoryview(b"")
        # One dimension of step 1, which a contiguous tensor with a dimension of size 1 need not have.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        return memoryview(flat.view(torch.uint8).numpy()).cast("B")
    raise LocalProtocolError(
        f"a {type(array).__name__} cannot be sent", remedy="Send numpy arrays or torch CPU tensors."
    )


def is_plain(array: Array) -> bool:
    """True where `joinable` may be asked: false for complex numbers, big-endian ones, arrays of odd kinds."""
    if isinstance(array.dtype, np.dtype):
        return type(array) is np.ndarray and array.dtype.isnative
    return "complex" not in str(array.dtype)


def joinable(array: Array) -> Joinable:
    """Something for `bytes.join` that is the array's own bytes, at the least cost for small ones.

    Joining raises TypeError for an array that is not contiguous.
    """
    kind = type(array)
    if kind is np.ndarray:
        return cast(NumpyArray, array)
    if kind is Tensor:
        return cast(Tensor, array).data
    torch = sys.modules.get("torch")
    if torch is not None and kind is torch.Tensor:
        tensor: Any = array
        if (
            tensor.is_cpu
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and not tensor.is_neg()
        ):
            # For one copy, a third of what it takes to make a numpy view.
            return string_at(tensor.data_ptr(), tensor.nbytes)
    return data_of(array)


def _numpy_data(array: NumpyArray) -> memoryview:
    if not array.size:
        return memoryview(b"")
    if not array.flags.c_contiguous or array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"), order="C")
    return array.data.cast("B")


def spec_of(array: Array) -> TensorSpec:
    """Its dtype and shape by the table's names. Raises LocalProtocolError for a dtype not in the table."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise LocalProtocolError(
            f"a {type(array).__name__} cannot be sent", remedy="Send numpy arrays or torch CPU tensors."
        )
    name = dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")
    return spec_named(name, tuple(array.shape))


def spec_named(name: str, shape: tuple[int, ...]) -> TensorSpec:
    """The same for a dtype by its name in the table."""
    row = DTYPES.get(name)
    if row is None:
        raise LocalProtocolError(
            f"dtype {name} is not in the wire's table", remedy=f"Use one of {', '.join(DTYPES)}."
        )
    return TensorSpec(row, shape)
