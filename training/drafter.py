"""The drafter: Gemma 4's multi-token-prediction assistant, reading the target's state, and how it is
trained.

At position t the assistant knows the last token's embedding, the target's hidden state one position
earlier, and the target's keys and values up to t - 1 of its last sliding and its last full layer. Each
further draft feeds the assistant's own projected state back, at the same position with the same keys and
values. Training unrolls exactly that, against the frozen target's distribution at each following position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from training.loop import Budget, train
from training.muon import make_optimizers
from training.network import FULL, MLP, SLIDING, Architecture, Decoder, RMSNorm, Rope, windowed_attention

__all__ = ["Assistant", "DrafterRecipe", "TargetState", "train_drafter"]

LAYER_TYPES = (SLIDING, SLIDING, FULL)


class TargetState(NamedTuple):
    """What the assistant reads: embeddings and hidden states [batch, length, H], and the keys and values
    [batch, kv_heads, length, head_dim] by layer type."""

    embedded: Tensor
    hidden: Tensor
    memory: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, target: Decoder, ids: Tensor) -> TargetState:
        hidden, states = target(ids)
        memory = {
            layer_type: (state.keys, state.values)
            for layer_type, state in zip(target.architecture.layer_types, states, strict=True)
        }  # later layers overwrite earlier ones: the last of each type remains
        embedded = target.embed_tokens(ids) * target.architecture.hidden_size**0.5
        return cls(embedded, hidden, memory)


class _Attention(nn.Module):
    def __init__(self, a: Architecture, layer_type: str) -> None:
        super().__init__()
        self.layer_type = layer_type
        self.heads = a.num_attention_heads
        self.head_dim = a.head_dim if layer_type == SLIDING else a.global_head_dim
        self.window = a.sliding_window
        self.q_proj = nn.Linear(a.hidden_size, self.heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, a.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, a.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, memory: tuple[Tensor, Tensor], trained: bool) -> Tensor:
        """`trained`: one query per position of the memory, seeing what comes before it; else all of the
        memory.
        """
        q = rope.rotate(
            self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)
        )
        keys, values = memory
        if not trained:
            if self.layer_type == SLIDING:
                keys, values = keys[:, :, -self.window :], values[:, :, -self.window :]
            out = F.scaled_dot_product_attention(q, keys, values, scale=1.0, enable_gqa=True)
        elif self.layer_type == SLIDING:
            out = windowed_attention(q, keys, values, self.window, nearest=1)
        else:
            length = q.shape[2]
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril(-1)
            seen[0, 0] = True  # position 0 has nothing before it; its row is never used
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=1.0, enable_gqa=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


class _Layer(nn.Module):
    def __init__(self, a: Architecture, intermediate_size: int, layer_type: str) -> None:
        super().__init__()
        self.self_attn = _Attention(a, layer_type)
        self.mlp = MLP(a.hidden_size, intermediate_size)
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps, 0.5)
        self.pre_feedforward_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps, 0.5)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, rope: Rope, memory: tuple[Tensor, Tensor], trained: bool) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), rope, memory, trained)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar


class _Trunk(nn.Module):
    def __init__(self, a: Architecture, intermediate_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        self.layers = nn.ModuleList(_Layer(a, intermediate_size, layer_type) for layer_type in LAYER_TYPES)
        self.norm = RMSNorm(a.hidden_size, a.rms_norm_eps)


class Assistant(nn.Module):
    """Names as in a `gemma4_assistant` checkpoint. Its hidden size is the target's."""

    def __init__(self, a: Architecture, intermediate_size: int) -> None:
        super().__init__()
        self.architecture = a
        self.model = _Trunk(a, intermediate_size)
        self.pre_projection = nn.Linear(2 * a.hidden_size, a.hidden_size, bias=False)
        self.post_projection = nn.Linear(a.hidden_size, a.hidden_size, bias=False)

    @torch.no_grad()
    def start_from(self, target: Decoder, generator: torch.Generator) -> None:
        """Begin near the target: its embedding as the head, and the attention of the very layers whose keys
        and values are read.
        """
        size = self.architecture.hidden_size
        sources = dict(zip(target.architecture.layer_types, target.layers, strict=True))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        self.model.embed_tokens.weight.copy_(target.embed_tokens.weight)
        self.model.norm.weight.copy_(target.norm.weight)
        for layer, layer_type in zip(self.model.layers, LAYER_TYPES, strict=True):
            source = sources[layer_type]
            for name in ("q_proj", "q_norm", "o_proj"):
                getattr(layer.self_attn, name).weight.copy_(getattr(source.self_attn, name).weight)
        eye = torch.eye(size)
        self.pre_projection.weight.copy_(torch.cat((0.5 * eye, 0.5 * eye), dim=1))
        self.post_projection.weight.copy_(eye)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        ropes: dict[str, Rope],
        state: dict[str, tuple[Tensor, Tensor]],
        trained: bool,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings and states [batch, length, H] -> logits [batch, length, V] and the states to feed
        back.
        """
        x = self.pre_projection(torch.cat((embedded, hidden), dim=-1))
        for layer, layer_type in zip(self.model.layers, LAYER_TYPES, strict=True):
            x = layer(x, ropes[layer_type], state[layer_type], trained)
        x = self.model.norm(x)
        return F.linear(x, self.model.embed_tokens.weight), self.post_projection(x)

    def ropes(self, positions: Tensor) -> dict[str, Rope]:
        a = self.architecture
        return {
            SLIDING: Rope.make(SLIDING, a.head_dim, positions),
            FULL: Rope.make(FULL, a.global_head_dim, positions),
        }


@dataclass(frozen=True)
class DrafterRecipe:
    intermediate_size: int = 384
    seed: int = 2
    length: int = 256
    rows: int = 4
    depth: int = 5
    temperature: float = 0.7
    decay: float = 0.85  # later drafts are reached less often
    matrix_lr: float = 0.01
    embedding_lr: float = 0.002
    vector_lr: float = 0.002
    weight_decay: float = 0.01
    overlap: float = (
        0.5  # share of the loss that is the rejection probability itself, the rest is cross-entropy
    )
    warmup: int = 50
    stable: float = 0.3
    tokens: int = 100_000_000
    minutes: float = 19.6


def unrolled_loss(
    assistant: Assistant, target: Decoder, ids: Tensor, recipe: DrafterRecipe
) -> tuple[Tensor, list[float]]:
    """`ids` [batch, length]: the mean loss over positions and depths, and the mean acceptance by depth."""
    state = TargetState.of(target, ids)
    count = ids.shape[1] - recipe.depth
    ropes = assistant.ropes(torch.arange(count, device=ids.device))
    memory = {name: (k[:, :, :count], v[:, :, :count]) for name, (k, v) in state.memory.items()}
    with torch.no_grad():
        wanted = (target.logits(state.hidden) / recipe.temperature).softmax(dim=-1)
    hidden = F.pad(state.hidden[:, : count - 1], (0, 0, 1, 0))
    total = torch.zeros((), device=ids.device)
    weights = 0.0
    accepted = []
    for step in range(recipe.depth):
        embedded = state.embedded[:, step : step + count]
        logits, hidden = assistant(embedded, hidden, ropes, memory, True)
        p = wanted[:, step + 1 : step + count]
        log_q = (logits[:, 1:] / recipe.temperature).log_softmax(dim=-1)
        overlap = torch.minimum(p, log_q.exp()).sum(-1).mean()
        entropy = -(p * log_q).sum(-1).mean()
        weight = recipe.decay**step
        total = total + weight * (recipe.overlap * (1 - overlap) * 4 + (1 - recipe.overlap) * entropy)
        weights += weight
        accepted.append(float(overlap.detach()))
    return total / weights, accepted


def train_drafter(
    recipe: DrafterRecipe,
    target: Decoder,
    batch_of: Callable[[int], np.ndarray],
    folder: Path,
    device: str,
    console: Console,
) -> tuple[Assistant, dict[str, float]]:
    """Train, or resume from `folder`. `batch_of(step)` gives token windows [rows, length]."""
    target.requires_grad_(False)
    assistant = Assistant(target.architecture, recipe.intermediate_size)
    assistant.start_from(target, torch.Generator().manual_seed(recipe.seed))
    assistant.to(device)
    optimizers = make_optimizers(
        assistant,
        matrix_lr=recipe.matrix_lr,
        embedding_lr=recipe.embedding_lr,
        vector_lr=recipe.vector_lr,
        weight_decay=recipe.weight_decay,
    )
    smooth = [0.0] * recipe.depth

    def loss_of(step: int, progress: float) -> tuple[Tensor, int]:
        ids = torch.from_numpy(batch_of(step).astype(np.int64)).to(device)
        loss, accepted = unrolled_loss(assistant, target, ids, recipe)
        for index, value in enumerate(accepted):
            smooth[index] += 0.02 * (value - smooth[index])
        return loss, ids.numel()

    def report() -> str:
        return "acceptance by depth " + " ".join(f"{value:.3f}" for value in smooth)

    counters = train(
        assistant,
        optimizers,
        loss_of,
        name="drafter",
        budget=Budget(recipe.tokens, recipe.minutes),
        folder=folder,
        warmup=recipe.warmup,
        stable=recipe.stable,
        report=report,
        report_seconds=60.0,
        console=console,
    )
    return assistant, counters
