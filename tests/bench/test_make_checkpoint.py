from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from bench.make_checkpoint import write
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.weights import Checkpoint

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


def test_the_model_runs_and_is_neither_flat_nor_one_hot(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    model = Gemma.load(checkpoint, LocalExperts(ExpertBank(checkpoint, {0: range(EXPERTS)})))
    logits = model.logits(asyncio.run(model.forward([Segment(torch.arange(4), model.new_cache())])))
    best = torch.softmax(logits, dim=-1).amax(dim=-1)
    assert torch.all((best > 2 / VOCAB) & (best < 0.9))


def test_a_second_run_keeps_what_is_there(path: Path) -> None:
    files = {file: file.stat().st_mtime_ns for file in path.glob("*.safetensors")}
    assert len(files) == 2
    next(iter(files)).with_suffix(".part").touch()  # left by an interrupted run
    write(path, layers=1, experts=EXPERTS, vocab=VOCAB)
    assert {file: file.stat().st_mtime_ns for file in path.glob("*.safetensors")} == files
