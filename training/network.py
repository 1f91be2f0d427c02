"""Gemma 4's text architecture, batched and differentiable, for training on a CPU or a GPU.

The parameter names are the published checkpoint's. The arithmetic is the reference implementation's (a test
compares the logits), arranged for training: whole sequences only, sliding layers in blocks of one window,
and the experts as one grouped matrix product over rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.grouped import grouped_product

__all__ = [
    "FULL",
    "MLP",
    "SLIDING",
    "Architecture",
    "Decoder",
    "Layer",
    "LayerState",
    "RMSNorm",
    "Rope",
    "soft_cap",
    "windowed_attention",
]

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Architecture:
    """The target's sizes; names as in the checkpoint's configuration."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 6
    full_every: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_global_key_value_heads: int = 1
    global_head_dim: int = 64
    sliding_window: int = 64
    num_experts: int = 64
    top_k_experts: int = 4
    moe_intermediate_size: int = 32
    final_logit_softcapping: float = 30.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096

    @property
    def layer_types(self) -> tuple[str, ...]:
        return tuple(
            FULL if (index + 1) % self.full_every == 0 else SLIDING for index in range(self.num_hidden_layers)
        )


class LayerState(NamedTuple):
    """What one layer leaves behind: its keys and values [batch, kv_heads, length, head_dim] for the
    drafter, its router's load-balancing loss (scalar), and the share of assignments per expert
    [num_experts].
    """

    keys: Tensor
    values: Tensor
    balance: Tensor
    load: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, initial: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), initial))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rope(NamedTuple):
    """Rotations by position: cosines and sines [length, head_dim]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def make(cls, layer_type: str, head_dim: int, positions: Tensor) -> Rope:
        """Sliding layers turn every pair; full ones only a quarter of them, at the frequencies of the whole
        head.
        """
        theta, part = (10_000.0, 1.0) if layer_type == SLIDING else (1_000_000.0, 0.25)
        pairs = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float32)
        frequencies = theta ** (-2.0 * pairs / head_dim) * (pairs < int(part * head_dim // 2))
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos(), angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        """`x` [..., length, head_dim]."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


