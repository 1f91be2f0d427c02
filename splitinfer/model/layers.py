"""One decoder layer of Gemma 4: before, beside and after its experts. Reference: transformers' `gemma4`.

Shape letters: rows (of all sequences in the step), H hidden_size, N query heads, V key/value heads,
D head_dim, E num_experts, K top_k_experts, I intermediate sizes.

    x ─ norm ─ attention ─ norm ─ + ─┬─ norm ─ dense MLP ─ norm ──── + ─ norm ─ + ─ × layer_scalar
                                  x  ├─ router ─ top K ┐             │       x
                                     └─ norm ──────────┴─ experts ─ norm

Everything but attention is row-wise, so several sequences share a step; attention runs per sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from splitinfer.model.attention import Block, attend
from splitinfer.model.attention_kernel import AttentionKernel
from splitinfer.model.cache import KVCache, Place
from splitinfer.model.compute import took
from splitinfer.model.config import ModelConfig
from splitinfer.model.experts import Arriving, Outgoing, Prepare, Where
from splitinfer.model.front import Front
from splitinfer.model.linear import Linear
from splitinfer.model.native import DTYPES, kernels
from splitinfer.model.quantize import Packed, QuantConfig, format_of, natural_format, quantize
from splitinfer.model.rotary import Rotation
from splitinfer.model.row_kernels import row_ops
from splitinfer.model.rows import Begun, Dense, Routing
from splitinfer.model.staging import Staging
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline, perf_counter

__all__ = ["Attention", "DecoderLayer", "Part", "Routed", "Step", "Weights"]

LOOKS = 3  # for an answer while the dense network runs


class Routed(NamedTuple):
    """What the router hands on: the residual and both branches' inputs [rows, H], and the choice: index and
    weights [rows, K]. These two are None in a model without experts. `dense` is that branch, where it has
    begun, `sent` the expert calls where they are under way."""

    residual: Tensor
    dense_input: Tensor
    expert_input: Tensor | None
    chosen: tuple[Tensor, Tensor] | None
    dense: Begun | None = None
    sent: Outgoing | None = None


class Part(NamedTuple):
    """One sequence's share of a step: rows `lo` to `hi` of it, from position `start` on."""

    lo: int
    hi: int
    start: int
    cache: KVCache
    blocks: dict[str, list[Block]]  # by layer type; empty where the kernels attend


class Step(NamedTuple):
    """What all layers share in a step."""

    parts: list[Part]
    rotations: dict[str, Rotation]  # by layer type
    staging: Staging
    timeline: Timeline | None
    front: Front | None
    alone: bool  # see `Gemma.forward`

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


class Weights:
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
        """What a norm multiplies with."""
        return self.plain(name + ".weight", torch.float32) + self.checkpoint.config.norm_offset


class Attention:
    """Grouped-query attention with normalised queries, keys and values."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int) -> None:
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
        q_norm = weights.scale("self_attn.q_norm") * config.attention_scale
        k_norm = weights.scale("self_attn.k_norm")
        self.value_norm = config.value_norm
        # One factor per head for queries and keys together [N + V, D]: one product where there would be two.
        self.qk_scale = torch.cat((q_norm.expand(self.heads, -1), k_norm.expand(self.kv_heads, -1)))
        self.output = weights.linear(weights.quant.attention, "self_attn.o_proj")
        self.kernels = kernels() if weights.device.type == "cpu" and weights.dtype in DTYPES else None
        self.ops = row_ops(weights.device, weights.dtype)
        self.norm = weights.scale("input_layernorm")

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [rows, H] to [rows, N * D], before the output projection; appends to every part's cache."""
        # N + V + V heads, or N + V where keys are values; these have a norm without weight and do not turn.
        turned, values = self.ops.attention_in(
            x,
            self.norm,
            self.eps,
            self.projections,
            self.qk_scale,
            self.kv_heads,
            self.value_norm,
            *step.rotations[self.kind],
        )
        attended = []
        for part in step.parts:
            held = part.cache.append(
                self.layer,
                part.start,
                turned[part.lo : part.hi, self.heads :].transpose(0, 1),
                values[part.lo : part.hi].transpose(0, 1),
            )
            queries = turned[part.lo : part.hi, : self.heads]
            if self.kernels is not None:
                attended.append(self.kernels.attend(queries, *held, window=self.window))
            else:
                attended.append(attend(queries, held, part.blocks[self.kind]))
        return attended[0] if len(attended) == 1 else torch.cat(attended)


