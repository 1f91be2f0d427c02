"""What happens to rows between the products, by PyTorch, on any device; `RowKernels` does the same faster.

Norms are float32 inside and are rounded once, as the reference does. Shape letters: H hidden_size, N query
heads, V key/value heads, D head_dim, E experts, K top_k_experts.
"""

from __future__ import annotations

from ctypes import Array
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.model.linear import Linear
from splitinfer.model.native import Expected

__all__ = ["Begun", "Closed", "Dense", "Routing", "TorchRows"]


class Routing(NamedTuple):
    """What chooses experts: rows times `scale` [H], their product with `proj` [E, H], the `top_k` largest."""

    scale: Tensor
    proj: Linear
    top_k: int
    per_expert_scale: Tensor


class Dense:
    """The feed-forward network of every row: down(gelu(gate) * up), and the norm of that times `norm` [H], if
    given. `struct` is the kernels' view of it, made when first used."""

    __slots__ = ("down", "eps", "fuses", "gate_up", "norm", "struct")

    def __init__(self, gate_up: Linear, down: Linear, norm: Tensor | None, eps: float) -> None:
        self.gate_up = gate_up
        self.down = down
        self.norm = norm
        self.eps = eps
        self.fuses = gate_up.fuses and down.fuses
        self.struct: Any = None


class Begun:
    """A dense network under way: the kernels' handle of it, 0 once it has ended, and the memory that they
    read and write."""

    __slots__ = ("handle", "out", "x")

    def __init__(self, handle: int, x: Tensor, out: Tensor) -> None:
        self.handle = handle
        self.x = x
        self.out = out


class Closed(NamedTuple):
    """What came of `close_mlp`: the layer's result, None where there is none; when the dense network ended,
    by `perf_counter`, 0.0 if it has not; whether answers were waited for in vain."""

    x: Tensor | None
    ended: float
    in_vain: bool


class TorchRows:
    """Each function by PyTorch's operators."""

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        """RMS norm of x [rows, H] times `weight` [H] float32."""
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
        """x + norm(y) * weight in x's dtype; that sum's norm times `first` [H] and `second` in x's dtype,
        and times `third` (None: 1) in float32."""
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
        """(x + norm(dense + norm(moe) * moe_weight) * weight) * scalar; without moe: norm(dense)."""
        if moe is not None:
            dense = dense + self.norm(moe, moe_weight, eps, x.dtype)
        return (x + self.norm(dense, weight, eps, x.dtype)) * scalar

    def heads(
        self,
        projected: Tensor,
        weight: Tensor,
        values: int,
        value_norm: bool,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Projections [rows, heads * D] float32 to queries and keys [rows, N + V, D], normalised, times
        `weight` [N + V, D] and turned by cos and sin [rows, 1, D]; and the last `values` heads [rows, V, D],
        normalised if `value_norm`."""
        turning, size = weight.shape
        heads = projected.view(len(projected), -1, size)
        normed = F.rms_norm(heads, (size,), None, eps)
        x = normed[:, :turning] * weight
        turned = torch.addcmul(x * cos, x.roll(size // 2, -1), sin)
        value = (normed if value_norm else heads)[:, heads.shape[1] - values :]
        return turned.to(dtype), value.to(dtype)

    def gated(self, x: Tensor) -> Tensor:
        """gelu(first half) * second half of x [rows, 2 * I] float32, to [rows, I]."""
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def choose(self, scores: Tensor, k: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest of scores [rows, E] float32, falling, as int16; their softmax times `scale` [E]."""
        # The reference normalises K of E softmax terms: the same as a softmax over the K.
        best, index = torch.topk(scores, k, dim=-1)
        return index.to(torch.int16), torch.softmax(best, dim=-1) * scale[index]

    def attention_in(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        projections: Linear,
        weight: Tensor,
        values: int,
        value_norm: bool,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The norm of x [rows, H], its projections, and `heads` of them."""
        projected = projections(self.norm(x, norm, eps, x.dtype), torch.float32)
        return self.heads(projected, weight, values, value_norm, cos, sin, eps, x.dtype)

    def attention_out(
        self,
        attended: Tensor,
        output: Linear,
        x: Tensor,
        weight: Tensor,
        eps: float,
        first: Tensor,
        second: Tensor | None,
        routing: Routing | None,
        beside: Dense | None = None,
        gives_way: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None, Begun | None]:
        """`residual` of x and `output` of `attended`; then index and weights [rows, K] of the experts.

        The kernels' other threads begin with `beside`, on the second result; `end_mlp` joins them, on this
        thread. It `gives_way` to other processes where one of them is a node.
        """
        scale = None if routing is None else routing.scale
        total, one, two, normed = self.residual(x, output(attended), weight, eps, first, second, scale)
        if routing is None:
            return total, one, two, None, None
        # In float32 throughout: a rounding here would choose another expert.
        choice = self.choose(routing.proj(normed), routing.top_k, routing.per_expert_scale)
        return total, one, two, choice, None

    def mlp(self, x: Tensor, dense: Dense) -> Tensor:
        """The dense network of x [rows, H]."""
        out = dense.down(self.gated(dense.gate_up(x, torch.float32)), x.dtype)
        return out if dense.norm is None else self.norm(out, dense.norm, dense.eps, x.dtype)

    def mlp_until(self, begun: Begun, file: int) -> bool:
        """Works on what `attention_out` has begun, on this thread, until it is all but done or bytes can be
        read from the descriptor `file`: True, and the other threads go on while somebody reads them."""
        raise NotImplementedError

    def end_mlp(self, begun: Begun) -> Tensor:
        """The result of what `attention_out` has begun, ended if it has not."""
        raise NotImplementedError

    def close_mlp(
        self,
        begun: Begun,
        expected: Array[Expected],
        patience: int,
        x: Tensor,
        moe_weight: Tensor,
        weight: Tensor,
        eps: float,
        scalar: float,
    ) -> Closed:
        """`end_mlp`, and `combine` with it, where the `expected` answers, the experts' sum, come meanwhile or
        so many nanoseconds after it."""
        raise NotImplementedError
