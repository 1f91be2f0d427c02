"""A prompt in chunks that follow each other: the states of one after the other, and all of them at work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from time import monotonic

import pytest
import torch
from torch import Tensor

from splitinfer.errors import ConnectionLost
from splitinfer.model.experts import ExpertBank, LocalExperts, Where
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.pipeline import prefill
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline
from tests.checkpoints import write_checkpoint
from tests.patience import with_more_time

LAYERS, EXPERTS = 4, 11
IDS = [2, *range(3, 120)]


class Distant:
    """Local experts at the far end of a link: answers come after `delay` seconds. Counts calls under way;
    the call numbered `lost` fails."""

    def __init__(self, bank: ExpertBank, delay: float, lost: int = -1) -> None:
        self.local = LocalExperts(bank)
        self.delay = delay
        self.lost = lost
        self.calls = self.under_way = self.most = 0

    def where(self, layer: int) -> Where:
        return "away"

    def dispatch(
        self, layer: int, x: Tensor, index: Tensor, weights: Tensor, timeline: Timeline | None = None
    ) -> Awaitable[Tensor]:
        async def answer() -> Tensor:
            number, self.calls = self.calls, self.calls + 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await asyncio.sleep(self.delay)
            self.under_way -= 1
            if number == self.lost:
                raise ConnectionLost("the link is gone")
            return await self.local.dispatch(layer, x, index, weights, timeline)

        return asyncio.ensure_future(answer())


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ExpertBank]:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))
    return checkpoint, ExpertBank(checkpoint, dict.fromkeys(range(LAYERS), range(EXPERTS)))


async def states(model: Gemma, rows: int, in_flight: int) -> tuple[Tensor, Tensor]:
    """The hidden states of all of IDS, and those of a token after them."""
    cache = model.new_cache()
    chunks = [chunk async for chunk in prefill(model, IDS, cache, rows=rows, in_flight=in_flight)]
    assert cache.length == len(IDS)
    following = await model.forward([Segment(torch.tensor([7]), cache)])
    return torch.cat(chunks), following


@pytest.mark.parametrize("rows", [1, 7, 20, 118, 200])
def test_the_states_of_one_chunk_after_the_other(bank: tuple[Checkpoint, ExpertBank], rows: int) -> None:
    """Chunks below and above the window of 8, and above the number of rows that leave the event loop."""
    model = Gemma.load(bank[0], Distant(bank[1], 0.003))
    straight = asyncio.run(states(model, rows, 1))
    assert model.experts.most == 1  # type: ignore[union-attr]
    piped = asyncio.run(states(model, rows, 3))
    assert model.experts.most >= min(2, -(-len(IDS) // rows))  # type: ignore[union-attr]
    for expected, found in zip(straight, piped, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_round_trips_are_those_of_one_chunk(bank: tuple[Checkpoint, ExpertBank]) -> None:
    """Six chunks over a slow link: about one step each behind the other, not all layers."""

    async def took(delay: float, in_flight: int) -> float:
        model = Gemma.load(bank[0], Distant(bank[1], delay))
        start = monotonic()
        await states(model, 20, in_flight)
        return monotonic() - start

    def overlapped(delay: float) -> None:
        assert asyncio.run(took(delay, 6)) < 4 * LAYERS * delay

    assert asyncio.run(took(0.05, 1)) > 7 * LAYERS * 0.05
    with_more_time(overlapped, 0.05, 0.2, 1.0)


def test_a_lost_chunk_gives_all_up(bank: tuple[Checkpoint, ExpertBank]) -> None:
    async def lose() -> None:
        experts = Distant(bank[1], 0.001, lost=9)
        model = Gemma.load(bank[0], experts)
        cache = model.new_cache()
        with pytest.raises(ConnectionLost):
            async for _ in prefill(model, IDS, cache, rows=20, in_flight=4):
                pass
        assert len(asyncio.all_tasks()) - 1 <= experts.under_way  # calls already made end by themselves
        assert cache.length in (0, 20, 40)
        kept = cache.length
        model.experts = LocalExperts(bank[1])
        rest = await model.forward([Segment(torch.tensor(IDS[kept:]), cache)])
        whole = await model.forward([Segment(torch.tensor(IDS), model.new_cache())])
        torch.testing.assert_close(rest, whole[kept:], atol=1e-5, rtol=1e-5)

    asyncio.run(lose())


def test_leaving_early_leaves_no_task(bank: tuple[Checkpoint, ExpertBank]) -> None:
    async def leave() -> int:
        model = Gemma.load(bank[0], LocalExperts(bank[1]))
        chunks = prefill(model, IDS, model.new_cache(), rows=20, in_flight=4)
        await anext(chunks)
        await chunks.aclose()
        return len(asyncio.all_tasks())

    assert asyncio.run(leave()) == 1
