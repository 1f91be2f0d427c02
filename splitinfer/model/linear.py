"""Products of rows with weights in any format of `quantize`, by the kernels in C or by PyTorch.

Activations are float32 or bfloat16, sums are float32, and the result has the activations' dtype. With the
kernels a row's bits depend neither on other rows nor on the number of threads, in every format. PyTorch's own
products give that for int4 (rounding activations to bfloat16) and for int8 by channel (of a multiple of 64
columns); the others add up in an order that depends on the number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.model.dense import linear
from splitinfer.model.native import DTYPES, FORMAT_CODES, Kernels, Matrix, kernels
from splitinfer.model.quantize import GROUP, Packed

__all__ = ["Linear", "matrix_of"]


def matrix_of(packed: Packed) -> Matrix:
    """The kernels' view of a matrix. It lives no longer than `packed`."""
    scales = None if packed.scales is None else packed.scales.data_ptr()
    shape = (packed.out_features, packed.in_features)
    return Matrix(FORMAT_CODES[packed.format], packed.group, *shape, packed.weight.data_ptr(), scales)


class Linear:
    """[rows, in] to [rows, out]; several matrices give their outputs side by side.

    On a device other than the CPU, weights are widened to the activations' dtype when first used.
    """

    def __init__(self, *parts: Packed, device: str | torch.device = "cpu") -> None:
        self.parts = parts
        self.out_features = sum(part.out_features for part in parts)
        self.nbytes = sum(part.nbytes for part in parts)
        self._device = torch.device(device)
        self._kernels: Kernels | None = kernels() if self._device.type == "cpu" else None
        self.matrices = (Matrix * len(parts))(*map(matrix_of, parts))
        self._fallback: list[_TorchLinear] = []
        # The kernels prepare rows once for all matrices, and int8 and int4 want them otherwise.
        mixed = len({part.format if part.format.startswith("int") else "" for part in parts}) > 1
        self._apart = [Linear(part, device=device) for part in parts] if mixed else []

    @property
    def fuses(self) -> bool:
        """Whether `matrices` may be given to a kernel that does more than this product."""
        return self._kernels is not None and not self._apart

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """The result has x's dtype, or `out_dtype` if given: float32 spares a rounding."""
        if self._apart:
            return torch.cat([part(x, out_dtype) for part in self._apart], dim=-1)
        if self._kernels is None:
            if not self._fallback:
                self._fallback = [_TorchLinear(part, x.dtype, self._device) for part in self.parts]
            outs = [part(x) for part in self._fallback]
            return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)).to(out_dtype or x.dtype)
        if x.dtype not in DTYPES:
            return self(x.float()).to(out_dtype or x.dtype)
        out = torch.empty((len(x), self.out_features), dtype=out_dtype or x.dtype)
        return self._kernels.product(self.matrices, x.contiguous(), out)


class _TorchLinear:
    """One matrix by PyTorch's own operators: what there is without a compiler, and on other devices."""

    def __init__(self, packed: Packed, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.kind = packed.format
        self.out_features, self.in_features = packed.out_features, packed.in_features
        if device.type != "cpu" or packed.format in ("float32", "bfloat16"):
            self.kind = "dense"
        elif packed.format == "int8" and (packed.group != packed.in_features or packed.in_features % 64):
            self.kind = "dense"  # no such product for scales by group; others read past rows of odd length
        if self.kind == "dense":
            self.weight = packed.weight if packed.weight.dtype == dtype else packed.widen()
            self.weight = self.weight.to(device, dtype)
        elif self.kind == "int8":
            assert packed.scales is not None
            self.weight, self.scales = packed.weight, packed.scales.squeeze(1).to(dtype)
        else:
            self._repack(packed)

    def _repack(self, packed: Packed) -> None:
        """int4 as this processor's PyTorch wants it: weight = (nibble - 8) * scale + zero."""
        assert packed.scales is not None
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        words = packed.weight.transpose(1, 2).flatten(0, 1).unsqueeze(-1)
        nibbles = words.bitwise_right_shift(shifts).bitwise_and_(15).flatten(1).contiguous()
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        factors, *offsets = packed.scales.float().unbind(2)  # [blocks, groups, 16] each
        zeros = offsets[0] + 8 * factors if offsets else torch.zeros_like(factors)
        pairs = torch.stack((factors, zeros), -1)  # [blocks, groups, 16, 2]
        self.scales = pairs.transpose(0, 1).flatten(1, 2).to(torch.bfloat16).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "dense":
            return linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        if self.kind == "int8":
            out: Tensor = torch.ops.aten._weight_int8pack_mm(x.to(self.dtype), self.weight, self.scales)
            return out.to(x.dtype)
        columns = self.weight.shape[-1] * 2
        padded = F.pad(x.to(torch.bfloat16), (0, columns - self.in_features))
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(padded, self.weight, GROUP, self.scales)
        return out[:, : self.out_features].to(x.dtype)
