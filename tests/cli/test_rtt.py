"""The figures of `bench --rtt`: percentiles, the ceiling, and whose time counts."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitinfer.cli.rtt import CallFigures, measure_calls, percentile
from splitinfer.timing import Timeline

CONFIG: Any = SimpleNamespace(
    num_hidden_layers=3, hidden_size=8, num_experts=16, top_k_experts=4, dtype="bfloat16"
)


class FakeExperts:
    """Answers at once, claims 1 ms of arithmetic and 100 bytes a row each way."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.rows = 0

    def traffic(self) -> tuple[int, int, int]:
        return self.rows * 100, self.rows * 100, len(self.calls)

    async def dispatch(
        self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, timeline: Timeline
    ) -> torch.Tensor:
        self.calls.append((layer, x, index))
        self.rows += len(x)
        await asyncio.sleep(0.003)
        timeline.add("experts", layer, 0.0, 0.001)
        return x


def measure(experts: Any, **limits: Any) -> CallFigures:
    return asyncio.run(measure_calls(experts, CONFIG, rows=2, **limits))


def test_percentiles_are_values_that_were_measured() -> None:
    values = [0.5, 0.1, 0.3, 0.2, 0.4]
    assert [percentile(values, p) for p in (0, 20, 21, 50, 90, 99, 100)] == [
        0.1,
        0.1,
        0.2,
        0.3,
        0.5,
        0.5,
        0.5,
    ]
    assert percentile([7.0], 50) == 7.0


def test_calls_are_like_the_models_own() -> None:
    experts = FakeExperts()
    figures = measure(experts, at_least=4, at_most=6, seconds=0.0)
    assert [layer for layer, _, _ in experts.calls] == [0, 1, 2, 0, 1, 2, 0]  # 3 to warm up, 4 measured
    for _, x, index in experts.calls:
        assert (x.shape, x.dtype) == ((2, 8), torch.bfloat16)
        assert index.shape == (2, 4)
        assert all(len(set(row)) == 4 for row in index.tolist())
    assert len(figures.total) == 4
    assert (figures.nbytes_sent, figures.nbytes_received) == (200, 200)
    for total, network in zip(figures.total, figures.network, strict=True):
        assert total - network == pytest.approx(0.001)
        assert total >= 0.003


def test_it_stops_at_the_most_calls() -> None:
    experts = FakeExperts()
    assert len(measure(experts, at_least=1, at_most=5, seconds=60.0).total) == 5


def test_the_ceiling_follows_from_layers_and_round_trip() -> None:
    figures = CallFigures(2, 30, (0.003,) * 5, (0.002, 0.001, 0.002, 0.009, 0.002), 10, 20)
    assert figures.ceiling == pytest.approx(2 / (30 * 0.002))
    assert figures.with_arithmetic == pytest.approx(2 / (30 * 0.003))
    made = figures.to_json()
    assert made["network_ms"]["p50"] == pytest.approx(2.0)
    assert made["network_ms"]["p99"] == pytest.approx(9.0)
    assert (made["calls"], made["rows"], made["bytes_sent"]) == (5, 2, 10)
    assert made["network_ceiling_tokens_per_second"] == figures.ceiling
