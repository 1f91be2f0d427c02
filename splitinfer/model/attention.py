"""Rotary embedding and attention of one sequence's rows over its cached keys and values.

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
from splitinfer.model.config import AttentionConfig

__all__ = ["Block", "Rotation", "attend", "plan_blocks", "rotary_frequencies", "rotation"]

# Query rows (times G) that share one mask: bounds the mask's memory at any context length, and spares
# sliding layers most of the keys outside the window.
BLOCK_ROWS = 512


class Rotation(NamedTuple):
    """Rotary factors of some rows, float32 [rows, 1, D]. `sin` has its first half negated."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotates x [rows, heads, D], float32: pairs are (i, i + D/2)."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class Block(NamedTuple):
    """Some query rows and the keys they see, as ranges; `mask` is additive, [rows * G, keys], or None."""

    row: int
    row_end: int
    key: int
    key_end: int
    mask: Tensor | None


def rotary_frequencies(attention: AttentionConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair, float32 [D/2].

    "proportional" (transformers' `_compute_proportional_rope_parameters`) turns the first pairs only, with
    exponents taken over the whole head; the others keep still.
    """
    rope, head_dim = attention.rope, attention.head_dim
    turning = head_dim // 2
    if rope.rope_type == "proportional":
        turning = int(rope.partial_rotary_factor * head_dim // 2)
    exponents = torch.arange(0, 2 * turning, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float32, device=device)
    frequencies[:turning] = 1.0 / rope.rope_theta**exponents / rope.factor
    return frequencies


def rotation(frequencies: Tensor, positions: Tensor) -> Rotation:
    """The factors for `positions` [rows], shared by all layers of one type in a step."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))


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
