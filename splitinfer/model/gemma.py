"""Gemma 4's text model with its mixture of experts: embedding, layers, logits. `model.layers` has the layers.

Shape letters: rows (of all sequences in the step), H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from splitinfer.errors import UsageError
from splitinfer.model.attention import plan_blocks
from splitinfer.model.cache import KVCache
from splitinfer.model.compute import compute, run, runs_inline
from splitinfer.model.experts import Arriving, Experts
from splitinfer.model.front import Front
from splitinfer.model.layers import DecoderLayer, Part, Step, Weights
from splitinfer.model.linear import Linear
from splitinfer.model.native import DTYPES, kernels
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.rotary import Rotary
from splitinfer.model.row_kernels import row_ops
from splitinfer.model.staging import Staging
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline, perf_counter

__all__ = ["Gemma", "Segment"]


class Segment(NamedTuple):
    """The rows of one sequence in a step: token_ids [n] int64, at the positions that follow the cache's."""

    token_ids: Tensor
    cache: KVCache


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
        self.experts = experts if config.enable_moe_block else None
        self.device = device
        self.dtype = dtype
        weights = Weights(checkpoint, "", device, dtype, quant)
        self._ops = row_ops(device, dtype)
        self._staging = Staging(device)
        self._final_scale = weights.scale("norm")
        tied = config.tie_word_embeddings
        head = weights.packed("embed_tokens" if tied else "lm_head", quant.lm_head)
        self._head = Linear(head, device=device)
        shared = tied and quant.embeddings in (None, quant.lm_head)
        self._embedding = head if shared else weights.packed("embed_tokens", quant.embeddings)
        # The reference rounds the factor to the weights' dtype: 53.0 for 53.07 in bfloat16.
        self._embedding_scale = float(torch.tensor(config.hidden_size**0.5, dtype=dtype))
        self._layers = [
            DecoderLayer(Weights(checkpoint, f"layers.{i}.", device, dtype, quant), config, i)
            for i in range(config.num_hidden_layers)
        ]
        self._masks = device.type != "cpu" or dtype not in DTYPES or kernels() is None
        self._kinds = {attention.layer_type: attention for attention in config.attention}
        self._rotary = {kind: Rotary(attention, device) for kind, attention in self._kinds.items()}

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
    def row_invariant(self) -> bool:
        """Whether a row's bits do not depend on the rows beside it: with the kernels, on the CPU."""
        return not self._masks

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that every token's pass and logits read: all but experts and embeddings."""
        linears = [self._head]
        for layer in self._layers:
            linears += [
                layer.attention.projections,
                layer.attention.output,
                layer.mlp.gate_up,
                layer.mlp.down,
            ]
            if layer.routing is not None:
                linears.append(layer.routing.proj)
        return sum(linear.nbytes for linear in linears)

    def new_cache(self, *, int8: bool = False) -> KVCache:
        """An empty cache of this model's shapes, on its device, in its dtype or in int8."""
        return KVCache(self.config, self.device, self.dtype, int8=int8)

    async def forward(
        self,
        segments: Sequence[Segment],
        *,
        timeline: Timeline | None = None,
        front: Front | None = None,
        alone: bool = False,
    ) -> Tensor:
        """Final hidden states [rows, H] of all segments' rows, in order; every cache grows by its rows.

        With a `front` it stays behind the step before it, which may still be under way. While it is `alone`,
        with no other step to alternate with, it may wait for answers without giving the event loop a turn,
        for some 20 ms at a time. A failed or cancelled call takes its rows back from the caches. Raises
        UsageError for no rows, for a token id outside the vocabulary and for a sequence beyond the context.
        """
        token_ids = self._token_ids(segments)
        rows = len(token_ids)
        starts: list[tuple[KVCache, int]] = []
        try:
            for segment in segments:
                starts.append((segment.cache, segment.cache.begin(len(segment.token_ids))))
            step, x = await compute(rows, self._begin, token_ids, starts, segments, timeline, front, alone)
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

    async def _layer(self, layer: DecoderLayer, x: Tensor, step: Step) -> Tensor:
        rows = x.shape[0]
        if self.experts is None:
            x = await compute(rows, layer.without_experts, x, step)
            step.leave(layer.index)
            return x
        if runs_inline(rows, layer.route) and runs_inline(rows, layer.dense):
            prepare = getattr(self.experts, "outgoing", None)  # see `model.experts.Preparing`
            to = run(layer.route, x, step, self.experts.where(layer.index), prepare)
        else:
            to = await compute(rows, layer.route, x, step)
        try:
            assert to.expert_input is not None
            assert to.chosen is not None
            step.leave(layer.index)
            if to.sent is not None:
                closed = layer.close(to, step)
                if closed is not None:
                    return closed
                routed = to.sent.post(to.expert_input, *to.chosen, step.timeline)
            else:
                routed = self.experts.dispatch(layer.index, to.expert_input, *to.chosen, step.timeline)
        except BaseException:
            if to.dense is not None:
                layer.end_dense(to.dense, step)
            raise
        try:
            if to.dense is not None:
                answer = cast(Arriving, routed) if hasattr(routed, "look") else None
                dense = layer.end_dense(to.dense, step, answer)
            else:
                dense = await compute(rows, layer.dense, to.dense_input, step)
        except BaseException:
            cancel = getattr(routed, "cancel", None)
            if cancel is not None:
                cancel()
            raise
        moe = await routed
        return await compute(rows, layer.combine, to.residual, dense, moe, step)

    def _norm(self, x: Tensor) -> Tensor:
        return self._ops.norm(x, self._final_scale, self.config.rms_norm_eps, x.dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Scaled embeddings [rows, H] of CPU ids [rows], as the first layer gets them."""
        rows = self._embedding.rows(token_ids, self.dtype)
        return self._staging.to_device(rows) * self._embedding_scale

    def _token_ids(self, segments: Sequence[Segment]) -> Tensor:
        if not segments or not all(len(segment.token_ids) for segment in segments):
            raise UsageError("a step needs at least one token in every segment")
        parts = [segment.token_ids for segment in segments]
        token_ids = parts[0] if len(parts) == 1 else torch.cat(parts)
        ids = token_ids.tolist()
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise UsageError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        return token_ids

    def _begin(
        self,
        token_ids: Tensor,
        starts: Sequence[tuple[KVCache, int]],
        segments: Sequence[Segment],
        timeline: Timeline | None,
        front: Front | None,
        alone: bool,
    ) -> tuple[Step, Tensor]:
        """What all layers are told about the rows, and these as the first layer gets them."""
        parts, ranges, lo = [], [], 0
        for (cache, start), segment in zip(starts, segments, strict=True):
            n = len(segment.token_ids)
            blocks = {}
            for kind, shape in self._kinds.items() if self._masks else ():
                group = self.config.num_attention_heads // shape.num_key_value_heads
                blocks[kind] = plan_blocks(start, n, shape.window, group, self.dtype, self.device)
            parts.append(Part(lo, lo + n, start, cache, blocks))
            ranges.append((start, start + n))
            lo += n
        rotations = {kind: rotary.at(ranges) for kind, rotary in self._rotary.items()}
        return Step(parts, rotations, self._staging, timeline, front, alone), self.embed(token_ids)
