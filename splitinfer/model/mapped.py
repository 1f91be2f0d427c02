"""One safetensors file, memory-mapped: the header is checked whole, tensors are views of the file's pages.

The format is eight bytes of header length (little-endian), a JSON header, then raw tensors
(huggingface/safetensors, README "Format"). Nothing is read before it is asked for, nothing is copied:
a tensor touches only its own pages, and two processes on one machine share them. The mapping is read-only,
so a write to a weight is a crash, never a silent change.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from splitinfer.errors import CheckpointError

__all__ = ["MappedFile", "TensorEntry"]

MAX_HEADER_NBYTES = 100_000_000  # the limit of the reference implementation
MAX_RANK = 8
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INTEGERS = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}  # quantised weights, tables of ids
ITEM_NBYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
FETCH_AGAIN = "Fetch the file again: the copy is incomplete or damaged."


class TensorEntry(NamedTuple):
    """Where a tensor lies: byte offsets `begin` to `end` of the file. `dtype` is the format's own name."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class MappedFile:
    """`entries` by tensor name; `tensor(name)` a view on the mapping.

    Raises CheckpointError for a file that is missing, cut short or whose header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.nbytes = os.fstat(file.fileno()).st_size
                self.entries = self._parse(self._read_header(file.fileno()))
                self._bytes = self._map(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror or error}", path=str(path), remedy="Check the path."
            ) from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, of DTYPES or INTEGERS, on the CPU; a view unless the file misaligns it."""
        entry = self.entries[name]
        dtype = (DTYPES | INTEGERS)[entry.dtype]
        raw = self._bytes[entry.begin : entry.end]
        if entry.begin % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)

    def release(self, name: str) -> None:
        """Lets the tensor's pages go: they come back from the file when they are read again."""
        entry = self.entries[name]
        begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def sample(self, name: str, nbytes: int, count: int) -> bytes:
        """`count` windows of `nbytes` spread over the tensor; read past the mapping, nothing stays."""
        entry = self.entries[name]
        span = entry.end - entry.begin - nbytes
        if span <= 0:
            places = [(entry.begin, entry.end - entry.begin)]
        else:
            places = [(entry.begin + span * (2 * i + 1) // (2 * count), nbytes) for i in range(count)]
        with self.path.open("rb") as file:
            return b"".join(os.pread(file.fileno(), size, offset) for offset, size in places)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}", path=str(self.path), remedy=FETCH_AGAIN)

    def _read_header(self, fd: int) -> bytes:
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if self.nbytes < 8 or length > min(MAX_HEADER_NBYTES, self.nbytes - 8):
            raise self._damaged(f"no safetensors header fits into its {self.nbytes} bytes")
        return os.pread(fd, length, 8)

    def _parse(self, header: bytes) -> dict[str, TensorEntry]:
        try:
            table = json.loads(header)
        except (ValueError, RecursionError):
            raise self._damaged("the safetensors header is not valid JSON") from None
        if not isinstance(table, dict):
            raise self._damaged("the safetensors header is not a JSON object")
        start = 8 + len(header)
        entries = {n: self._entry(n, raw, start) for n, raw in table.items() if n != "__metadata__"}
        end = max((entry.end for entry in entries.values()), default=start)
        if end > self.nbytes:
            late = min((e.begin, n) for n, e in entries.items() if e.end > self.nbytes)[1]
            raise self._damaged(f"cut short: {self.nbytes} bytes of {end}; tensor {late} is not all there")
        return entries

    def _entry(self, name: str, raw: object, start: int) -> TensorEntry:
        fields = raw if isinstance(raw, dict) else {}
        dtype, shape, offsets = (
            fields.get("dtype"),
            _sizes(fields.get("shape")),
            _sizes(fields.get("data_offsets")),
        )
        if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
            raise self._damaged(f"tensor {name} has no valid dtype, shape and data_offsets")
        if dtype not in ITEM_NBYTES or len(shape) > MAX_RANK:
            raise self._damaged(f"tensor {name} has dtype {dtype[:20]} and {len(shape)} dimensions")
        begin, end = offsets
        if end - begin != math.prod(shape) * ITEM_NBYTES[dtype]:
            raise self._damaged(f"tensor {name} of shape {shape} does not fill its {end - begin} bytes")
        return TensorEntry(dtype, tuple(shape), start + begin, start + end)

    def _map(self, fd: int) -> torch.Tensor:
        self._mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():  # torch warns that the buffer is read-only: that is the point
            warnings.simplefilter("ignore", UserWarning)
            return torch.frombuffer(self._mapping, dtype=torch.uint8)


def _sizes(value: object) -> list[int] | None:
    """The list of sizes or offsets that `value` is, or None."""
    valid = isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
    return value if isinstance(value, list) and valid else None
