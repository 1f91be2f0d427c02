"""What an expert call costs: round trips of real calls to real nodes, and the ceiling that follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from splitinfer.timing import Timeline

if TYPE_CHECKING:
    from splitinfer.dispatch import RemoteExperts
    from splitinfer.model.config import ModelConfig

__all__ = ["CallFigures", "measure_calls", "percentile"]


@dataclass(frozen=True)
class CallFigures:
    """Round trips of one kind of call. Times are in seconds, one entry for each call.

    `total` runs from handing the rows over to having the sum; `network` is that less the slowest node's own
    arithmetic. `nbytes_sent` and `nbytes_received` are of one call to all its nodes, headers included.
    """

    rows: int
    layers: int
    total: tuple[float, ...]
    network: tuple[float, ...]
    nbytes_sent: int
    nbytes_received: int

    @property
    def ceiling(self) -> float:
        """Tokens/s if nothing but the network took time: every layer costs one round trip for all rows."""
        return self.rows / (self.layers * percentile(self.network, 50))

    @property
    def with_arithmetic(self) -> float:
        """Tokens/s if only the expert calls took time, the nodes' arithmetic included."""
        return self.rows / (self.layers * percentile(self.total, 50))

    def to_json(self) -> dict[str, Any]:
        ms = {
            name: {f"p{p}": percentile(values, p) * 1e3 for p in (50, 90, 99)}
            for name, values in (("round_trip_ms", self.total), ("network_ms", self.network))
        }
        return {
            "rows": self.rows,
            "calls": len(self.total),
            "bytes_sent": self.nbytes_sent,
            "bytes_received": self.nbytes_received,
            **ms,
            "network_ceiling_tokens_per_second": self.ceiling,
            "expert_calls_tokens_per_second": self.with_arithmetic,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


async def measure_calls(
    experts: RemoteExperts,
    config: ModelConfig,
    *,
    rows: int,
    at_least: int,
    at_most: int,
    seconds: float,
) -> CallFigures:
    """Time calls of `rows` random rows with random routing, layer after layer, after a warm-up.

    Between `at_least` and `at_most` calls, for about `seconds`.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    layers = config.num_hidden_layers
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    x = torch.randn(rows, config.hidden_size, generator=generator).to(dtype)
    weights = torch.full((rows, config.top_k_experts), 1.0 / config.top_k_experts)
    total: list[float] = []
    network: list[float] = []
    warm_up = min(layers, at_least)
    sent = received = 0
    begun = perf_counter()
    for number in range(warm_up + at_most):
        if number == warm_up:
            sent, received, _ = experts.traffic()
            begun = perf_counter()
        elif number >= warm_up + at_least and perf_counter() - begun > seconds:
            break
        scores = torch.rand(rows, config.num_experts, generator=generator)
        index = scores.topk(config.top_k_experts).indices
        timeline = Timeline()
        start = perf_counter()
        await experts.dispatch(number % layers, x, index, weights, timeline)
        took = perf_counter() - start
        if number >= warm_up:
            total.append(took)
            network.append(max(took - timeline.by_phase().get("experts", 0.0), 1e-9))
    now_sent, now_received, _ = experts.traffic()
    return CallFigures(
        rows,
        layers,
        tuple(total),
        tuple(network),
        (now_sent - sent) // len(total),
        (now_received - received) // len(total),
    )
