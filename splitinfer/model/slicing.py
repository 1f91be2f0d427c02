"""A slice of an expert, cut from its packed weights: no weight is rounded again.

Rows of any format and columns of floating-point ones may be cut anywhere; columns that share a scale stay
together. Shape letters: H hidden_size, I moe_intermediate_size.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from splitinfer.errors import UsageError
from splitinfer.model.quantize import BLOCK, GROUP, Packed

__all__ = ["column_slice", "sliced", "sliced_shape"]


def sliced(gate_up: Packed, down: Packed, columns: tuple[int, int]) -> tuple[Packed, Packed]:
    """gate_up_proj [2*I, H] and down_proj [H, I] of an expert to [2*n, H] and [H, n], copies, of n columns
    from the first to before the last of I. Raises as `column_slice` does."""
    low, high = columns
    rows = torch.cat((torch.arange(low, high), torch.arange(low, high) + gate_up.out_features // 2))
    return _row_slice(gate_up, rows), column_slice(down, low, high)


def sliced_shape(name: str, shape: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """The shape of a tensor where experts are cut to so many columns: other tensors keep theirs."""
    if name.endswith("experts.gate_up_proj"):
        return (*shape[:-2], 2 * columns, shape[-1])
    return (*shape[:-1], columns) if name.endswith("experts.down_proj") else shape


def _row_slice(packed: Packed, rows: torch.Tensor) -> Packed:
    if packed.format != "int4":
        scales = None if packed.scales is None else packed.scales[rows]
        return replace(packed, out_features=len(rows), weight=packed.weight[rows], scales=scales)
    # Channels lie side by side in blocks, [blocks, ..., BLOCK]; the last block is filled up with zeros.
    assert packed.scales is not None
    weight, scales = _channels(packed.weight)[rows], _channels(packed.scales)[rows]
    return replace(packed, out_features=len(rows), weight=_in_blocks(weight), scales=_in_blocks(scales))


def _channels(blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, ..., BLOCK] to [channels, ...]."""
    return blocks.movedim(-1, 1).flatten(0, 1)


def _in_blocks(channels: torch.Tensor) -> torch.Tensor:
    """[channels, ...] to [blocks, ..., BLOCK]."""
    short = -len(channels) % BLOCK
    padded = torch.cat((channels, channels.new_zeros((short, *channels.shape[1:]))))
    return padded.view(-1, BLOCK, *channels.shape[1:]).movedim(1, -1).contiguous()


def column_slice(packed: Packed, low: int, high: int) -> Packed:
    """Columns from `low` to before `high` of a matrix, a copy with the scales of the whole.

    Raises UsageError, naming the nearest cuts, for one that divides columns that share a scale.
    """
    if packed.format == "int4" or (packed.format == "int8" and packed.group != packed.in_features):
        _check_cuts(packed, low, high)
    return packed.columns(low, high)


def _check_cuts(packed: Packed, low: int, high: int) -> None:
    whole = packed.in_features
    wrong = [cut for cut in (low, high) if cut % GROUP and cut != whole]
    if wrong:
        near = [cut for cut in (wrong[0] // GROUP * GROUP, -(-wrong[0] // GROUP) * GROUP) if 0 < cut < whole]
        edges = " or ".join(f"before column {cut} ({cut / whole:.6g})" for cut in near)
        raise UsageError(
            f"--slice: columns {low}-{high - 1} of {whole} divide the {GROUP} that share a scale in "
            f"{packed.format}",
            remedy=f"Cut {edges}." if near else "Hold the experts whole: they are too small to be cut.",
        )
