"""What happens to rows between the products, by PyTorch: the same functions as the kernels', for any device.

`row_ops` gives one or the other. Norms are float32 inside and are rounded once, as the reference does.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.model.native import DTYPES, kernels

__all__ = ["RowOps", "TorchRows", "row_ops"]


class RowOps(Protocol):
    """Shape letters: H hidden_size, N query heads, V key/value heads, D head_dim, E experts."""

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        """RMS norm of x [rows, H] times `weight` [H] float32."""
        ...

    def residual(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        eps: float,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x + norm(y) * weight in x's dtype; that sum's norm times `first` [H] and `second` in x's dtype,
        and times `third` (None: 1) in float32."""
        ...

    def combine(
        self,
        x: Tensor,
        dense: Tensor,
        moe: Tensor | None,
        moe_weight: Tensor | None,
        weight: Tensor,
        eps: float,
        scalar: float,
    ) -> Tensor:
        """(x + norm(dense + norm(moe) * moe_weight) * weight) * scalar; without moe: norm(dense)."""
        ...

    def heads(
        self,
        projected: Tensor,
        weight: Tensor,
        values: int,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Projections [rows, heads * D] float32 to queries and keys [rows, N + V, D], normalised, times
        `weight` [N + V, D] and turned by cos and sin [rows, 1, D]; and the last `values` heads [rows, V, D],
        normalised."""
        ...

    def gated(self, x: Tensor) -> Tensor:
        """gelu(first half) * second half of x [rows, 2 * I] float32, to [rows, I]."""
        ...

    def choose(self, scores: Tensor, k: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest of scores [rows, E] float32, falling; their softmax times `scale` [E]."""
        ...


class TorchRows:
    """The functions of `RowOps` by PyTorch's operators."""

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(out_dtype)

    def residual(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        eps: float,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        total = x + self.norm(y, weight, eps, x.dtype)
        normed = self.norm(total, None, eps, torch.float32)
        two = None if second is None else (normed * second).to(x.dtype)
        routed = normed if third is None else normed * third
        return total, (normed * first).to(x.dtype), two, routed

    def combine(
        self,
        x: Tensor,
        dense: Tensor,
        moe: Tensor | None,
        moe_weight: Tensor | None,
        weight: Tensor,
        eps: float,
        scalar: float,
    ) -> Tensor:
        if moe is not None:
            dense = dense + self.norm(moe, moe_weight, eps, x.dtype)
        return (x + self.norm(dense, weight, eps, x.dtype)) * scalar

    def heads(
        self,
        projected: Tensor,
        weight: Tensor,
        values: int,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        turning, size = weight.shape
        normed = F.rms_norm(projected.view(len(projected), -1, size), (size,), None, eps)
        x = normed[:, :turning] * weight
        turned = torch.addcmul(x * cos, x.roll(size // 2, -1), sin)
        return turned.to(dtype), normed[:, normed.shape[1] - values :].to(dtype)

    def gated(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def choose(self, scores: Tensor, k: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        # The reference normalises K of E softmax terms: the same as a softmax over the K.
        best, index = torch.topk(scores, k, dim=-1)
        return index, torch.softmax(best, dim=-1) * scale[index]


def row_ops(device: torch.device, dtype: torch.dtype) -> RowOps:
    """The kernels where they can be used, else PyTorch."""
    built = kernels() if device.type == "cpu" and dtype in DTYPES else None
    return TorchRows() if built is None else built.rows
