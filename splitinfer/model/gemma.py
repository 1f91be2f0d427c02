"""Gemma 4's text model with its mixture of experts, in one reading. Reference: transformers' `models/gemma4`.

Shape letters: rows (of all sequences in the step), H hidden_size, N query heads, V key/value heads,
D head_dim, E num_experts, K top_k_experts, I intermediate sizes.

    x ─ norm ─ attention ─ norm ─ + ─┬─ norm ─ dense MLP ─ norm ──── + ─ norm ─ + ─ × layer_scalar
                                  x  ├─ router ─ top K ┐             │       x
                                     └─ norm ──────────┴─ experts ─ norm

Everything but attention is row-wise, so several sequences share a step; attention runs per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from splitinfer.errors import UsageError
from splitinfer.model.attention import Block, Rotation, attend, plan_blocks, rotary_frequencies, rotation
from splitinfer.model.cache import KVCache
from splitinfer.model.compute import compute
from splitinfer.model.config import ModelConfig
from splitinfer.model.experts import Experts
from splitinfer.model.front import Front
from splitinfer.model.linear import Linear
from splitinfer.model.native import DTYPES, kernels
from splitinfer.model.quantize import Packed, QuantConfig, format_of, natural_format, quantize
from splitinfer.model.row_kernels import row_ops
from splitinfer.model.rows import Routing
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline, perf_counter

__all__ = ["Gemma", "Segment"]


class Segment(NamedTuple):
    """The rows of one sequence in a step: token_ids [n] int64, at the positions that follow the cache's."""

    token_ids: Tensor
    cache: KVCache


class Routed(NamedTuple):
    """What the router hands on: the residual and both branches' inputs [rows, H], and the choice: index and
    weights [rows, K]. The last two are None in a model without experts."""

    residual: Tensor
    dense_input: Tensor
    expert_input: Tensor | None
    chosen: tuple[Tensor, Tensor] | None


class _Part(NamedTuple):
    """One sequence's share of a step: rows `lo` to `hi` of it, from position `start` on."""

    lo: int
    hi: int
    start: int
    cache: KVCache
    blocks: dict[str, list[Block]]  # by layer type; empty where the kernels attend


class _Step(NamedTuple):
    """What all layers share in a step."""

    parts: list[_Part]
    rotations: dict[str, Rotation]  # by layer type
    timeline: Timeline | None
    front: Front | None

    def leave(self, layer: int) -> None:
        """The keys and values of `layer` are in the cache."""
        if self.front is not None:
            self.front.leave(layer)

    def record(self, phase: str, layer: int, start: float) -> float:
        """Ends a span that began at `start`; returns the present, where the next may begin."""
        now = perf_counter()
        if self.timeline is not None:
            self.timeline.add(phase, layer, start, now)
        return now


class _Weights:
    """Takes one prefix's tensors from a checkpoint, in the format that the arithmetic wants."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        device: torch.device,
        dtype: torch.dtype,
        quant: QuantConfig,
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.device = device
        self.dtype = dtype
        self.quant = quant

    def plain(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.checkpoint.tensor(self.prefix + name).to(self.device, dtype or self.dtype)

    def packed(self, name: str, format: str | None) -> Packed:
        name = f"{self.prefix}{name}.weight"
        return self.checkpoint.matrix(name, format, floating=format_of(self.dtype))

    def linear(self, format: str | None, *names: str) -> Linear:
        """Matrices that share their input, as one product."""
        return Linear(*(self.packed(name, format) for name in names), device=self.device)

    def exact(self, name: str) -> Linear:
        """A small matrix that no setting rounds."""
        tensor = self.checkpoint.tensor(f"{self.prefix}{name}.weight")
        return Linear(quantize(tensor, natural_format(tensor.dtype)), device=self.device)

    def scale(self, name: str) -> Tensor:
        """A norm's weights."""
        return self.plain(name + ".weight", torch.float32)


