from __future__ import annotations

import asyncio
from math import inf
from time import monotonic

from splitinfer.transport.deadlines import Deadlines


def test_the_sweep_comes_at_the_earliest_and_then_at_what_it_says() -> None:
    async def work() -> list[float]:
        start = monotonic()
        swept: list[float] = []

        def sweep(now: float) -> float:
            swept.append(now - start)
            return start + 0.1 if len(swept) == 1 else inf

        deadlines = Deadlines(asyncio.get_running_loop(), sweep)
        deadlines.watch(start + 0.2)
        deadlines.watch(start + 0.05)
        deadlines.watch(start + 0.3)
        assert deadlines.at == start + 0.05
        await asyncio.sleep(0.25)
        assert deadlines.at == inf
        return swept

    first, second = asyncio.run(work())
    assert 0.05 <= first < 0.1
    assert 0.1 <= second < 0.2


def test_a_later_deadline_sets_no_timer() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(loop, lambda now: inf)
        deadlines.watch(monotonic() + 5)
        timer = deadlines._timer
        for late in range(6, 20):
            deadlines.watch(monotonic() + late)
        assert deadlines._timer is timer
        deadlines.close()
        assert deadlines.at == inf

    asyncio.run(work())


def test_closed_means_no_sweep() -> None:
    async def work() -> None:
        swept: list[float] = []

        def sweep(now: float) -> float:
            swept.append(now)
            return inf

        deadlines = Deadlines(asyncio.get_running_loop(), sweep)
        deadlines.watch(monotonic() + 0.02)
        deadlines.close()
        await asyncio.sleep(0.05)
        assert swept == []

    asyncio.run(work())
