"""Plain and drafted decoding with kept keys and values, for measuring the drafter and for making it
training text.

This is the trainer's own small reference, one batch of equally long sequences at a time; the product's
engine is elsewhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from training.drafter import Assistant
from training.network import FULL, SLIDING, Decoder, Experts, Rope

__all__ = ["Decoding", "DraftCount", "draft_and_verify", "probabilities", "sample"]


class Decoding:
    """Sequences in progress: `feed` tokens, read hidden states, `truncate` what was rejected."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.length = 0
        self.memory: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """`ids` [batch, n] -> final-normed hidden states [batch, n, H]."""
        a = self.model.architecture
        positions = torch.arange(self.length, self.length + ids.shape[1], device=ids.device)
        ropes = {
            SLIDING: Rope.make(SLIDING, a.head_dim, positions),
            FULL: Rope.make(FULL, a.global_head_dim, positions),
        }
        distance = positions[:, None] - torch.arange(self.length + ids.shape[1], device=ids.device)
        seen = {FULL: distance >= 0, SLIDING: (distance >= 0) & (distance < a.sliding_window)}
        x = self.model.embed_tokens(ids) * a.hidden_size**0.5
        for index, (layer, layer_type) in enumerate(zip(self.model.layers, a.layer_types, strict=True)):
            x = self._layer(index, layer, x, ropes[layer_type], seen[layer_type])
        self.length += ids.shape[1]
        hidden: Tensor = self.model.norm(x)
        return hidden

    def _layer(self, index: int, layer: Any, x: Tensor, rope: Rope, seen: Tensor) -> Tensor:
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), rope)
        if index < len(self.memory):
            old_k, old_v = self.memory[index]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
            self.memory[index] = (k, v)
        else:
            self.memory.append((k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0, enable_gqa=True)
        x = x + layer.post_attention_layernorm(layer.self_attn.output(out))
        rows = x.flatten(0, 1)
        if rows.shape[0] > 32:
            mixed: Tensor = layer.feed_forward(x)[0]
            return mixed
        dense = layer.post_feedforward_layernorm_1(layer.mlp(layer.pre_feedforward_layernorm(x)))
        _, weights, chosen = layer.router(rows)
        routed = _few_rows(layer.experts, layer.pre_feedforward_layernorm_2(rows), chosen, weights)
        routed = layer.post_feedforward_layernorm_2(routed).view_as(x)
        x = x + layer.post_feedforward_layernorm(dense + routed)
        return x * cast(Tensor, layer.layer_scalar)

    def truncate(self, length: int) -> None:
        self.memory = [(k[:, :, :length], v[:, :, :length]) for k, v in self.memory]
        self.length = length

    def shared(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The keys and values that an assistant reads: those of the last layer of each type."""
        return dict(zip(self.model.architecture.layer_types, self.memory, strict=True))


def _few_rows(experts: Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    inner = torch.einsum("rh,rkih->rki", x, experts.gate_up_proj[index])
    gate, up = inner.chunk(2, dim=-1)
    outer = torch.einsum("rki,rkhi->rkh", F.gelu(gate, approximate="tanh") * up, experts.down_proj[index])
    return (outer * weights[:, :, None]).sum(dim=1)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax at a temperature; temperature 0 puts everything on the largest logit."""
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    return (logits / temperature).softmax(dim=-1)


def sample(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(p, 1, generator=generator)[..., 0]


class DraftCount(NamedTuple):
    """`steps` verify passes yielded `tokens` tokens; `reached[d]` of them tried draft d, `accepted[d]` took
    it.
    """

    steps: int
    tokens: int
    reached: list[int]
    accepted: list[int]

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


@torch.no_grad()
def draft_and_verify(
    target: Decoder,
    assistant: Assistant | None,
    prompt: list[int],
    count: int,
    *,
    depth: int,
    temperature: float,
    generator: torch.Generator,
) -> tuple[list[int], DraftCount]:
    """Generate `count` tokens by speculative sampling (Leviathan and others, 2023,
    https://arxiv.org/abs/2211.17192): a draft d is kept with probability min(1, p(d) / q(d)), else the
    token comes from the rest of p. Without an assistant the drafts are looked up in the context.
    """
    decoding = Decoding(target)
    hidden = decoding.feed(torch.tensor([prompt]))[:, -1:]
    ids = [*prompt, int(sample(probabilities(target.logits(hidden)[0, 0], temperature), generator))]
    steps, reached, accepted = 0, [0] * depth, [0] * depth
    beliefs: list[Tensor]
    while len(ids) - len(prompt) < count:
        if assistant is None:
            drafts, beliefs = _look_up(ids, depth), []
        else:
            drafts, beliefs = _draft(decoding, assistant, ids, hidden, depth, temperature, generator)
        rows = decoding.feed(torch.tensor([[ids[-1], *drafts]]))
        wanted = probabilities(target.logits(rows)[0], temperature)
        kept = 0
        following = -1
        for place, draft in enumerate(drafts):
            reached[place] += 1
            q = beliefs[place] if beliefs else F.one_hot(torch.tensor(draft), wanted.shape[-1]).float()
            ratio = wanted[place, draft] / q[draft]
            if torch.rand((), generator=generator) >= ratio:
                following = int(sample((wanted[place] - q).clamp_min(0), generator))
                break
            accepted[place] += 1
            kept += 1
        if following < 0:
            following = int(sample(wanted[kept], generator))
        decoding.truncate(len(ids) + kept)
        hidden = rows[:, kept : kept + 1]
        ids += [*drafts[:kept], following]
        steps += 1
    made = len(ids) - len(prompt) - 1
    return ids, DraftCount(steps, made, reached, accepted)


def _draft(
    decoding: Decoding,
    assistant: Assistant,
    ids: list[int],
    hidden: Tensor,
    depth: int,
    temperature: float,
    generator: torch.Generator,
) -> tuple[list[int], list[Tensor]]:
    target = decoding.model
    ropes = assistant.ropes(torch.tensor([len(ids) - 1]))
    shared = decoding.shared()
    token, drafts, beliefs = ids[-1], [], []
    for _ in range(depth):
        embedded = target.embed_tokens(torch.tensor([[token]])) * target.architecture.hidden_size**0.5
        logits, hidden = assistant(embedded, hidden, ropes, shared, False)
        q = probabilities(logits[0, 0], temperature)
        token = int(sample(q, generator))
        drafts.append(token)
        beliefs.append(q)
    return drafts, beliefs


def _look_up(ids: list[int], depth: int, longest: int = 4, shortest: int = 2) -> list[int]:
    """What followed the last occurrence of the context's final n-gram, longest n first."""
    for size in range(longest, shortest - 1, -1):
        tail = ids[-size:]
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == tail:
                return ids[start + size : start + size + depth]
    return []
