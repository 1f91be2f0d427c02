"""ggml's blocks of quantised weights in our formats: types that fit are taken over, others widened first.

| type             | block                                  | here                                           |
|------------------|----------------------------------------|------------------------------------------------|
| Q4_0             | 32 nibbles, factor                     | int4 with factors: the same bits               |
| Q4_1             | 32 nibbles, factor, offset             | int4 with factors and offsets: the same bits   |
| Q4_K             | 8 times 32 nibbles, scale and minimum  | int4: the same nibbles; factors and offsets    |
|                  | of 6 bits, and what these multiply     | multiplied out and rounded to float16          |
| Q8_0             | 32 bytes, factor                       | int8 with scales per 32 columns: the same bits |
| Q5_0, Q5_1, Q5_K | 5 bits, factors per 32 columns         | int8 with scales per 32 columns                |
| Q6_K             | 6 bits, factors per 16 columns         | the same                                       |
| Q2_K, Q3_K, IQ4  | 2 to 4 bits, or a table of values      | int4                                           |

The last three rows go by way of float32 and the `gguf` package. Layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitinfer.errors import UnsupportedModelError
from splitinfer.model.gguf_file import BLOCKS
from splitinfer.model.quantize import GROUP, Packed, pack_int4, pack_int8, quantize

__all__ = ["FORMATS", "packed_blocks", "widened"]

# What each type becomes unless another format is asked for: the nearest that is not coarser.
FORMATS = {
    "Q2_K": "int4", "Q3_K": "int4", "Q4_0": "int4", "Q4_1": "int4", "Q4_K": "int4", "IQ4_NL": "int4",
    "IQ4_XS": "int4", "Q5_0": "int8", "Q5_1": "int8", "Q5_K": "int8", "Q6_K": "int8", "Q8_0": "int8",
}  # fmt: skip


def packed_blocks(raw: Tensor, kind: str, columns: int, path: Path) -> Packed:
    """Rows of blocks, uint8 [rows, bytes of a row], as the format that their type becomes.

    `path` names the file where the `gguf` package is needed and missing (UnsupportedModelError).
    """
    if kind in _TAKEN_OVER:
        return _TAKEN_OVER[kind](raw.reshape(len(raw), -1, BLOCKS[kind][1]), columns)
    wide = widened(raw, kind, path)
    if FORMATS[kind] == "int4":
        return quantize(wide, "int4")
    groups = wide.view(len(wide), -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
    steps = (groups / torch.where(scales == 0, 1.0, scales.float())).round_().clamp_(-127, 127)
    return pack_int8(steps.flatten(1), scales.squeeze(-1))


def widened(raw: Tensor, kind: str, path: Path) -> Tensor:
    """Any quantised type as float32, by the `gguf` package."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UnsupportedModelError(
            f"{path} has weights in {kind}, which the `gguf` package reads and is not installed",
            feature=f"ggml type {kind}",
            path=str(path),
            remedy="Install it: pip install 'splitinfer[gguf]'.",
        ) from None
    wide: Any = dequantize(raw.contiguous().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(wide)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, [rows, blocks]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(halves: Tensor) -> Tensor:
    """Byte i of n holds columns i (low half) and i + n (high half): [..., n] to [..., 2 * n]."""
    return torch.cat((halves & 15, halves >> 4), dim=-1)


def _from_q4_0(blocks: Tensor, columns: int) -> Packed:
    """weight = (nibble - 8) * factor."""
    return pack_int4(_nibbles(blocks[..., 2:]).flatten(1), _half(blocks, 0), None, columns)


def _from_q4_1(blocks: Tensor, columns: int) -> Packed:
    """weight = nibble * factor + offset."""
    return pack_int4(_nibbles(blocks[..., 4:]).flatten(1), _half(blocks, 0), _half(blocks, 2), columns)


def _from_q4_k(blocks: Tensor, columns: int) -> Packed:
    """weight = nibble * (d * scale) - (dmin * minimum), these of 6 bits for each of 8 groups.

    Twelve bytes hold them: 0-3 the first four scales and 4-7 the first four minima in their low 6 bits,
    8-11 the low halves of the other four (scale low, minimum high), whose upper 2 bits stand above the first.
    """
    first, second, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), dim=-1)
    minima = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), dim=-1)
    factors = _half(blocks, 0).float().unsqueeze(-1) * scales
    offsets = _half(blocks, 2).float().unsqueeze(-1) * minima
    nibbles = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:2], 4, GROUP))
    return pack_int4(nibbles.flatten(1), factors.flatten(1).half(), -offsets.flatten(1).half(), columns)


def _from_q8_0(blocks: Tensor, columns: int) -> Packed:
    return pack_int8(blocks[..., 2:].reshape(len(blocks), columns).view(torch.int8), _half(blocks, 0))


_TAKEN_OVER = {"Q4_0": _from_q4_0, "Q4_1": _from_q4_1, "Q4_K": _from_q4_k, "Q8_0": _from_q8_0}
