"""Attention of one sequence's rows over its cached keys and values.

Shape letters: n new rows, S keys seen, N query heads, V key/value heads, G = N/V query heads per K/V head,
D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.model.cache import Held

__all__ = ["Block", "attend", "plan_blocks"]

# Query rows (times G) that share one mask: bounds the mask's memory at any context length, and spares
# sliding layers most of the keys outside the window.
BLOCK_ROWS = 512


class Block(NamedTuple):
    """Some query rows and the keys they see, as ranges; `mask` is additive, [rows * G, keys], or None."""

    row: int
    row_end: int
    key: int
    key_end: int
    mask: Tensor | None


def plan_blocks(
    start: int, rows: int, window: int | None, group: int, dtype: torch.dtype, device: torch.device
) -> list[Block]:
    """How `rows` new rows from position `start` on are attended in blocks, G = `group`.

    Keys are counted as KVCache.append returns them: at most `window` - 1 older rows, then the new ones.
    """
    seen = start if window is None else min(start, window - 1)
    height = max(1, BLOCK_ROWS // group)
    blocks = []
    for row in range(0, rows, height):
        row_end = min(rows, row + height)
        key = 0 if window is None else max(0, seen + row - (window - 1))
        key_end = seen + row_end
        mask = None
        if row_end - row > 1:
            own = torch.arange(seen + row, seen + row_end, device=device).unsqueeze(1)
            other = torch.arange(key, key_end, device=device)
            hidden = other > own
            if window is not None:
                hidden |= other <= own - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            mask = mask.repeat_interleave(group, dim=0)
        blocks.append(Block(row, row_end, key, key_end, mask))
    return blocks


def attend(queries: Tensor, held: Held, blocks: Sequence[Block]) -> Tensor:
    """Softmax attention of queries [n, N, D] over keys and values [V, S, D], to [n, N * D]. No scaling.

    Keys and values in int8 are widened for one block at a time. The G heads of one K/V head are folded into
    rows, so keys and values are read once and never repeated.
    """
    n, heads, head_dim = queries.shape
    kv_heads = held.keys.shape[0]
    group = heads // kv_heads
    folded = queries.view(n, kv_heads, group, head_dim).transpose(0, 1)
    parts = []
    for row, row_end, key, key_end, mask in blocks:
        keys, values = held.part(key, key_end).widened(queries.dtype)
        part = F.scaled_dot_product_attention(
            folded[:, row:row_end].reshape(1, kv_heads, -1, head_dim),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=mask,
            scale=1.0,
        )
        part = part.view(kv_heads, row_end - row, group, head_dim).transpose(0, 1)
        parts.append(part.reshape(row_end - row, heads * head_dim))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
