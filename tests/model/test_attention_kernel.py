"""A layer up to its experts in one call against the single calls: the same bits, in rows and in caches."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from splitinfer.model.attention_kernel import AttentionKernel
from splitinfer.model.cache import KVCache
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.linear import Linear
from splitinfer.model.native import kernels
from splitinfer.model.quantize import QuantConfig, quantize
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint

pytestmark = pytest.mark.skipif(kernels() is None, reason="no compiler: no kernels")

SHAPES: dict[str, dict[str, Any]] = {
    "experts": {},
    "values of their own, window of one": {"attention_k_eq_v": False, "sliding_window": 1},
    "no experts": {"enable_moe_block": False},
}
# Rows of two sequences in a step, 0 for one that has a rest. 400 and 330 are larger than a sliding buffer,
# behind a sequence that has its place already.
STEPS = [(5, 0), (1, 3), (0, 400), (1, 1), (70, 2), (1, 330), (300, 1), (1, 400), (1, 64)]


def load(path: Path, dtype: torch.dtype, quant: QuantConfig) -> Gemma:
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    everything = {layer: range(config.num_experts) for layer in range(config.num_hidden_layers)}
    experts = LocalExperts(ExpertBank(checkpoint, everything)) if config.enable_moe_block else None
    return Gemma.load(checkpoint, experts, dtype=dtype, quant=quant)


async def run(model: Gemma) -> tuple[list[Tensor], tuple[KVCache, KVCache]]:
    """Hidden states of every step, and the caches after the last. Rows are taken back in between."""
    generator, caches, found = torch.Generator().manual_seed(0), (model.new_cache(), model.new_cache()), []
    for number, rows in enumerate(STEPS):
        ids = [torch.randint(0, 131, (n,), generator=generator) for n in rows]
        found.append(
            await model.forward([Segment(i, kv) for i, kv in zip(ids, caches, strict=True) if len(i)])
        )
        if number % 2:
            caches[1].truncate(caches[1].length - 1)
    return found, caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_and_many_give_the_same_bits(
    tmp_path: Path, shape: str, quant: str, dtype: torch.dtype
) -> None:
    path = write_checkpoint(tmp_path / "model", tiny_config(max_position_embeddings=2000, **SHAPES[shape]))
    model = load(path, dtype, QuantConfig.of(quant))
    assert all(layer.kernel is not None for layer in model._layers)
    whole, caches = asyncio.run(run(model))
    for layer in model._layers:
        layer.kernel = None
    apart, others = asyncio.run(run(model))
    assert all(torch.equal(one, other) for one, other in zip(whole, apart, strict=True))
    for cache, other in zip(caches, others, strict=True):
        assert cache.length == other.length
        for layer in range(model.config.num_hidden_layers):
            for held, same in zip(
                cache.held(layer, cache.length)[:2], other.held(layer, other.length)[:2], strict=True
            ):
                assert torch.equal(held, same)


def test_a_cache_may_have_two_parts_of_a_step(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "model", tiny_config()), torch.float32, QuantConfig.of(None))
    ids = torch.arange(40)

    async def hidden(*parts: Tensor) -> Tensor:
        cache = model.new_cache()
        return await model.forward([Segment(part, cache) for part in parts])

    assert torch.equal(asyncio.run(hidden(ids[:30], ids[30:])), asyncio.run(hidden(ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_another_kind_gives_no_place(tmp_path: Path, dtype: torch.dtype) -> None:
    config = load(write_checkpoint(tmp_path / "model", tiny_config()), dtype, QuantConfig.of(None)).config
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    for int8 in (False, True):
        cache = KVCache(config, dtype=dtype, int8=int8)
        cache.begin(3)
        assert cache.place(0, 0, 3, other) is None
        assert (cache.place(0, 0, 3, dtype) is None) is int8


@pytest.mark.parametrize("formats", [("int8", "int8"), ("int8", "int4")])
def test_formats_that_do_not_go_together_take_many_calls(formats: tuple[str, str]) -> None:
    first, second = (quantize(torch.randn(32, 32), format) for format in formats)
    attention: Any = SimpleNamespace(
        kernels=kernels(), projections=Linear(first, second), output=Linear(first)
    )
    assert AttentionKernel.fits(attention, None) is (formats[0] == formats[1])
