from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from training.muon import make_optimizers
from training.state import load_state, save_state


def _made() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 2))
    return model, make_optimizers(model, matrix_lr=0.1, embedding_lr=0.1, vector_lr=0.1, weight_decay=0.1)


def _steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        model(torch.randn(8, 4, generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_a_resumed_run_takes_the_very_same_steps(tmp_path: Path) -> None:
    straight, optimizers = _made()
    _steps(straight, optimizers, 1, 3)
    save_state(tmp_path, straight, optimizers, {"step": 3, "seconds": 1.5})
    _steps(straight, optimizers, 2, 3)

    resumed, fresh = _made()
    assert load_state(tmp_path, resumed, fresh) == {"step": 3, "seconds": 1.5}
    _steps(resumed, fresh, 2, 3)
    for name, parameter in straight.state_dict().items():
        assert torch.equal(parameter, resumed.state_dict()[name]), name


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert load_state(tmp_path, *_made()) is None
