"""One GGUF file: metadata and the table of tensors, checked whole; tensors stay on disk, mapped.

The format (ggml, docs/gguf.md): magic, version, counts, key/value pairs, tensor infos, then aligned data. All
numbers are little-endian. Every length is held against the file's own before anything is taken for it.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from splitinfer.errors import CheckpointError, UnsupportedModelError

__all__ = ["BLOCKS", "GgufFile", "GgufTensor"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_RANK = 4
FETCH_AGAIN = "Fetch the file again: the copy is incomplete or damaged."

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9

# ggml's tensor types: number -> name, and name -> (elements, bytes) of a block.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16",
}  # fmt: skip
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip


class GgufTensor(NamedTuple):
    """Where a tensor lies: bytes `begin` to `end` of the file. `shape` is in torch's order, rows first."""

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """`metadata` by key, `tensors` by name, `rows(name)` their bytes.

    Raises CheckpointError for a file that is missing, cut short or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(
                f"{path} cannot be read: {error}", path=str(path), remedy=FETCH_AGAIN
            ) from None
        with warnings.catch_warnings():  # torch warns that the buffer is read-only: that is the point
            warnings.simplefilter("ignore", UserWarning)
            self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._at = 0
        try:
            self.metadata, self.tensors = self._parse()
        except (struct.error, UnicodeDecodeError, KeyError):
            raise self._damaged(f"its header is damaged near byte {self._at}") from None

    def rows(self, name: str) -> torch.Tensor:
        """The tensor's bytes, uint8 [rows, bytes of a row] (rows of all leading dimensions), a view."""
        tensor = self.tensors[name]
        elements, nbytes = BLOCKS[tensor.type]
        raw = self._bytes[tensor.begin : tensor.end]
        return raw.view(-1, tensor.shape[-1] // elements * nbytes)

    def release(self, name: str) -> None:
        """Lets the tensor's pages go: they come back from the file when they are read again."""
        tensor = self.tensors[name]
        begin = tensor.begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, begin, tensor.end - begin)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}", path=str(self.path), remedy=FETCH_AGAIN)

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._mapping, self._at)
        self._at += struct.calcsize(form)
        return value

    def _count(self, item_nbytes: int) -> int:
        """A count of items that follow, each of at least so many bytes: never more than the file has left."""
        count: int = self._take("<Q")
        if count * item_nbytes > len(self._mapping) - self._at:
            raise self._damaged(f"{count} items at byte {self._at} are more than the file holds")
        return count

    def _string(self) -> str:
        length = self._count(1)
        text = self._mapping[self._at : self._at + length].decode("utf-8")
        self._at += length
        return text

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._take(SCALARS[kind])
        item = self._take("<I")
        if item == STRING:
            return [self._string() for _ in range(self._count(8))]
        form = SCALARS[item]
        count = self._count(struct.calcsize(form))
        values = struct.unpack_from(f"<{count}{form[1:]}", self._mapping, self._at)
        self._at += count * struct.calcsize(form)
        return list(values)

    def _parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._mapping[:4] != MAGIC:
            raise self._damaged("it does not begin as a GGUF file does")
        self._at = 4
        version = self._take("<I")
        if version not in VERSIONS:
            raise UnsupportedModelError(
                f"{self.path}: GGUF version {version} is not implemented",
                feature=f"gguf version {version}",
                path=str(self.path),
                remedy="Convert the model again with a present llama.cpp.",
            )
        tensors, pairs = self._count(24), self._count(13)
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            metadata[key] = self._value(self._take("<I"))
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return metadata, {item[0]: self._placed(*item, start) for item in table}

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._take("<I")
        if not 1 <= rank <= MAX_RANK:
            raise self._damaged(f"tensor {name} has {rank} dimensions")
        shape = tuple(reversed([int(self._take("<Q")) for _ in range(rank)]))
        return name, shape, self._take("<I"), self._take("<Q")

    def _placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> GgufTensor:
        if kind not in TYPES:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} has ggml type {kind}, which is not implemented",
                feature=f"ggml type {kind}",
                path=str(self.path),
                remedy=f"Use a file quantised to one of {', '.join(BLOCKS)}.",
            )
        elements, nbytes = BLOCKS[TYPES[kind]]
        count = 1
        for size in shape:
            count *= size
        end = start + offset + count // elements * nbytes
        if shape[-1] % elements or end > len(self._mapping):
            raise self._damaged(f"tensor {name} of shape {list(shape)} is not all there")
        return GgufTensor(TYPES[kind], shape, start + offset, end)
