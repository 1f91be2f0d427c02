"""How much memory a model takes, before any of it is loaded: bytes by part, from shapes and formats alone.

The arithmetic follows what is held: an expert's two matrices in the format of its bank, everything else in
the formats of the client's half, keys and values in buffers as `KVCache` grows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from functools import cache
from math import prod

import torch

from splitinfer.model.cache import MARGIN, ROLLBACK, grown
from splitinfer.model.config import ModelConfig
from splitinfer.model.pipeline import IN_FLIGHT, PREFILL_ROWS
from splitinfer.model.quantize import QuantConfig, format_of, packed_nbytes
from splitinfer.model.sharding import format_for, is_matrix
from splitinfer.model.weights import Checkpoint, expected_tensors

__all__ = ["PROGRAM_NBYTES", "Footprint", "Sizes", "cache_nbytes", "working_nbytes"]

PROGRAM_NBYTES = 260 << 20  # Python, PyTorch and this package, before any weight: what a process always has
FLOATING = ("float32", "bfloat16")
EXPERT = ("experts.gate_up_proj", "experts.down_proj")

Columns = tuple[int, int]  # from the first to before the last, of moe_intermediate_size


@dataclass(frozen=True)
class Footprint:
    """Bytes that one process holds, by part. `other` are norms and router; `lm_head` is 0 where it is the
    embeddings' own tensor; `cache` is that of one sequence at its longest."""

    experts: int = 0
    attention: int = 0
    dense: int = 0
    other: int = 0
    embeddings: int = 0
    lm_head: int = 0
    cache: int = 0
    program: int = PROGRAM_NBYTES

    @property
    def total(self) -> int:
        return sum(astuple(self))


