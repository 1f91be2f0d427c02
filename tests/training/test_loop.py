from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from training import loop
from training.loop import ActiveClock, Budget, learning_rate, train


def test_the_clock_forgives_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    clock = ActiveClock()
    for _ in range(10):
        now += 1.0
        clock.tick()
    now += 3600.0  # stopped for an hour
    clock.tick()
    assert clock.seconds == pytest.approx(15.0)


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [learning_rate(progress, 1000, warmup=10, stable=0.4) for progress in (0.0, 0.4, 0.7, 1.0)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert learning_rate(0.0, 4, warmup=10, stable=0.4) == pytest.approx(0.5)


def test_the_budget_ends_by_what_is_used_up_first() -> None:
    budget = Budget(tokens=100, minutes=2.0)
    assert budget.progress(50, 12.0) == pytest.approx(0.5)
    assert budget.progress(10, 60.0) == pytest.approx(0.5)
    assert budget.progress(10, 1e9) == 1.0


def test_it_trains_to_the_budget_and_then_has_nothing_to_do(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["peak"] = 0.1
    steps = []

    def loss_of(step: int, progress: float) -> tuple[Tensor, int]:
        steps.append(step)
        return (model(torch.ones(4, 2)) - 3.0).square().mean(), 10

    def run() -> dict[str, float]:
        console = Console(file=io.StringIO())
        return train(
            model,
            [optimizer],
            loss_of,
            name="test",
            budget=Budget(200, 60.0),
            folder=tmp_path,
            warmup=2,
            stable=0.5,
            console=console,
        )

    assert run()["tokens"] == 200
    assert run()["step"] == 20
    assert steps == list(range(20))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["peak"] = 0.1
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        train(
            model,
            [optimizer],
            lambda step, progress: (model(torch.full((1, 2), torch.nan)).sum(), 1),
            name="test",
            budget=Budget(10, 1.0),
            folder=tmp_path,
            warmup=1,
            stable=0.5,
            console=Console(file=io.StringIO()),
        )
