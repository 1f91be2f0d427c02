"""Keys and values of one sequence. Full layers grow in chunks, sliding layers keep the window and a margin.

A sliding layer's rows lie in order in one bounded buffer; when it is full, the rows still in reach move to
its front. Attention then reads one contiguous slice in order of position, never a ring with a seam, for a
move of one window per MARGIN tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitinfer.errors import UsageError
from splitinfer.model.config import AttentionConfig, ModelConfig

__all__ = ["ROLLBACK", "KVCache", "grown"]

ROLLBACK = 64  # rows that `truncate` can always take back: several verify windows of drafts
MARGIN = 256  # rows of a sliding buffer beyond what has to stay: one move of the window per so many tokens
CHUNK = 256  # rows; buffers grow by at least this, and by a quarter, so that growing costs little per token


def grown(capacity: int, rows: int, reach: int | None) -> int:
    """The capacity that a layer's buffers of `capacity` rows get for `rows`; `reach` as in `_Store`."""
    if rows <= capacity:
        return capacity
    larger = max(rows, capacity + max(CHUNK, capacity // 4))
    return larger if reach is None else max(rows, min(larger, reach + ROLLBACK + MARGIN))


class _Store:
    """One layer's buffers, [kv_heads, capacity, head_dim], for the positions `base` to `base + rows`."""

    def __init__(self, attention: AttentionConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.reach = None if attention.window is None else attention.window - 1  # older rows that a row sees
        shape = (attention.num_key_value_heads, 0, attention.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.base = 0
        self.rows = 0

    def serves(self, length: int) -> bool:
        """Whether a row at position `length` would still find every older row it sees."""
        return self.reach is None or self.base <= max(0, length - self.reach)

    def append(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores n rows from position `start` on, over whatever was there; returns all that they may see."""
        new = keys.shape[1]
        old = start - self.base
        if old > self.rows:
            raise UsageError(f"rows {self.base + self.rows}-{start - 1} were never computed")
        seen = old if self.reach is None else min(old, self.reach)
        if self.reach is not None and old + new > self.reach + ROLLBACK + MARGIN:
            keep = min(old, self.reach + ROLLBACK)
            if keep + new > self.reach + ROLLBACK + MARGIN:
                return self._replace(start, old, seen, keys, values)
            self._move(old - keep, keep)
            old = keep
        self._reserve(old + new)
        self.keys[:, old : old + new] = keys
        self.values[:, old : old + new] = values
        self.rows = old + new
        return self.keys[:, old - seen : old + new], self.values[:, old - seen : old + new]

    def _move(self, lo: int, count: int) -> None:
        """Brings `count` rows from row `lo` to the front (by way of a copy: the ranges may overlap)."""
        self.keys[:, :count] = self.keys[:, lo : lo + count].clone()
        self.values[:, :count] = self.values[:, lo : lo + count].clone()
        self.base += lo

    def _replace(
        self, start: int, old: int, seen: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A block larger than the buffer: attention gets its own copy, the buffer the last rows of it."""
        all_keys = torch.cat((self.keys[:, old - seen : old], keys), dim=1)
        all_values = torch.cat((self.values[:, old - seen : old], values), dim=1)
        assert self.reach is not None
        keep = min(all_keys.shape[1], self.reach + ROLLBACK)
        self._reserve(keep)
        self.keys[:, :keep] = all_keys[:, -keep:]
        self.values[:, :keep] = all_values[:, -keep:]
        self.base, self.rows = start + keys.shape[1] - keep, keep
        return all_keys, all_values

    def _reserve(self, rows: int) -> None:
        capacity = self.keys.shape[1]
        if rows <= capacity:
            return
        larger_capacity = grown(capacity, rows, self.reach)
        heads, _, head_dim = self.keys.shape
        for name in ("keys", "values"):
            held = getattr(self, name)
            larger = held.new_empty((heads, larger_capacity, head_dim))
            larger[:, : self.rows] = held[:, : self.rows]
            setattr(self, name, larger)


class KVCache:
    """Keys and values of one sequence. The rows of a step are begun, then appended layer by layer."""

    def __init__(
        self,
        config: ModelConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._stores = [_Store(attention, torch.device(device), dtype) for attention in config.attention]
        self._limit = config.max_position_embeddings
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held, those of a step under way included."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers as they are now."""
        return sum(store.keys.nbytes + store.values.nbytes for store in self._stores)

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

    def append(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [kv_heads, n, head_dim] of positions `start` to `start + n - 1`.

        Returns views of all rows that these may attend to, [kv_heads, seen + n, head_dim], in order, the new
        ones last; `seen` is `start`, or at most the window less one. Valid until the next append.
        """
        return self._stores[layer].append(start, keys, values)

    def held(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of one layer's keys and values [kv_heads, n, head_dim] of the first `length` tokens: the last
        n positions of these, all there are.

        n is `length` for a full layer; for a sliding one at least the window less one, and usually more.
        """
        store = self._stores[layer]
        rows = length - store.base
        return store.keys[:, :rows], store.values[:, :rows]

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
