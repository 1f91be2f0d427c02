"""One window of drafts under way, or several: what more gives, where the policy chooses their number."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import network
import network_cells as cells
from network_cells import Way

from splitinfer import draft_depth
from splitinfer.cli.console import run as run_loop
from splitinfer.transport.link import parse_duration

__all__ = ["compare"]

TOKENS = 120
TEMPERATURES = (0.0, 0.7)


@contextmanager
def one_window() -> Iterator[None]:
    """The policy has no other choice inside."""
    with patch.object(draft_depth, "WINDOWS", (1,)):
        yield


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s by round trip, drafter and temperature, medians over the rounds, which alternate."""
    drafters = {"lookup": "lookup"} | ({"drafter": arguments.drafter} if arguments.drafter else {})
    rows: list[dict[str, Any]] = []
    with network.nodes(arguments) as addresses:
        for rtt in arguments.rtt.split(","):
            for name, drafter in drafters.items():
                for temperature in TEMPERATURES:
                    way = Way(name, {"draft": drafter}, drafts=True)
                    found = run_loop(_rates(arguments, addresses, way, parse_duration(rtt), temperature))
                    rows.append({"rtt": rtt, "drafter": name, "temperature": temperature, **found})
    return {"tokens": TOKENS, "rounds": arguments.rounds, "rows": rows}


async def _rates(
    arguments: argparse.Namespace, addresses: list[str], way: Way, rtt: float, temperature: float
) -> dict[str, float]:
    rates: dict[str, list[float]] = {"one": [], "several": []}
    acceptance: list[float] = []
    for seed in range(arguments.rounds):
        for windows, found in rates.items():
            async with cells.open_way(arguments.model, addresses, way, rtt) as engine:
                cells.pin()
                prompt = cells.prompt_of(engine, seed % len(cells.PROMPTS))
                options = {"ignore_eos": True, "temperature": temperature, "seed": seed}
                await engine.generate(prompt, max_tokens=cells.WARM, **options)
                if windows == "one":
                    with one_window():
                        reply = await engine.generate(prompt, max_tokens=TOKENS, **options)
                    usage = reply.usage
                    acceptance.append(usage.accepted_tokens / max(1, usage.drafted_tokens))
                else:
                    reply = await engine.generate(prompt, max_tokens=TOKENS, **options)
                found.append(reply.timings.decode_tokens_per_second)
    return {name: median(found) for name, found in rates.items()} | {"acceptance": median(acceptance)}
