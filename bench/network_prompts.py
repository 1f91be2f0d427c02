"""Prompts over an emulated link: how long one takes against its bound, and how long it holds up a reply."""

from __future__ import annotations

import asyncio
from statistics import median
from time import perf_counter

from network_cells import WARM, Local, prefill_seconds, prompt_of

from splitinfer import AsyncEngine

__all__ = ["prompt_figures"]

LONG = 2048  # tokens of the prompt beside which another reply goes on


async def prompt_figures(engine: AsyncEngine, local: Local, rtt: float) -> dict[str, float]:
    """A long prompt against its bound, and how long it holds up a reply that is being written."""
    layers = engine.config.num_hidden_layers
    took = await prefill_seconds(engine)
    bound = layers * rtt + local.prefill
    gaps: list[float] = []
    going = asyncio.Event()

    async def write() -> None:
        last = perf_counter()
        async for _ in engine.stream(prompt_of(engine, 0), max_tokens=1000, ignore_eos=True):
            gaps.append(perf_counter() - last)
            last = perf_counter()
            if len(gaps) == 12:
                going.set()

    writing = asyncio.create_task(write())
    await going.wait()
    usual, first = median(gaps[2:]), len(gaps)
    length = min(LONG, engine.context - WARM)
    done = await engine.generate(prompt_of(engine, 1, length), max_tokens=1, ignore_eos=True)
    held_up = max(gaps[first:], default=0.0)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    return {
        "prefill_seconds": took,
        "prefill_bound": bound,
        "long_prompt_tokens": length,
        "long_prompt_seconds": done.timings.ttft,
        "usual_pause": usual,
        "longest_pause": held_up,
        "tokens_beside": len(gaps) - first,
    }
