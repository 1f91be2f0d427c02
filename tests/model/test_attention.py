from __future__ import annotations

import pytest
import torch
from torch import Tensor

from splitinfer.model.attention import BLOCK_ROWS, attend, plan_blocks
from splitinfer.model.cache import Held

CPU = torch.device("cpu")


def naive(queries: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None) -> Tensor:
    """Row by row and head by head, float64; keys of all positions from 0 on."""
    n, heads, dim = queries.shape
    group = heads // keys.shape[0]
    out = torch.zeros(n, heads, dim, dtype=torch.float64)
    for row in range(n):
        position = start + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            k, v = (t[head // group, first : position + 1].double() for t in (keys, values))
            out[row, head] = torch.softmax(k @ queries[row, head].double(), dim=0) @ v
    return out.reshape(n, heads * dim)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 200), (3, 1), (3, 150), (90, 1), (90, 7), (90, 130)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (8, 1)])
def test_attention(window: int | None, start: int, rows: int, heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, heads, 8, generator=generator)
    keys, values = torch.randn(2, kv_heads, start + rows, 8, generator=generator)
    seen = start if window is None else min(start, window - 1)
    blocks = plan_blocks(start, rows, window, heads // kv_heads, torch.float32, CPU)
    found = attend(queries, Held(keys[:, start - seen :], values[:, start - seen :]), blocks)
    expected = naive(queries, keys, values, start, window)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_int8_keys_and_values_are_widened_block_by_block() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(130, 8, 8, generator=generator)
    codes = torch.randint(-127, 128, (2, 2, 130, 8), generator=generator).to(torch.int8)
    scales = torch.rand(2, 2, 130, generator=generator).div(60).half()
    held = Held(codes[0], codes[1], scales[0], scales[1])
    blocks = plan_blocks(0, 130, None, 4, torch.float32, CPU)
    expected = naive(queries, *held.widened(torch.float32), 0, None)
    torch.testing.assert_close(attend(queries, held, blocks).double(), expected, atol=1e-5, rtol=1e-5)


def test_blocks_bound_the_mask_and_skip_what_the_window_hides() -> None:
    blocks = plan_blocks(4000, 1000, 100, 8, torch.float32, CPU)
    assert [b.row for b in blocks] == list(range(0, 1000, BLOCK_ROWS // 8))
    assert all(b.key_end - b.key <= 99 + BLOCK_ROWS // 8 for b in blocks)
    masks = [b.mask for b in blocks if b.mask is not None]
    assert len(masks) == len(blocks)
    assert all(mask.numel() <= BLOCK_ROWS * (99 + BLOCK_ROWS // 8) for mask in masks)
    assert plan_blocks(4000, 1, None, 8, torch.float32, CPU)[0].mask is None
