from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from splitinfer.model.gguf_blocks import FORMATS, packed_blocks, widened
from splitinfer.model.gguf_file import BLOCKS

ROWS, COLUMNS = 48, 512
PATH = Path("m.gguf")
TAKEN_OVER = ("Q4_0", "Q4_1", "Q8_0")
# The bytes at which a type's float16 factors stand: drawn at random they would be infinite or NaN.
FACTORS = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "IQ4_NL": (0,),
    "IQ4_XS": (0,), "Q5_0": (0,), "Q5_1": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q8_0": (0,),
}  # fmt: skip


def blocks(kind: str, seed: int = 0) -> Tensor:
    """Rows of random blocks: every pattern of bits that the type has, with factors of about 0.01."""
    size, nbytes = BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed)
    count = ROWS * COLUMNS // size
    raw = torch.randint(0, 256, (count, nbytes), dtype=torch.uint8, generator=generator)
    for at in FACTORS[kind]:
        drawn = 0.01 + 0.01 * torch.rand(count, 1, generator=generator)
        raw[:, at : at + 2] = drawn.half().view(torch.uint8)
    return raw.view(ROWS, -1)


def reference(kind: str, raw: Tensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", TAKEN_OVER)
def test_the_same_bits(kind: str) -> None:
    raw = blocks(kind)
    packed = packed_blocks(raw, kind, COLUMNS, PATH)
    assert packed.format == FORMATS[kind]
    assert torch.equal(packed.widen(), reference(kind, raw))


@pytest.mark.parametrize("seed", range(5))
def test_q4_k_keeps_its_nibbles(seed: int) -> None:
    """Only factor and offset of a group are rounded, to float16: they are products of two numbers there."""
    raw = blocks("Q4_K", seed)
    packed, expected = packed_blocks(raw, "Q4_K", COLUMNS, PATH), reference("Q4_K", raw)
    groups = expected.view(ROWS, -1, 32).abs().amax(-1, keepdim=True)
    error = (packed.widen().view(ROWS, -1, 32) - expected.view(ROWS, -1, 32)).abs()
    assert bool((error <= groups * 2**-10 + 1e-7).all())
    assert packed.format == "int4"
    assert packed.scales is not None
    assert packed.scales.shape[2] == 2


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {*TAKEN_OVER, "Q4_K"}))
def test_others_become_the_nearest_format(kind: str) -> None:
    raw = blocks(kind)
    packed, expected = packed_blocks(raw, kind, COLUMNS, PATH), reference(kind, raw)
    assert packed.format == FORMATS[kind]
    assert (packed.widen() - expected).norm() < (0.08 if packed.format == "int4" else 0.01) * expected.norm()
    assert torch.equal(widened(raw, kind, PATH), expected)
