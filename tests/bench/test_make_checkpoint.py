from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.make_checkpoint import write
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline

EXPERTS, VOCAB = 8, 512


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes") / "model"
    write(directory, layers=1, experts=EXPERTS, vocab=VOCAB)
    return directory


def test_true_shapes(path: Path) -> None:
    checkpoint = Checkpoint.open(path)  # checks every tensor against the configuration
    gate_up, down = checkpoint.expert_slice(0, 0, EXPERTS)
    assert (gate_up.shape, down.shape) == ((EXPERTS, 1408, 2816), (EXPERTS, 2816, 704))
    assert checkpoint.entry("layers.0.self_attn.q_proj.weight").shape == (16 * 512, 2816)
    assert checkpoint.dtype == torch.bfloat16
    assert not torch.equal(gate_up[0], gate_up[1])


class Recorded(LocalExperts):
    """Keeps the router's weights."""

    weights = torch.empty(0)

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        self.weights = top_k_weights
        return super().dispatch(layer, x, top_k_index, top_k_weights, timeline)


def test_the_model_runs_on_a_sane_scale(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    experts = Recorded(ExpertBank(checkpoint, {0: range(EXPERTS)}))
    model = Gemma.load(checkpoint, experts)
    logits = model.logits(asyncio.run(model.forward([Segment(torch.arange(16), model.new_cache())])))
    assert 0.3 < logits.std() < 3
    largest = experts.weights.amax(dim=-1).median()
    assert 2 / EXPERTS < largest < 0.8, "routing is uniform or one-hot"


def test_a_second_run_keeps_what_is_there(path: Path) -> None:
    files = {file: file.stat().st_mtime_ns for file in path.glob("*.safetensors")}
    assert len(files) == 2
    next(iter(files)).with_suffix(".part").touch()  # left by an interrupted run
    write(path, layers=1, experts=EXPERTS, vocab=VOCAB)
    assert {file: file.stat().st_mtime_ns for file in path.glob("*.safetensors")} == files