class _Attention:
    """Grouped-query attention with normalised queries, keys and values."""

    def __init__(self, weights: _Weights, config: ModelConfig, layer: int) -> None:
        shape = config.attention[layer]
        self.layer = layer
        self.kind = shape.layer_type
        self.window = shape.window
        self.heads = config.num_attention_heads
        self.kv_heads = shape.num_key_value_heads
        self.head_dim = shape.head_dim
        self.eps = config.rms_norm_eps
        projections = ["q_proj", "k_proj"] if shape.k_eq_v else ["q_proj", "k_proj", "v_proj"]
        self.projections = weights.linear(
            weights.quant.attention, *(f"self_attn.{name}" for name in projections)
        )
        q_norm = weights.plain("self_attn.q_norm.weight", torch.float32)
        k_norm = weights.plain("self_attn.k_norm.weight", torch.float32)
        # One factor per head for queries and keys together [N + V, D]: one product where there would be two.
        self.qk_scale = torch.cat((q_norm.expand(self.heads, -1), k_norm.expand(self.kv_heads, -1)))
        self.output = weights.linear(weights.quant.attention, "self_attn.o_proj")
        self.kernels = kernels() if weights.device.type == "cpu" and weights.dtype in DTYPES else None
        self.ops = row_ops(weights.device, weights.dtype)
        self.norm = weights.scale("input_layernorm")

    def __call__(self, x: Tensor, step: _Step) -> Tensor:
        """x [rows, H] to [rows, N * D], before the output projection; appends to every part's cache."""
        # N + V + V heads, or N + V where keys are values; these have a norm without weight and do not turn.
        turned, values = self.ops.attention_in(
            x, self.norm, self.eps, self.projections, self.qk_scale, self.kv_heads, *step.rotations[self.kind]
        )
        attended = []
        for part in step.parts:
            keys, seen_values = part.cache.append(
                self.layer,
                part.start,
                turned[part.lo : part.hi, self.heads :].transpose(0, 1),
                values[part.lo : part.hi].transpose(0, 1),
            )
            queries = turned[part.lo : part.hi, : self.heads]
            if self.kernels is not None:
                attended.append(self.kernels.attend(queries, keys, seen_values, self.window))
            else:
                attended.append(attend(queries, keys, seen_values, part.blocks[self.kind]))
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class _Layer:
    """One decoder layer. `route` runs before the experts, `dense` beside them, `combine` after."""

    def __init__(self, weights: _Weights, config: ModelConfig, layer: int) -> None:
        self.index = layer
        self.eps = config.rms_norm_eps
        self.attention = _Attention(weights, config, layer)
        self.gate_up = weights.linear(weights.quant.dense, "mlp.gate_proj", "mlp.up_proj")
        self.down = weights.linear(weights.quant.dense, "mlp.down_proj")
        self.ops = row_ops(weights.device, weights.dtype)
        self.post_attention_scale = weights.scale("post_attention_layernorm")
        self.post_feedforward_scale = weights.scale("post_feedforward_layernorm")
        self.scalar = float(weights.plain("layer_scalar", torch.float32))
        self.dense_scale = weights.scale("pre_feedforward_layernorm")
        self.dense_out_scale: Tensor | None = None
        self.expert_scale: Tensor | None = None
        self.expert_out_scale: Tensor | None = None
        self.routing: Routing | None = None
        if config.enable_moe_block:
            self.dense_out_scale = weights.scale("post_feedforward_layernorm_1")
            self.expert_scale = weights.scale("pre_feedforward_layernorm_2")
            self.expert_out_scale = weights.scale("post_feedforward_layernorm_2")
            self.routing = Routing(
                weights.plain("router.scale", torch.float32) * config.hidden_size**-0.5,
                weights.exact("router.proj"),
                config.top_k_experts,
                weights.plain("router.per_expert_scale", torch.float32),
            )

    def route(self, x: Tensor, step: _Step) -> Routed:
        """Attention, the choice of experts, and the inputs of both branches.

        The reference has three norms here that differ only in their weights.
        """
        start = perf_counter()
        attended = self.attention(x, step)
        x, dense_input, expert_input, chosen = self.ops.attention_out(
            attended,
            self.attention.output,
            x,
            self.post_attention_scale,
            self.eps,
            self.dense_scale,
            self.expert_scale,
            self.routing,
        )
        step.record("attention", self.index, start)
        return Routed(x, dense_input, expert_input, chosen)

    def dense(self, x: Tensor, step: _Step) -> Tensor:
        start = perf_counter()
        x = self.ops.mlp(x, self.gate_up, self.down, self.dense_out_scale, self.eps)
        step.record("dense", self.index, start)
        return x

    def combine(self, residual: Tensor, dense: Tensor, moe: Tensor | None, step: _Step) -> Tensor:
        start = perf_counter()
        x = self.ops.combine(
            residual, dense, moe, self.expert_out_scale, self.post_feedforward_scale, self.eps, self.scalar
        )
        step.record("combine", self.index, start)
        return x

    def without_experts(self, x: Tensor, step: _Step) -> Tensor:
        """The whole layer of a model that has no mixture of experts."""
        to = self.route(x, step)
        return self.combine(to.residual, self.dense(to.dense_input, step), None, step)


