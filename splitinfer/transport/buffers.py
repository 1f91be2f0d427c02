"""Receive buffers: 64-byte aligned, lent out, and taken back when the last view on them dies.

Fresh pages cost a fault each, which is slower than the copy that fills them; so large buffers are kept. A
lent buffer is a memoryview. Slices of it, arrays made from it and tensors made from those all keep it alive;
when the last of them goes, a weak reference's callback puts the memory back.
"""

from __future__ import annotations

import weakref
from typing import Any, Final

import numpy as np

__all__ = ["ALIGNMENT", "POOL", "BufferPool", "aligned"]

ALIGNMENT: Final = 64
_KEEP_NBYTES: Final = 512 << 20


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of 64."""
    return (nbytes + ALIGNMENT - 1) & -ALIGNMENT


class BufferPool:
    """Lends aligned memory and keeps at most `keep_nbytes` bytes of it for the next borrower.

    Sizes are rounded up by at most a quarter, so that buffers of about the same size replace each other. Safe
    from several threads: every step that changes a list is one atomic call.
    """

    def __init__(self, keep_nbytes: int = _KEEP_NBYTES) -> None:
        self._keep_nbytes = keep_nbytes
        self._free: dict[int, list[np.ndarray[Any, np.dtype[np.uint8]]]] = {}
        # By the reference's id: the hash of a weak reference is that of an array, and arrays have none.
        self._lent: dict[int, tuple[weakref.ref[Any], np.ndarray[Any, np.dtype[np.uint8]]]] = {}

    def take(self, nbytes: int) -> memoryview:
        """A writable view of exactly `nbytes` bytes, 64-byte aligned; it may hold anything."""
        size = _size_class(nbytes)
        try:
            block = self._free[size].pop()
        except (KeyError, IndexError):
            block = _allocate(size)
        # This array is the lent thing: memoryviews of it, and whatever is made from them, refer to it. Made
        # through a memoryview, because numpy lets an array made from a slice refer past it, to `block`.
        view = np.frombuffer(block.data[:nbytes], np.uint8)
        reference = weakref.ref(view, self._returned)
        self._lent[id(reference)] = (reference, block)
        return view.data

    @property
    def free_nbytes(self) -> int:
        """Bytes kept for the next borrower."""
        return sum(size * len(blocks) for size, blocks in list(self._free.items()))

    @property
    def lent(self) -> int:
        """Buffers that somebody still looks at."""
        return len(self._lent)

    def _returned(self, reference: weakref.ref[Any]) -> None:
        block = self._lent.pop(id(reference))[1]
        if block.nbytes > self._keep_nbytes:
            return
        if self.free_nbytes + block.nbytes > self._keep_nbytes:
            self._free.clear()  # sizes nobody asks for any more must not crowd out those in use
        self._free.setdefault(block.nbytes, []).append(block)


def _size_class(nbytes: int) -> int:
    """The next of four sizes per doubling, at least 4 KiB."""
    if nbytes <= 4096:
        return 4096
    step = 1 << ((nbytes - 1).bit_length() - 3)
    return (nbytes + step - 1) & -step


def _allocate(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -int(raw.ctypes.data) % ALIGNMENT
    return raw[start : start + nbytes]


POOL: Final = BufferPool()