class Attention(nn.Module):
    """Grouped-query attention; full layers take their values from the key projection (`attention_k_eq_v`)."""

    def __init__(self, a: Architecture, layer_type: str) -> None:
        super().__init__()
        full = layer_type == FULL
        self.window = 0 if full else a.sliding_window
        self.heads = a.num_attention_heads
        self.kv_heads = a.num_global_key_value_heads if full else a.num_key_value_heads
        self.head_dim = a.global_head_dim if full else a.head_dim
        self.q_proj = nn.Linear(a.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(a.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = None if full else nn.Linear(a.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, a.hidden_size, bias=False)
        # The reference scales scores by 1, so the norms carry the usual head_dim ** -0.5 between them.
        self.q_norm = RMSNorm(self.head_dim, a.rms_norm_eps, self.head_dim**-0.25)
        self.k_norm = RMSNorm(self.head_dim, a.rms_norm_eps, self.head_dim**-0.25)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, length, head_dim] as the scores use them."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rope.rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2))
        k_raw = self.k_proj(x).view(heads)
        v_raw = k_raw if self.v_proj is None else self.v_proj(x).view(heads)
        k = rope.rotate(self.k_norm(k_raw).transpose(1, 2))
        return q, k, F.rms_norm(v_raw, (self.head_dim,), None, self.q_norm.eps).transpose(1, 2)

    def output(self, attended: Tensor) -> Tensor:
        """[batch, heads, length, head_dim] -> [batch, length, H]."""
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(x, rope)
        if self.window and x.shape[1] > self.window:
            out = windowed_attention(q, k, v, self.window)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
        return self.output(out), k, v


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, nearest: int = 0) -> Tensor:
    """Causal attention over `window` positions, the last of them `nearest` (0 or 1) before the query's own.

    Each block of queries sees its own and the previous block. A row that may see nothing comes out as
    garbage.
    """
    batch, heads, length, dim = q.shape
    groups = heads // k.shape[1]
    blocks = -(-length // window)
    pad = blocks * window - length
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))

    def with_previous(x: Tensor) -> Tensor:
        own = x.view(batch, -1, blocks, window, dim)
        before = F.pad(own, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.cat((before, own), dim=3)

    queries = q.view(batch, -1, groups, blocks, window, dim).transpose(2, 3)
    queries = queries.reshape(batch, -1, blocks, groups * window, dim)
    distance = (
        torch.arange(window, device=q.device)[:, None] + window - torch.arange(2 * window, device=q.device)
    )
    seen = (distance >= nearest) & (distance < window + nearest)
    first = torch.arange(blocks, device=q.device)[:, None, None] > 0
    seen = seen & (
        first | (distance <= torch.arange(window, device=q.device)[:, None])
    )  # nothing before block 0
    bias = torch.zeros(seen.shape, device=q.device).masked_fill(~seen, -1e9).repeat(1, groups, 1)
    scores = queries @ with_previous(k).transpose(-1, -2) + bias
    out = scores.softmax(dim=-1) @ with_previous(v)
    out = out.view(batch, -1, blocks, groups, window, dim).transpose(2, 3)
    return out.reshape(batch, heads, blocks * window, dim)[:, :, :length]


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return out


class Router(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.top_k, self.eps = a.top_k_experts, a.rms_norm_eps
        self.proj = nn.Linear(a.hidden_size, a.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(a.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(a.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [rows, H] -> probabilities [rows, E], weights [rows, K], experts [rows, K]."""
        size = x.shape[-1]
        x = F.rms_norm(x, (size,), None, self.eps) * self.scale * size**-0.5
        probabilities = self.proj(x).softmax(dim=-1)
        weights, index = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return probabilities, weights * self.per_expert_scale[index], index


class _Sort(torch.autograd.Function):
    """Rows repeated `top_k` times and permuted; the backward gathers instead of scattering, which is far
    faster.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(-1, ctx.top_k, grad.shape[-1]).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(order)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


def _sorted(x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    return cast(Tensor, _Sort.apply(x, order, inverse, top_k))  # type: ignore[no-untyped-call]


def _unsorted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return cast(Tensor, _Unsort.apply(x, order, inverse))  # type: ignore[no-untyped-call]


class Experts(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.empty(a.num_experts, 2 * a.moe_intermediate_size, a.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(a.num_experts, a.hidden_size, a.moe_intermediate_size))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows, top_k = index.shape
        assigned = index.reshape(-1)
        order = assigned.argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        counts = torch.zeros(self.gate_up_proj.shape[0], dtype=torch.int32, device=x.device)
        counts = counts.index_add(0, assigned, torch.ones_like(assigned, dtype=torch.int32))
        ends = counts.cumsum(0, dtype=torch.int32)
        inner = grouped_product(_sorted(x, order, inverse, top_k), self.gate_up_proj, ends)
        gate, up = inner.chunk(2, dim=-1)
        outer = grouped_product(F.gelu(gate, approximate="tanh") * up, self.down_proj, ends)
        outer = _unsorted(outer, order, inverse).view(rows, top_k, -1)
        return (outer * weights[:, :, None]).sum(dim=1)


class Layer(nn.Module):
    def __init__(self, a: Architecture, layer_type: str) -> None:
        super().__init__()

        def norm(initial: float = 1.0) -> RMSNorm:
            return RMSNorm(a.hidden_size, a.rms_norm_eps, initial)

        self.layer_type = layer_type
        self.num_experts = a.num_experts
        self.self_attn = Attention(a, layer_type)
        self.mlp = MLP(a.hidden_size, a.intermediate_size)
        self.router = Router(a)
        self.experts = Experts(a)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm(0.5)
        self.pre_feedforward_layernorm = norm()
        self.pre_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm_1 = norm()
        self.post_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm = norm(0.5)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, LayerState]:
        attended, keys, values = self.self_attn(self.input_layernorm(x), rope)
        x = x + self.post_attention_layernorm(attended)
        x, probabilities, index = self.feed_forward(x)
        load = torch.zeros(self.num_experts, device=x.device).index_add(
            0, index.reshape(-1), torch.ones(index.numel(), device=x.device)
        )
        load = load / index.numel()
        balance = self.num_experts * (load * probabilities.mean(dim=0)).sum()
        return x, LayerState(keys, values, balance, load)

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The dense MLP and the routed experts side by side; also the router's probabilities and choices by
        row.
        """
        rows = x.reshape(-1, x.shape[-1])
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        probabilities, weights, index = self.router(rows)
        routed = self.experts(self.pre_feedforward_layernorm_2(rows), index, weights)
        routed = self.post_feedforward_layernorm_2(routed).view_as(x)
        x = (x + self.post_feedforward_layernorm(dense + routed)) * self.layer_scalar
        return x, probabilities, index


class Decoder(nn.Module):
    """The whole target: embeddings, layers, final norm; `logits` shares the embedding."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.architecture = a
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        self.layers = nn.ModuleList(Layer(a, layer_type) for layer_type in a.layer_types)
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Every projection by its fan-in; the router at unit scale, because its input is a unit vector."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            fan_in = 1 if name.endswith("router.proj.weight") else parameter.shape[-1]
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)

    def forward(
        self, ids: Tensor, layers: Sequence[Callable[[Tensor, Rope], tuple[Tensor, LayerState]]] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """`ids` [batch, length] -> final-normed hidden states [batch, length, H] and what each layer left.

        `layers` replaces the model's own by compiled versions of them."""
        a = self.architecture
        positions = torch.arange(ids.shape[1], device=ids.device)
        ropes = {
            SLIDING: Rope.make(SLIDING, a.head_dim, positions),
            FULL: Rope.make(FULL, a.global_head_dim, positions),
        }
        x = self.embed_tokens(ids) * a.hidden_size**0.5
        states = []
        run: Sequence[Callable[..., Any]] = layers or list(self.layers)
        for layer, layer_type in zip(run, a.layer_types, strict=True):
            x, state = layer(x, ropes[layer_type])
            states.append(state)
        return self.norm(x), states

    def logits(self, hidden: Tensor) -> Tensor:
        return soft_cap(F.linear(hidden, self.embed_tokens.weight), self.architecture.final_logit_softcapping)
