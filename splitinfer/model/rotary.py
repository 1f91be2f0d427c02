"""Rotary position embedding: the factors that turn queries and keys by their position.

They are computed for blocks of positions and kept, so that a decoded row finds its own ready, and so that a
position's factors do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from splitinfer.model.config import AttentionConfig

__all__ = ["Rotary", "Rotation", "rotary_frequencies"]

BLOCK = 64  # positions that are computed at a time
KEPT = 128  # blocks, of as many sequences: 32 MiB at most


class Rotation(NamedTuple):
    """Rotary factors of some rows, float32 [rows, 1, D]. `sin` has its first half negated."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotates x [rows, heads, D], float32: pairs are (i, i + D/2)."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


class Rotary:
    """The factors of one layer type, on one device. Safe to share between threads."""

    def __init__(self, attention: AttentionConfig, device: torch.device) -> None:
        self._frequencies = rotary_frequencies(attention, device)
        self._block = lru_cache(maxsize=KEPT)(self._compute)

    def at(self, ranges: Sequence[tuple[int, int]]) -> Rotation:
        """Those of the positions from `start` to `end` - 1 of each range, one after the other."""
        parts = [
            (self._block(number), max(0, start - number * BLOCK), min(BLOCK, end - number * BLOCK))
            for start, end in ranges
            for number in range(start // BLOCK, -(-end // BLOCK))
        ]
        if len(parts) == 1:
            (cos, sin), low, high = parts[0]
            return Rotation(cos[low:high], sin[low:high])
        return Rotation(
            torch.cat([block.cos[low:high] for block, low, high in parts]),
            torch.cat([block.sin[low:high] for block, low, high in parts]),
        )

    def _compute(self, number: int) -> Rotation:
        frequencies = self._frequencies
        positions = torch.arange(number * BLOCK, (number + 1) * BLOCK, device=frequencies.device)
        angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        return Rotation(torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1))


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
