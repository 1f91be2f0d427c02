"""Keys and values of one sequence. Full layers grow in chunks, sliding layers keep the window and a margin.

They are kept in the model's dtype, or, lossy and half as large, as int8 with a float16 scale for every row
and head. A row's bits depend on nothing but itself, so taking rows back leaves no trace in either form.

A sliding layer's rows lie in order in one bounded buffer; when it is full, the rows still in reach move to
its front. Attention then reads one contiguous slice in order of position, never a ring with a seam, for a
move of one window per MARGIN tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from splitinfer.errors import UsageError
from splitinfer.model.config import AttentionConfig, ModelConfig

__all__ = ["ROLLBACK", "Held", "KVCache", "Place", "grown"]

ROLLBACK = 64  # rows that `truncate` can always take back: several verify windows of drafts
MARGIN = 256  # rows of a sliding buffer beyond what has to stay: one move of the window per so many tokens
CHUNK = 256  # rows; buffers grow by at least this, and by a quarter, so that growing costs little per token


def grown(capacity: int, rows: int, reach: int | None) -> int:
    """The capacity that a layer's buffers of `capacity` rows get for `rows`; `reach` as in `_Store`."""
    if rows <= capacity:
        return capacity
    larger = max(rows, capacity + max(CHUNK, capacity // 4))
    return larger if reach is None else max(rows, min(larger, reach + ROLLBACK + MARGIN))


class Held(NamedTuple):
    """Keys and values [V, n, D] of one layer, V kv_heads, D head_dim; of int8 the scales [V, n] float16."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def part(self, lo: int, hi: int) -> Held:
        """Views of n = hi - lo of them."""
        keys, values = self.keys[:, lo:hi], self.values[:, lo:hi]
        if self.key_scales is None or self.value_scales is None:
            return Held(keys, values)
        return Held(keys, values, self.key_scales[:, lo:hi], self.value_scales[:, lo:hi])

    def widened(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers of `dtype`."""
        if self.key_scales is None or self.value_scales is None:
            return self.keys.to(dtype), self.values.to(dtype)
        pairs = ((self.keys, self.key_scales), (self.values, self.value_scales))
        keys, values = ((codes * scales.float().unsqueeze(-1)).to(dtype) for codes, scales in pairs)
        return keys, values


class Place(NamedTuple):
    """Where new rows of a layer belong: behind `old` others in buffers [V, capacity, D], at these addresses.
    They see the last `seen` of those besides their own."""

    capacity: int
    old: int
    seen: int
    keys: int
    values: int


def _as_int8(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """A head's largest magnitude in a row becomes 127."""
    both = torch.stack((keys, values)).float()
    scales = (both.abs().amax(-1) / 127).clamp_(max=65504.0).to(torch.float16)
    steps = torch.where(scales == 0, 1.0, scales.float()).unsqueeze(-1)
    codes = (both / steps).round_().clamp_(-127, 127).to(torch.int8)
    return codes[0], codes[1], scales[0], scales[1]


class _Store:
    """One layer's buffers, [kv_heads, capacity, ...], for the positions `base` to `base + rows`."""

    def __init__(
        self, attention: AttentionConfig, device: torch.device, dtype: torch.dtype, int8: bool
    ) -> None:
        self.reach = None if attention.window is None else attention.window - 1  # older rows that a row sees
        self.int8 = int8
        shape = (attention.num_key_value_heads, 0, attention.head_dim)
        kind = torch.int8 if int8 else dtype
        self.buffers = [torch.empty(shape, device=device, dtype=kind) for _ in ("keys", "values")]
        if int8:
            self.buffers += [torch.empty(shape[:2], device=device, dtype=torch.float16) for _ in range(2)]
        self._addresses: tuple[int, int] | None = None  # None too where memory for one of them was missing
        self._capacity = 0  # of all buffers
        self.base = 0
        self.rows = 0

    def serves(self, length: int) -> bool:
        """Whether a row at position `length` would still find every older row it sees."""
        return self.reach is None or self.base <= max(0, length - self.reach)

    def append(self, start: int, keys: Tensor, values: Tensor) -> Held:
        """Stores n rows from position `start` on, over whatever was there; returns all that they may see."""
        added = _as_int8(keys, values) if self.int8 else (keys, values)
        new = keys.shape[1]
        room = self._room(start, new)
        if room is None:
            return self._replace(start, added, new)
        old, seen = room
        for buffer, rows in zip(self.buffers, added, strict=True):
            buffer[:, old : old + new] = rows
        return self.held(old - seen, old + new)

    def place(self, start: int, new: int, dtype: torch.dtype) -> Place | None:
        """Where the caller is to put `new` rows from position `start` on. None where only `append` can: for
        int8, and for a block larger than the buffer."""
        room = self._room(start, new) if self.buffers[0].dtype is dtype else None
        if room is None or self._addresses is None:
            return None
        return Place(self._capacity, *room, *self._addresses)

    def _room(self, start: int, new: int) -> tuple[int, int] | None:
        """Room in the buffers for n rows from position `start` on: behind how many others, and how many of
        these they see. None for a block larger than the buffer."""
        old = start - self.base
        if old > self.rows:
            raise UsageError(f"rows {self.base + self.rows}-{start - 1} were never computed")
        seen = old if self.reach is None else min(old, self.reach)
        if self.reach is not None and old + new > self.reach + ROLLBACK + MARGIN:
            keep = min(old, self.reach + ROLLBACK)
            if keep + new > self.reach + ROLLBACK + MARGIN:
                return None
            self._move(old - keep, keep)
            old = keep
        self._reserve(old + new)
        self.rows = old + new
        return old, seen

    def held(self, lo: int, hi: int) -> Held:
        """Views of rows `lo` to `hi` - 1."""
        return Held(*self.buffers).part(lo, hi)

    def _move(self, lo: int, count: int) -> None:
        """Brings `count` rows from row `lo` to the front (by way of a copy: the ranges may overlap)."""
        for buffer in self.buffers:
            buffer[:, :count] = buffer[:, lo : lo + count].clone()
        self.base += lo

    def _replace(self, start: int, added: Sequence[Tensor], new: int) -> Held:
        """A block larger than the buffer: attention gets its own copy, the buffer the last rows of it."""
        assert self.reach is not None
        old = start - self.base
        seen = min(old, self.reach)
        older = (buffer[:, old - seen : old] for buffer in self.buffers)
        joined = [torch.cat(pair, 1) for pair in zip(older, added, strict=True)]
        keep = min(seen + new, self.reach + ROLLBACK)
        self._reserve(keep)
        for buffer, rows in zip(self.buffers, joined, strict=True):
            buffer[:, :keep] = rows[:, -keep:]
        self.base, self.rows = start + new - keep, keep
        return Held(*joined)

    def _reserve(self, rows: int) -> None:
        """Room for so many rows. Buffers move one after the other, so there is one copy of one of them."""
        if rows <= self._capacity:
            return
        self._addresses = None
        larger_capacity = grown(self._capacity, rows, self.reach)
        for i, buffer in enumerate(self.buffers):
            larger = buffer.new_empty((len(buffer), larger_capacity, *buffer.shape[2:]))
            larger[:, : self.rows] = buffer[:, : self.rows]
            self.buffers[i] = larger
        self._capacity = larger_capacity
        self._addresses = (self.buffers[0].data_ptr(), self.buffers[1].data_ptr())


class KVCache:
    """Keys and values of one sequence, in `dtype`, or with `int8` as such. The rows of a step are begun, then
    appended, or placed, layer by layer."""

    def __init__(
        self,
        config: ModelConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        int8: bool = False,
    ) -> None:
        self._stores = [_Store(each, torch.device(device), dtype, int8) for each in config.attention]
        self._limit = config.max_position_embeddings
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held, those of a step under way included."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers as they are now."""
        return sum(buffer.nbytes for store in self._stores for buffer in store.buffers)

    def begin(self, rows: int) -> int:
        """Takes the next `rows` positions for a step and returns the first of them.

        Raises UsageError beyond the model's context, and after a failed step that cannot be taken back.
        """
        if self._length + rows > self._limit:
            raise UsageError(
                f"{self._length + rows} tokens are more than the model's context of {self._limit}",
                remedy="Shorten the prompt, or ask for fewer tokens.",
            )
        self._require(self._length)
        start = self._length
        self._length += rows
        return start

    def append(self, layer: int, start: int, keys: Tensor, values: Tensor) -> Held:
        """Stores keys and values [kv_heads, n, head_dim] of positions `start` to `start + n - 1`.

        Returns views of all rows that these may attend to, [kv_heads, seen + n, head_dim], in order, the new
        ones last; `seen` is `start`, or at most the window less one. Valid until the next append or
        place.
        """
        return self._stores[layer].append(start, keys, values)

    def place(self, layer: int, start: int, rows: int, dtype: torch.dtype) -> Place | None:
        """Where keys and values in `dtype` of positions `start` to `start + rows - 1` are to be written, in
        place of `append`; None where only that can do it. Valid until the next append or place."""
        return self._stores[layer].place(start, rows, dtype)

    def held(self, layer: int, length: int) -> Held:
        """Views of one layer's keys and values [kv_heads, n, head_dim] of the first `length` tokens: the last
        n positions of these, all there are.

        n is `length` for a full layer; for a sliding one at least the window less one, and usually more.
        """
        store = self._stores[layer]
        return store.held(0, length - store.base)

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens. The last ROLLBACK rows can always be taken back.

        Raises UsageError for a longer length, or where a sliding layer no longer holds what is needed.
        """
        if not 0 <= length <= self._length:
            raise UsageError(f"cannot keep {length} of {self._length} tokens")
        if length:
            self._require(length)
        self.abandon(length)

    def abandon(self, start: int) -> None:
        """Takes back a step that failed after `begin` returned `start`."""
        self._length = min(self._length, start)
        if self._length == 0:
            for store in self._stores:
                store.base = store.rows = 0

    def _require(self, length: int) -> None:
        if not all(store.serves(length) for store in self._stores):
            raise UsageError(
                f"a sliding layer no longer holds what position {length} needs",
                remedy=f"Take back at most {ROLLBACK} rows, or start the sequence anew.",
            )
