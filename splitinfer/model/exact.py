"""An expert in fixed point by PyTorch's operators: slowly, where there are no kernels, with the same promise.

PyTorch's products add up in an order that depends on shapes and threads. Here every product of two numbers is
exact (float64), rounded to a step, and added as an integer: no order is left. That costs some twenty times a
product of its own. Shape letters: H hidden_size, I the intermediate dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.fixed_point import DTYPE, from_fixed, to_fixed
from splitinfer.model.quantize import Packed

__all__ = ["expert_in_fixed_point"]

BLOCK = 1 << 20  # products at a time: 8 MiB, and as much again on the way
VECTOR = 32  # elements that PyTorch may take together; what is left over it computes by another routine


def expert_in_fixed_point(gate_up: Packed, down: Packed, x: Tensor, weights: Tensor) -> Tensor:
    """The expert's answers to x [rows, H] times `weights` [rows] float32, int64 [rows, H].

    A row's answer depends on nothing but that row; a slice of the expert gives that part of its sum. Raises
    SplitinferError for what leaves the range.
    """
    first, second = gate_up.widen(), down.widen()
    out = torch.empty((len(x), down.out_features), dtype=DTYPE)
    for row, (one, weight) in enumerate(zip(x.float(), weights, strict=True)):
        gate, up = from_fixed(_product(first, one), torch.float32).chunk(2)
        gate = F.pad(gate, (0, -len(gate) % VECTOR))
        hidden = F.gelu(gate, approximate="tanh")[: len(up)] * up * weight
        out[row] = _product(second, hidden)
    return out


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """weight [out, in] times x [in], both float32, in fixed point [out]."""
    height, wide = max(1, BLOCK // len(x)), x.double()
    return torch.cat([to_fixed(part.double() * wide).sum(-1) for part in torch.split(weight, height)])