class Sizes:
    """Bytes of every part of a model, in the formats that it is to be held in.

    `quant` names the formats as on the command line, `dtype` the one to compute in (None: the model's own);
    `stored` tells, for a tensor's name and a wanted format, columns per scale and the format that it gets
    (`Checkpoint.stored_as`).
    """

    def __init__(
        self,
        config: ModelConfig,
        stored: Callable[[str, str | None], tuple[int, str]],
        *,
        quant: QuantConfig | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.quant = quant or QuantConfig()
        own = torch.float32 if config.dtype == "float32" else torch.bfloat16
        self.dtype = dtype or own
        self._asked = dtype
        self._stored = stored
        self._shapes = dict(expected_tensors(config))
        self.expert = cache(self._expert)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, *, quant: QuantConfig | None = None, dtype: torch.dtype | None = None
    ) -> Sizes:
        """Those of a checkpoint, a shard or a GGUF file. No weight is touched."""
        sizes = cls(checkpoint.config, checkpoint.stored_as, quant=quant, dtype=dtype)
        sizes.dtype = dtype or checkpoint.dtype
        return sizes

    @classmethod
    def of_config(
        cls, config: ModelConfig, *, quant: QuantConfig | None = None, dtype: torch.dtype | None = None
    ) -> Sizes:
        """Those of a model whose weights are not here: bfloat16, as published ones are, or float32."""
        natural = "float32" if config.dtype == "float32" else "bfloat16"
        return cls(config, lambda _, format: (0, format or natural), quant=quant, dtype=dtype)

    def _expert(self, layer: int, columns: Columns | None = None) -> int:
        """Bytes of one expert of that layer, or of the slice `columns` of it; 0 where there are none."""
        if not self.config.enable_moe_block:
            return 0
        low, high = columns or (0, self.config.moe_intermediate_size)
        hidden, inner = self.config.hidden_size, high - low
        shapes = ((2 * inner, hidden), (hidden, inner))
        names = (f"layers.{layer}.{name}" for name in EXPERT)
        pairs = zip(names, shapes, strict=True)
        return sum(self._matrix(name, *shape, floating=format_of(self._asked)) for name, shape in pairs)

    def experts(self, layers: Iterable[int], count: int | None = None, columns: Columns | None = None) -> int:
        """Bytes of `count` experts (None: all) of each of `layers`, or of that slice of them."""
        count = self.config.num_experts if count is None else count
        return sum(count * self.expert(layer, columns) for layer in layers)

    def formats(self, part: str, layers: Iterable[int] | None = None) -> str:
        """What a part of `Footprint` is held in, in these layers: "int4", "int4+int8", or "" for no such."""
        wanted = None if layers is None else set(layers)
        floating = format_of(self._asked if part == "experts" else self.dtype)
        found = {
            self._format(name, floating)[1]
            for name, shape in self._shapes.items()
            if is_matrix(name, shape)
            and _part(name) == part
            and (wanted is None or not name.startswith("layers.") or int(name.split(".")[1]) in wanted)
        }
        return "+".join(sorted(found))

    def client(
        self, context: int, local_layers: Iterable[int] = (), *, int8_cache: bool = False
    ) -> Footprint:
        """The client's half, with the experts of `local_layers` and the cache of `context` tokens."""
        parts = {"attention": 0, "dense": 0, "other": 0, "embeddings": 0, "lm_head": 0}
        for name, shape in self._shapes.items():
            if name.endswith(EXPERT):
                continue
            if is_matrix(name, shape):
                parts[_part(name)] += self._matrix(name, *shape, floating=format_of(self.dtype))
            else:
                parts["other"] += 4 * prod(shape)
        if self.config.tie_word_embeddings:
            embedding, shape = "embed_tokens.weight", self._shapes["embed_tokens.weight"]
            head = self._matrix(embedding, *shape, floating=format_of(self.dtype), format=self.quant.lm_head)
            if self.quant.embeddings in (None, self.quant.lm_head):
                parts["embeddings"] = head
            else:
                parts["lm_head"] = head
        return Footprint(
            experts=self.experts(local_layers),
            cache=cache_nbytes(self.config, context, self.dtype.itemsize, int8=int8_cache),
            **parts,
        )

    def _matrix(
        self,
        name: str,
        out_features: int,
        in_features: int,
        *,
        floating: str | None,
        format: str | None = None,
    ) -> int:
        """Bytes of a matrix."""
        group, chosen = self._format(name, floating, format)
        return packed_nbytes(chosen, out_features, in_features, group)

    def _format(self, name: str, floating: str | None, format: str | None = None) -> tuple[int, str]:
        """Columns per scale and format of a matrix; `floating` is the format for what is stored in floating
        point and not asked for otherwise."""
        wanted = format or format_for(name, self.quant)
        group, chosen = self._stored(name, wanted)
        if wanted is None and chosen in FLOATING:
            chosen = floating or chosen
        return group, chosen


def cache_nbytes(config: ModelConfig, tokens: int, itemsize: int = 2, *, int8: bool = False) -> int:
    """Bytes of one sequence's keys and values at `tokens` tokens that came one by one: elements of `itemsize`
    bytes, or int8 and their scales."""
    total = 0
    for attention in config.attention:
        reach = None if attention.window is None else attention.window - 1
        most = tokens if reach is None else min(tokens, reach + ROLLBACK + MARGIN)
        capacity = 0
        while capacity < most:
            capacity = grown(capacity, capacity + 1, reach)
        row = attention.head_dim + 2 if int8 else attention.head_dim * itemsize
        total += 2 * capacity * attention.num_key_value_heads * row
    return total


def working_nbytes(config: ModelConfig, context: int) -> int:
    """Bytes of a prompt's rows under way: float32, as wide as the widest of what a layer makes of them. A
    measured allowance (bench/memory.py), not a sum of buffers."""
    heads = max(
        a.head_dim * (config.num_attention_heads + 2 * a.num_key_value_heads) for a in config.attention
    )
    width = heads + 2 * config.intermediate_size + 8 * config.hidden_size
    return min(IN_FLIGHT * PREFILL_ROWS, context) * width * 4


def _part(name: str) -> str:
    """The part of `Footprint` that a matrix belongs to."""
    if name.endswith(EXPERT):
        return "experts"
    if ".self_attn." in name:
        return "attention"
    if ".mlp." in name:
        return "dense"
    return "lm_head" if name == "lm_head.weight" else "embeddings"
