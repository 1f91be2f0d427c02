"""Rotary factors: the angles, and that a position has the same bits however it is asked for."""

from __future__ import annotations

import math

import pytest
import torch

from splitinfer.model.config import AttentionConfig, RopeConfig
from splitinfer.model.rotary import BLOCK, KEPT, Rotary

CPU = torch.device("cpu")
SHAPE = AttentionConfig("full_attention", 16, 1, None, True, RopeConfig("default", 1e4))


@pytest.mark.parametrize("rope", [RopeConfig("default", 1e4), RopeConfig("proportional", 1e6, 0.25, 2.0)])
def test_rotation_turns_pairs_by_position(rope: RopeConfig) -> None:
    dim = 16
    shape = AttentionConfig("full_attention", dim, 1, None, True, rope)
    x = torch.randn(3, 2, dim)
    turned = Rotary(shape, CPU).at([(0, 1), (7, 8), (1000, 1001)]).apply(x)
    turning = dim // 2 if rope.rope_type == "default" else int(0.25 * dim // 2)
    for row, position in enumerate([0, 7, 1000]):
        for pair in range(dim // 2):
            angle = 0.0
            if pair < turning:
                angle = position * rope.rope_theta ** (-2 * pair / dim) / rope.factor
            a, b = x[row, :, pair], x[row, :, pair + dim // 2]
            c, s = math.cos(angle), math.sin(angle)
            torch.testing.assert_close(turned[row, :, pair], a * c - b * s, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(turned[row, :, pair + dim // 2], b * c + a * s, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 1)],
        [(BLOCK - 1, BLOCK + 1)],
        [(5, 3 * BLOCK)],
        [(2 * BLOCK, 3 * BLOCK)],
        [(7, 9), (1000, 1001), (BLOCK, 2 * BLOCK + 1)],
    ],
)
def test_a_position_has_the_same_bits_whatever_is_asked_for_beside_it(ranges: list[tuple[int, int]]) -> None:
    together = Rotary(SHAPE, CPU).at(ranges)
    alone = [Rotary(SHAPE, CPU).at([(n, n + 1)]) for start, end in ranges for n in range(start, end)]
    assert together.cos.shape == (len(alone), 1, 16)
    assert torch.equal(together.cos, torch.cat([one.cos for one in alone]))
    assert torch.equal(together.sin, torch.cat([one.sin for one in alone]))


def test_what_is_kept_is_bounded() -> None:
    rotary = Rotary(SHAPE, CPU)
    first = rotary.at([(3, 4)])
    assert rotary.at([(3, 4)]).cos.data_ptr() == first.cos.data_ptr()
    rotary.at([(0, 3 * KEPT * BLOCK)])
    assert rotary._block.cache_info().currsize == KEPT
    assert torch.equal(rotary.at([(3, 4)]).cos, first.cos)
