from __future__ import annotations

import asyncio
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.staging import Staging
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import write_checkpoint

LAYERS = 4

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path / "model"))


def load(checkpoint: Checkpoint, device: str = "cpu") -> Gemma:
    everything = {layer: range(11) for layer in range(LAYERS)}
    return Gemma.load(checkpoint, LocalExperts(ExpertBank(checkpoint, everything)), device=device)


def elsewhere() -> Staging:
    """As for a device without pinned memory, which happens to be this one."""
    staging = Staging(torch.device("cpu"))
    staging._here = False
    return staging


def test_on_the_cpu_nothing_is_copied() -> None:
    staging, x = Staging(torch.device("cpu")), torch.ones(2, 3)
    assert staging.to_host(x)[0] is x
    assert staging.to_device(x) is x
    assert staging.waits == 0


def test_what_goes_out_is_a_copy_that_nobody_overwrites() -> None:
    """The wire reads it until the answer is there, while the device goes on with its own."""
    staging, x, index = elsewhere(), torch.ones(3, 4).T, torch.arange(3)
    rows, ids = staging.to_host(x, index)
    x.zero_()
    again, _ = staging.to_host(x, index)
    assert rows.is_contiguous()
    assert torch.equal(rows, torch.ones(4, 3))
    assert torch.equal(ids, index)
    assert not again.any()
    assert staging.waits == 2


class Counting(Staging):
    """Notes what crosses over."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._here = False
        self.crossed: list[list[tuple[int, ...]]] = []

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.crossed.append([tuple(tensor.shape) for tensor in tensors])
        return super().to_host(*tensors)

    def to_device(self, tensor: Tensor) -> Tensor:
        self.crossed.append([tuple(tensor.shape)])
        return super().to_device(tensor)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_layer_crosses_once_each_way(checkpoint: Checkpoint, rows: int) -> None:
    """Out: rows, ids and weights together; back: their sum. Beside that the embeddings of a step."""
    model, ids = load(checkpoint), torch.arange(rows)
    expected = asyncio.run(model.forward([Segment(ids, model.new_cache())]))
    counting = model._staging = Counting()
    found = asyncio.run(model.forward([Segment(ids, model.new_cache())]))
    assert torch.equal(found, expected)
    assert counting.crossed == [[(rows, 48)]] + [[(rows, 48), (rows, 3), (rows, 3)], [(rows, 48)]] * LAYERS
    assert counting.waits == LAYERS


@pytest.mark.cuda
@needs_cuda
def test_pinned_and_complete() -> None:
    device = torch.device("cuda")
    staging, x = Staging(device), torch.randn(64, 2816, device=device)
    for step in range(20):  # buffers come back from the allocator: none before its copies are done
        (rows,) = staging.to_host(x + step)
        assert rows.is_pinned()
        assert torch.equal(staging.to_device(rows), x + step)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("rows", [1, 40])
def test_one_wait_for_a_layer(checkpoint: Checkpoint, rows: int) -> None:
    model = load(checkpoint, "cuda")
    kv = model.new_cache()
    asyncio.run(model.forward([Segment(torch.arange(rows), kv)]))  # weights reach the device on first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            asyncio.run(model.forward([Segment(torch.arange(rows), kv)]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= LAYERS, [str(warning.message) for warning in waits]
