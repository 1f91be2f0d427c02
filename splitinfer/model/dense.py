"""The product of activations and a weight matrix in the weights' own floating-point format."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear"]

# Without bfloat16 instructions PyTorch computes such products row by row, each at the cost of a full pass.
# Widening the weights to float32 costs about two passes, whatever the number of rows: it pays from here on.
WIDEN_ROWS = 3
WIDEN_ELEMENTS = 1 << 20  # weights widened at a time: 4 MiB of float32, which stay in the cache


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] times weight [out, in], to [rows, out] in x's dtype. Sums are float32 at least."""
    if (
        weight.dtype is torch.bfloat16
        and len(x) >= WIDEN_ROWS
        and weight.device.type == "cpu"
        and not _has_bfloat16_products()
    ):
        return _widened(x, weight)
    return F.linear(x, weight)


@cache
def _has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX-512 BF16, AMX), by the library that PyTorch hands them to."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(asked is not None and asked())


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """In float32, a block of output columns at a time, rounded once."""
    wide = x.float()
    height = max(1, WIDEN_ELEMENTS // weight.shape[1])
    out = x.new_empty(len(x), weight.shape[0])
    for lo in range(0, weight.shape[0], height):
        out[:, lo : lo + height] = F.linear(wide, weight[lo : lo + height].float())
    return out
