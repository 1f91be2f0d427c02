"""A model with the true shapes of Gemma 4 26B-A4B and random weights, straight in a weight format.

Nothing is written to disk and nothing quantised: words are drawn as they would lie in a shard. Layers beyond
`distinct` share the weights of earlier ones, which keeps a 30-layer model in little memory and changes no
speed as long as one round through the distinct ones is larger than the last cache.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from make_checkpoint import text_config
from torch import Tensor

from splitinfer.model.config import ModelConfig, load_config
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma
from splitinfer.model.quantize import Packed, QuantConfig, packed_shapes
from splitinfer.model.weights import expected_tensors

__all__ = ["RandomCheckpoint", "active_nbytes", "active_weights", "load"]


class RandomCheckpoint:
    """Answers like `splitinfer.model.weights.Checkpoint`, from a generator."""

    dtype = torch.bfloat16

    def __init__(self, layers: int, experts: int = 128, vocab: int = 262_144, distinct: int = 6) -> None:
        self.table = text_config(layers, experts, vocab)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(self.table))
            self.config: ModelConfig = load_config(directory)
        self.shapes = dict(expected_tensors(self.config))
        self.distinct = distinct
        self.generator = torch.Generator().manual_seed(0)
        self.drawn: dict[object, Packed] = {}

    def tensor(self, name: str) -> Tensor:
        """Norms near 1, matrices that keep the scale of their input."""
        shape = self.shapes[name]
        if len(shape) == 1:
            value = 0.05 if name.endswith("k_norm.weight") else 1.0
            return torch.randn(shape, generator=self.generator).mul(0.1 * value).add(value).bfloat16()
        return torch.randn(shape, generator=self.generator).mul(shape[-1] ** -0.5).bfloat16()

    def matrix(self, name: str, format: str | None = None, *, floating: str | None = None) -> Packed:
        out_features, in_features = self.shapes[name]
        parts = name.split(".")
        if parts[0] == "layers":
            parts[1] = str(int(parts[1]) % self.distinct)
        return self.draw(".".join(parts), format or "bfloat16", out_features, in_features)

    def experts(
        self, layer: int, lo: int, hi: int, format: str | None = None, **_: object
    ) -> Iterator[tuple[Packed, Packed]]:
        hidden, moe = self.config.hidden_size, self.config.moe_intermediate_size
        for expert in range(lo, hi):
            key = (layer % self.distinct, expert)
            yield (
                self.draw((*key, "gate_up"), format or "bfloat16", 2 * moe, hidden),
                self.draw((*key, "down"), format or "bfloat16", hidden, moe),
            )

    def draw(self, key: object, format: str, out_features: int, in_features: int) -> Packed:
        if key not in self.drawn:
            self.drawn[key] = self._draw(format, out_features, in_features)
        return self.drawn[key]

    def _draw(self, format: str, out_features: int, in_features: int) -> Packed:
        shapes = packed_shapes(format, out_features, in_features)
        dtype, shape = shapes["weight"]
        std = in_features**-0.5
        if dtype.is_floating_point:
            weight = torch.empty(shape, dtype=dtype).uniform_(-1.7 * std, 1.7 * std, generator=self.generator)
            return Packed(format, out_features, in_features, 0, weight)
        bits = torch.iinfo(dtype)
        weight = torch.empty(shape, dtype=dtype).random_(bits.min, bits.max, generator=self.generator)
        scales = torch.empty(shapes["scales"][1], dtype=torch.float16)
        if format == "int8":
            return Packed(format, out_features, in_features, in_features, weight, scales.fill_(std / 74))
        scales[:, :, 0], scales[:, :, 1] = std / 4.6, -7.5 * std / 4.6
        return Packed(format, out_features, in_features, 0, weight, scales)


def load(
    layers: int, quant: QuantConfig, distinct: int = 6, vocab: int = 262_144
) -> tuple[Gemma, ExpertBank]:
    """The model with its experts in this process."""
    checkpoint = RandomCheckpoint(layers, vocab=vocab, distinct=distinct)
    everything = dict.fromkeys(range(layers), range(checkpoint.config.num_experts))
    bank = ExpertBank(checkpoint, everything, format=quant.experts)  # type: ignore[arg-type]
    return Gemma.load(checkpoint, LocalExperts(bank), quant=quant), bank  # type: ignore[arg-type]


def active_nbytes(model: Gemma, bank: ExpertBank) -> int:
    """Bytes of weights that one token's forward pass and logits read."""
    config = model.config
    share = config.top_k_experts / config.num_experts
    return int(bank.nbytes * share) + model.nbytes


def active_weights(model: Gemma) -> int:
    """Weights of the layers that meet one token: attention, dense network, router and the chosen experts."""
    config, total = model.config, 0
    for name, shape in expected_tensors(config):
        if len(shape) == 3:
            total += config.top_k_experts * shape[1] * shape[2]
        elif len(shape) == 2 and name.startswith("layers."):
            total += shape[0] * shape[1]
    return total