class DecoderLayer:
    """One decoder layer. `route` runs before the experts, `dense` beside them, `combine` after."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int) -> None:
        self.index = layer
        self.eps = config.rms_norm_eps
        self.attention = Attention(weights, config, layer)
        self.ops = row_ops(weights.device, weights.dtype)
        self.post_attention_scale = weights.scale("post_attention_layernorm")
        self.post_feedforward_scale = weights.scale("post_feedforward_layernorm")
        self.scalar = float(weights.plain("layer_scalar", torch.float32)) if config.layer_scalars else 1.0
        self.dense_scale = weights.scale("pre_feedforward_layernorm")
        dense_out_scale: Tensor | None = None
        self.expert_scale: Tensor | None = None
        self.expert_out_scale: Tensor | None = None
        self.routing: Routing | None = None
        if config.enable_moe_block:
            dense_out_scale = weights.scale("post_feedforward_layernorm_1")
            self.expert_scale = weights.scale("pre_feedforward_layernorm_2")
            self.expert_out_scale = weights.scale("post_feedforward_layernorm_2")
            self.routing = Routing(
                weights.plain("router.scale", torch.float32) * config.hidden_size**-0.5,
                weights.exact("router.proj"),
                config.top_k_experts,
                weights.plain("router.per_expert_scale", torch.float32),
            )
        self.mlp = Dense(
            weights.linear(weights.quant.dense, "mlp.gate_proj", "mlp.up_proj"),
            weights.linear(weights.quant.dense, "mlp.down_proj"),
            dense_out_scale,
            self.eps,
        )
        # All that comes before the experts in one call, where the kernels can do it.
        self.kernel: AttentionKernel | None = None
        if AttentionKernel.fits(self.attention, self.routing):
            self.kernel = AttentionKernel(
                self.attention,
                self.post_attention_scale,
                self.dense_scale,
                self.expert_scale,
                self.routing,
                self.mlp,
            )

    def route(self, x: Tensor, step: Step, beside: Where = "here", prepare: Prepare | None = None) -> Routed:
        """Attention, the choice of experts, and the inputs of both branches.

        With experts elsewhere the dense branch begins where it can: then `end_dense` has to follow, whatever
        happens, on the same thread. What `prepare` gives (see `Preparing.outgoing`) may be on its way, too.
        The reference has three norms here that differ only in their weights.
        """
        start = perf_counter()
        places = self._places(x, step) if self.kernel is not None else None
        outgoing: Outgoing | None = None
        if self.kernel is not None and places is not None:
            if prepare is not None and self.routing is not None:
                outgoing = prepare(self.index, x, self.routing.top_k)
            x, dense_input, expert_input, chosen, begun = self.kernel(
                x,
                step.rotations[self.attention.kind],
                places,
                begins=beside != "here",
                gives_way=beside == "near",
                requests=None if outgoing is None else outgoing.requests,
            )
        else:
            x, dense_input, expert_input, chosen, begun = self.ops.attention_out(
                self.attention(x, step),
                self.attention.output,
                x,
                self.post_attention_scale,
                self.eps,
                self.dense_scale,
                self.expert_scale,
                self.routing,
                None if beside == "here" else self.mlp,
                beside == "near",
            )
        if expert_input is not None and chosen is not None:
            expert_input, *choice = step.staging.to_host(expert_input, *chosen)
            chosen = choice[0], choice[1]
        step.record("attention", self.index, start)
        return Routed(x, dense_input, expert_input, chosen, begun, outgoing)

    def _places(self, x: Tensor, step: Step) -> list[tuple[int, Place]] | None:
        """How many rows each sequence has and where its keys and values go; None if one cannot say."""
        if len(step.parts) > 1 and len({id(part.cache) for part in step.parts}) < len(step.parts):
            return None  # a place ends with the next one in the same cache
        places = []
        for part in step.parts:
            place = part.cache.place(self.index, part.start, part.hi - part.lo, x.dtype)
            if place is None:
                return None
            places.append((part.hi - part.lo, place))
        return places

    def dense(self, x: Tensor, step: Step) -> Tensor:
        start = perf_counter()
        x = self.ops.mlp(x, self.mlp)
        step.record("dense", self.index, start)
        return x

    def end_dense(self, begun: Begun, step: Step, answer: Arriving | None = None) -> Tensor:
        """`dense`, which has begun: the rest of it. An `answer` that comes meanwhile is taken while the other
        threads go on."""
        if not begun.handle:
            return begun.out  # `close` has ended it
        start, before = perf_counter(), 0.0
        file = -1 if answer is None else answer.file
        try:
            # What came may be a part of it, or another's: a few looks, each while the others go on.
            for _ in range(LOOKS):
                if answer is None or file < 0 or not self.ops.mlp_until(begun, file):
                    break
                before += step.record("dense", self.index, start) - start
                over = answer.look()
                start = perf_counter()
                if over:
                    break
        finally:
            x = self.ops.end_mlp(begun)
        took(self.dense, before + step.record("dense", self.index, start) - start)
        return x

    def close(self, to: Routed, step: Step) -> Tensor | None:
        """The layer's result, where the answers to what was sent come soon enough: `end_dense` and `combine`
        in one. None where they do not, and both have to follow."""
        sent, begun = to.sent, to.dense
        expected = sent.expected() if sent is not None and begun is not None and step.alone else None
        if expected is None or sent is None or begun is None or self.expert_out_scale is None:
            return None
        start = perf_counter()
        scales = self.expert_out_scale, self.post_feedforward_scale
        x, ended, in_vain = self.ops.close_mlp(
            begun, expected, sent.patience, to.residual, *scales, self.eps, self.scalar
        )
        if not ended:
            step.record("dense", self.index, start)
            return None
        if step.timeline is not None:
            step.timeline.add("dense", self.index, start, ended)
        took(self.dense, ended - start)
        if x is None:
            step.record("network", self.index, ended)
            if in_vain:
                sent.missed()
            return None
        step.record("combine", self.index, sent.answered(ended, step.timeline))
        return x

    def combine(self, residual: Tensor, dense: Tensor, moe: Tensor | None, step: Step) -> Tensor:
        start = perf_counter()
        moe = None if moe is None else step.staging.to_device(moe)
        x = self.ops.combine(
            residual, dense, moe, self.expert_out_scale, self.post_feedforward_scale, self.eps, self.scalar
        )
        step.record("combine", self.index, start)
        return x

    def without_experts(self, x: Tensor, step: Step) -> Tensor:
        """The whole layer of a model that has no mixture of experts."""
        to = self.route(x, step)
        return self.combine(to.residual, self.dense(to.dense_input, step), None, step)