class Gemma:
    """The text model without its experts' weights: those are reached through `experts`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        experts: Experts | None,
        device: torch.device,
        dtype: torch.dtype,
        quant: QuantConfig,
    ) -> None:
        config = checkpoint.config
        if config.enable_moe_block and experts is None:
            raise UsageError("a model with a mixture of experts needs experts")
        self.config = config
        self.experts = experts
        self.device = device
        self.dtype = dtype
        weights = _Weights(checkpoint, "", device, dtype, quant)
        self._ops = row_ops(device, dtype)
        self._final_scale = weights.scale("norm")
        tied = config.tie_word_embeddings
        head = weights.packed("embed_tokens" if tied else "lm_head", quant.lm_head)
        self._head = Linear(head, device=device)
        shared = tied and quant.embeddings in (None, quant.lm_head)
        self._embedding = head if shared else weights.packed("embed_tokens", quant.embeddings)
        # The reference rounds the factor to the weights' dtype: 53.0 for 53.07 in bfloat16.
        self._embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=dtype))
        self._layers = [
            _Layer(_Weights(checkpoint, f"layers.{i}.", device, dtype, quant), config, i)
            for i in range(config.num_hidden_layers)
        ]
        self._masks = device.type != "cpu" or dtype not in DTYPES or kernels() is None
        self._kinds = {attention.layer_type: attention for attention in config.attention}
        self._frequencies = {k: rotary_frequencies(attention, device) for k, attention in self._kinds.items()}

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts: Experts | None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        quant: QuantConfig | None = None,
    ) -> Gemma:
        """Everything but the experts, from the mapped checkpoint. `dtype` None computes in the stored one.

        `quant` says which parts to convert; the experts' format is their bank's affair.
        """
        with torch.inference_mode():
            dtype = dtype or checkpoint.dtype
            return cls(checkpoint, experts, torch.device(device), dtype, quant or QuantConfig())

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that every token's pass and logits read: all but experts and embeddings."""
        linears = [self._head]
        for layer in self._layers:
            linears += [layer.attention.projections, layer.attention.output, layer.gate_up, layer.down]
            if layer.routing is not None:
                linears.append(layer.routing.proj)
        return sum(linear.nbytes for linear in linears)

    def new_cache(self) -> KVCache:
        """An empty cache of this model's shapes, on its device."""
        return KVCache(self.config, self.device, self.dtype)

    async def forward(
        self,
        segments: Sequence[Segment],
        *,
        timeline: Timeline | None = None,
        front: Front | None = None,
    ) -> Tensor:
        """Final hidden states [rows, H] of all segments' rows, in order; every cache grows by its rows.

        With a `front` it stays behind the step before it, which may still be under way. A failed or cancelled
        call takes its rows back from the caches. Raises UsageError for no rows, for a token id outside the
        vocabulary and for a sequence beyond the context.
        """
        token_ids = self._token_ids(segments)
        rows = len(token_ids)
        starts: list[tuple[KVCache, int]] = []
        try:
            for segment in segments:
                starts.append((segment.cache, segment.cache.begin(len(segment.token_ids))))
            step = await compute(rows, self._plan, starts, segments, timeline, front)
            x = await compute(rows, self.embed, token_ids)
            for layer in self._layers:
                if front is not None:
                    await front.enter(layer.index)
                x = await self._layer(layer, x, step)
            return await compute(rows, self._norm, x)
        except BaseException:
            for cache, start in starts:
                cache.abandon(start)
            raise

    def logits(self, hidden: Tensor, *, timeline: Timeline | None = None) -> Tensor:
        """Soft-capped logits [rows, vocab_size] float32 of final hidden states [rows, H]."""
        start = perf_counter()
        with torch.inference_mode():
            logits = self._head(hidden, torch.float32)
            cap = self.config.final_logit_softcapping
            if cap is not None:
                logits = logits.div_(cap).tanh_().mul_(cap)
        if timeline is not None:
            timeline.add("head", -1, start, perf_counter())
        return logits

    async def _layer(self, layer: _Layer, x: Tensor, step: _Step) -> Tensor:
        rows = len(x)
        if self.experts is None:
            x = await compute(rows, layer.without_experts, x, step)
            step.leave(layer.index)
            return x
        to = await compute(rows, layer.route, x, step)
        assert to.expert_input is not None
        assert to.chosen is not None
        step.leave(layer.index)
        routed = self.experts.dispatch(layer.index, to.expert_input, *to.chosen, step.timeline)
        try:
            dense = await compute(rows, layer.dense, to.dense_input, step)
        except BaseException:
            cancel = getattr(routed, "cancel", None)
            if cancel is not None:
                cancel()
            raise
        moe = await routed
        return await compute(rows, layer.combine, to.residual, dense, moe.to(self.device), step)

    def _norm(self, x: Tensor) -> Tensor:
        return self._ops.norm(x, self._final_scale, self.config.rms_norm_eps, x.dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Scaled embeddings [rows, H], as the first layer gets them."""
        rows = self._embedding.widen(token_ids.cpu()).to(self.device, self.dtype)
        return rows * self._embedding_scale

    def _token_ids(self, segments: Sequence[Segment]) -> Tensor:
        if not segments or not all(len(segment.token_ids) for segment in segments):
            raise UsageError("a step needs at least one token in every segment")
        parts = [segment.token_ids for segment in segments]
        token_ids = parts[0] if len(parts) == 1 else torch.cat(parts)
        low, high = token_ids.aminmax()
        if int(low) < 0 or int(high) >= self.config.vocab_size:
            wrong = int(low) if int(low) < 0 else int(high)
            raise UsageError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        return token_ids.to(self.device)

    def _plan(
        self,
        starts: Sequence[tuple[KVCache, int]],
        segments: Sequence[Segment],
        timeline: Timeline | None,
        front: Front | None,
    ) -> _Step:
        parts, positions, lo = [], [], 0
        for (cache, start), segment in zip(starts, segments, strict=True):
            n = len(segment.token_ids)
            blocks = {}
            for kind, shape in self._kinds.items() if self._masks else ():
                group = self.config.num_attention_heads // shape.num_key_value_heads
                blocks[kind] = plan_blocks(start, n, shape.window, group, self.dtype, self.device)
            parts.append(_Part(lo, lo + n, start, cache, blocks))
            positions.append(torch.arange(start, start + n, device=self.device))
            lo += n
        where = positions[0] if len(positions) == 1 else torch.cat(positions)
        rotations = {kind: rotation(f, where) for kind, f in self._frequencies.items()}
        return _Step(parts, rotations, timeline, front)
