"""Weight formats: how a matrix [out, in] is stored, and how it is made from floating-point weights.

| format   | bytes a weight | stored                                                                       |
|----------|----------------|------------------------------------------------------------------------------|
| float32  | 4              | row-major                                                                    |
| bfloat16 | 2              | row-major                                                                    |
| int8     | 1              | row-major, float16 scales per output channel (GGUF's Q8_0: per 32 columns)   |
| int4     | 0.625          | nibbles with a float16 factor and offset per 32 columns, weight = f * n + o  |
|          |                | (GGUF's Q4_0: 0.5625 with the factor only, weight = f * (n - 8))             |

int4 is laid out as the kernel reads it: channels in blocks of 16, columns in words of 8 nibbles, the first
column in a word's low bits: weight int32 [blocks, columns / 8, 16] and scales float16 [blocks, groups, 2, 16]
(factors, then offsets). Channels are padded to 16 and columns to 32, with zeros; every shape is allowed.
Both fill memory exactly as they lie in a shard's file, so a file can be mapped and multiplied as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitinfer.errors import CheckpointError, UsageError

__all__ = [
    "BLOCK",
    "FORMATS",
    "GROUP",
    "QUANT_PARTS",
    "Packed",
    "QuantConfig",
    "format_of",
    "joined",
    "natural_format",
    "pack_int4",
    "pack_int8",
    "packed_nbytes",
    "packed_shapes",
    "piece_rows",
    "quantize",
]

FORMATS = ("float32", "bfloat16", "int8", "int4")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GROUP = 32  # columns that share a scale
BLOCK = 16  # channels that lie side by side in int4
PIECE = 1 << 24  # weights that are quantised at a time: bounds the memory that takes


@dataclass(frozen=True)
class QuantConfig:
    """The format of each part's weights, one of FORMATS; None keeps them as they are stored.

    `dense` is the feed-forward network beside the experts. Norms and the router stay in floating point.
    """

    experts: str | None = None
    attention: str | None = None
    dense: str | None = None
    embeddings: str | None = None
    lm_head: str | None = None

    @classmethod
    def of(cls, quant: str | None = None, **parts: str | None) -> QuantConfig:
        """`quant` is the experts' format. The other parts, unless named, take int8 where that is int8 or
        int4: they are a tenth of the weights, and more of the quality. Raises UsageError for unknown ones.
        """
        rest = "int8" if quant in ("int8", "int4") else quant
        chosen = {name: parts.get(name) or (quant if name == "experts" else rest) for name in QUANT_PARTS}
        chosen["embeddings"] = parts.get("embeddings") or chosen["lm_head"]  # most models share the tensor
        for format in chosen.values():
            if format is not None:
                _known(format)
        return cls(**chosen)


QUANT_PARTS = ("experts", "attention", "dense", "embeddings", "lm_head")


@dataclass(frozen=True)
class Packed:
    """A matrix [out_features, in_features] in one format.

    `group` is int8's columns per scale; for int4 it is 0 with factors and offsets, GROUP with factors only.
    """

    format: str
    out_features: int
    in_features: int
    group: int
    weight: Tensor
    scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def columns(self, low: int, high: int) -> Packed:
        """Columns `low` to `high` - 1 with the scales they have here, a copy; where columns share scales in
        groups, `low` has to be the first of one."""
        part = replace(self, in_features=high - low, weight=self.weight[:, low:high].contiguous())
        if self.format == "int8" and self.group == self.in_features:
            return replace(part, group=high - low)
        if self.format == "int8":
            assert self.scales is not None
            scales = self.scales[:, low // self.group : -(-high // self.group)]
            return replace(part, scales=scales.contiguous())
        if self.format == "int4":
            assert self.scales is not None
            first, last = low // GROUP, -(-high // GROUP)
            weight = self.weight[:, first * 4 : last * 4].contiguous()
            return replace(part, weight=weight, scales=self.scales[:, first:last].contiguous())
        return part

    def widen(self, rows: Tensor | None = None) -> Tensor:
        """The weights as float32 [out, in], or those of the channels `rows` [n] int64 only."""
        if self.format == "int4":
            return self._widen_int4(rows)
        weight = self.weight if rows is None else self.weight.index_select(0, rows)
        wide = weight.float()
        if self.scales is None:
            return wide
        scales = self.scales if rows is None else self.scales.index_select(0, rows)
        return (wide.view(len(wide), -1, self.group) * scales.float().unsqueeze(-1)).view(wide.shape)

    def rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The channels `rows` [n] int64 as numbers of `dtype`, [n, in]."""
        if self.scales is None:
            return self.weight.index_select(0, rows).to(dtype)
        return self.widen(rows).to(dtype)

    def _widen_int4(self, rows: Tensor | None) -> Tensor:
        assert self.scales is not None
        if rows is None:
            words = self.weight.transpose(1, 2).flatten(0, 1)  # [channels, words]
            scales = self.scales.permute(0, 3, 1, 2).flatten(0, 1).float()  # [channels, groups, 2]
        else:
            words = self.weight[rows // BLOCK, :, rows % BLOCK]
            scales = self.scales[rows // BLOCK, :, :, rows % BLOCK].float()
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
        nibbles = words.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(15)
        groups = nibbles.reshape(len(words), -1, GROUP).float()
        if self.group:
            wide = groups.sub_(8).mul_(scales).flatten(1)
        else:
            wide = groups.mul_(scales[..., :1]).add_(scales[..., 1:]).flatten(1)
        return wide[: self.out_features if rows is None else None, : self.in_features]


def packed_shapes(
    format: str, out_features: int, in_features: int, group: int = 0
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of "weight" (and "scales") of such a matrix. `group` as in Packed; 0: the usual."""
    if format == "int4":
        blocks, groups = -(-out_features // BLOCK), -(-in_features // GROUP)
        return {
            "weight": (torch.int32, (blocks, groups * 4, BLOCK)),
            "scales": (torch.float16, (blocks, groups, 1 if group else 2, BLOCK)),
        }
    if format == "int8":
        return {
            "weight": (torch.int8, (out_features, in_features)),
            "scales": (torch.float16, (out_features, in_features // (group or in_features))),
        }
    return {"weight": (FLOATS[_known(format)], (out_features, in_features))}


def packed_nbytes(format: str, out_features: int, in_features: int, group: int = 0) -> int:
    """Bytes of such a matrix, scales and padding included."""
    shapes = packed_shapes(format, out_features, in_features, group).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes)


def natural_format(dtype: torch.dtype) -> str:
    """The format that keeps weights of `dtype` as they are (float16 has no product here: it is widened)."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def format_of(dtype: torch.dtype | None) -> str | None:
    """The weights' format when all is to be computed in `dtype` and nothing else was asked for. Computing in
    float32 does not widen weights: that would only cost memory."""
    return "bfloat16" if dtype == torch.bfloat16 else None


def quantize(weight: Tensor, format: str) -> Packed:
    """The matrix `weight` [out, in] in that format, to the nearest step of scales rounded beforehand.

    Floating-point formats share the tensor's memory where nothing has to change. Raises CheckpointError for
    weights that are infinite, NaN or beyond float16's scales, UsageError for an unknown format.
    """
    if _known(format) in FLOATS:
        out_features, in_features = weight.shape
        return Packed(format, out_features, in_features, 0, weight.to(FLOATS[format]).contiguous())
    if len(weight) > piece_rows(weight.shape[1]):
        pieces = torch.split(weight, piece_rows(weight.shape[1]))
        return joined([quantize(piece, format) for piece in pieces], weight.shape[0])
    if format == "int8":
        wide = weight.float()
        scales = _scale(wide.abs().amax(dim=1, keepdim=True) / 127)
        return pack_int8(_steps(wide, scales.float()).clamp_(-127, 127), scales)
    wide = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % GROUP))
    groups = wide.view(len(wide), -1, GROUP)
    low, high = groups.aminmax(dim=-1)
    factors, offsets = _scale((high - low) / 15), _scale(low)
    nibbles = _steps(groups - offsets.float().unsqueeze(-1), factors.float().unsqueeze(-1)).clamp_(0, 15)
    return pack_int4(nibbles.flatten(1), factors, offsets, weight.shape[1])


def pack_int8(values: Tensor, scales: Tensor) -> Packed:
    """values [out, in] of whole numbers in -128..127, scales [out, in / group]."""
    out_features, in_features = values.shape
    return Packed(
        "int8",
        out_features,
        in_features,
        in_features // scales.shape[1],
        values.to(torch.int8).contiguous(),
        scales.to(torch.float16).contiguous(),
    )


def pack_int4(nibbles: Tensor, factors: Tensor, offsets: Tensor | None, in_features: int) -> Packed:
    """nibbles [out, columns] of whole numbers in 0..15, factors and offsets [out, columns / 32]; without
    offsets weights are centred at the nibble 8.
    """
    out_features = len(nibbles)
    short = -out_features % BLOCK
    pad = torch.nn.functional.pad
    halves = pad(nibbles.to(torch.uint8), (0, 0, 0, short)).view(out_features + short, -1, 2)
    words = (halves[..., 0] | halves[..., 1] << 4).view(torch.int32)
    pairs = (factors,) if offsets is None else (factors, offsets)
    scales = pad(torch.stack(pairs, -1).to(torch.float16), (0, 0, 0, 0, 0, short))
    return Packed(
        "int4",
        out_features,
        in_features,
        GROUP if offsets is None else 0,
        words.view(-1, BLOCK, words.shape[1]).transpose(1, 2).contiguous(),
        scales.view(-1, BLOCK, scales.shape[1], len(pairs)).permute(0, 2, 3, 1).contiguous(),
    )


def piece_rows(in_features: int) -> int:
    """Rows of a matrix that are converted at a time: whole blocks, in a bounded amount of memory."""
    return max(1, PIECE // in_features // BLOCK) * BLOCK


def joined(pieces: list[Packed], out_features: int) -> Packed:
    """Pieces of whole blocks as one matrix."""
    first = pieces[0]
    weight = torch.cat([piece.weight for piece in pieces])
    scales = torch.cat([piece.scales for piece in pieces if piece.scales is not None])
    return replace(first, out_features=out_features, weight=weight, scales=scales)


def _known(format: str) -> str:
    if format not in FORMATS:
        raise UsageError(f"unknown weight format {format!r}", remedy=f"Use one of {', '.join(FORMATS)}.")
    return format


def _scale(exact: Tensor) -> Tensor:
    rounded = exact.to(torch.float16)
    if not rounded.isfinite().all():
        raise CheckpointError("weights that are infinite, NaN or too large cannot be quantised")
    return rounded


def _steps(distance: Tensor, scale: Tensor) -> Tensor:
    """distance / scale, rounded to whole numbers; 0 where the scale is 0."""
    return (distance / torch.where(scale == 0, 1.0, scale)).round_()
