"""Sequences side by side: shared steps, the tokens each would have alone, joining, leaving and failing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitinfer import AsyncEngine
from splitinfer.batching import Batcher
from splitinfer.errors import ConnectionLost
from splitinfer.model.front import Front
from splitinfer.model.gemma import Segment
from splitinfer.timing import Timeline
from tests.checkpoints import write_checkpoint
from tests.patience import until
from tests.test_split import addresses, running

PROMPTS = [[2, *range(5, 5 + length)] for length in (3, 60, 9, 30, 1, 17, 25, 40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


class Fake:
    """A model whose hidden states are its token ids; a step takes 10 ms. Token 99 fails its step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.under_way = self.most = 0

    async def forward(
        self,
        segments: Sequence[Segment],
        *,
        timeline: Timeline | None = None,
        front: Front | None = None,
        alone: bool = False,
    ) -> Tensor:
        ids = torch.cat([segment.token_ids for segment in segments])
        self.steps.append(ids.tolist())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        if 99 in ids:
            raise ConnectionLost("the link is gone")
        if timeline is not None:
            timeline.add("network", 0, 0.0, 0.25)
        return ids.float().unsqueeze(-1)

    def logits(self, hidden: Tensor, *, timeline: Timeline | None = None) -> Tensor:
        return hidden + 0.5


def seats(count: int) -> tuple[Fake, list[Any]]:
    fake = Fake()
    batcher = Batcher(fake)  # type: ignore[arg-type]
    return fake, [batcher.seat() for _ in range(count)]


def segment(*ids: int) -> Segment:
    return Segment(torch.tensor(ids), None)  # type: ignore[arg-type]


def test_two_groups_share_their_steps_and_alternate() -> None:
    fake, all_seats = seats(6)

    async def one(number: int) -> None:
        for step in range(5):
            timeline = Timeline()
            hidden, logits = await all_seats[number].step(segment(number, 10 * step), timeline)
            assert hidden.flatten().tolist() == [number, 10 * step]
            assert logits.flatten().tolist() == [number + 0.5, 10 * step + 0.5]
            assert timeline.by_phase() == {"network": 0.25}
            await asyncio.sleep(0)

    async def all_() -> None:
        await asyncio.gather(*map(one, range(6)))

    asyncio.run(all_())
    assert fake.most == 2
    assert len(fake.steps) <= 2 * 5 + 2  # the first may not find all there
    assert max(map(len, fake.steps)) == 6


def test_one_alone_never_waits() -> None:
    fake, (seat,) = seats(1)

    async def run() -> None:
        for _ in range(3):
            await seat.step(segment(1), Timeline())
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert fake.steps == [[1]] * 3


def test_who_is_late_does_not_stop_the_others() -> None:
    fake, (first, _, late, _) = seats(4)  # first and late sit in one group

    async def run() -> None:
        for _ in range(3):
            async with asyncio.timeout(30):
                await first.step(segment(1), Timeline())
        joined = asyncio.gather(first.step(segment(1), Timeline()), late.step(segment(2), Timeline()))
        await joined

    asyncio.run(run())
    assert fake.steps[:3] == [[1]] * 3
    assert fake.steps[3:] == [[1, 2]]


def test_who_leaves_is_not_waited_for() -> None:
    fake, (first, _, leaving, _) = seats(4)

    async def run() -> float:
        await asyncio.gather(first.step(segment(1), Timeline()), leaving.step(segment(2), Timeline()))
        waiting = asyncio.ensure_future(first.step(segment(1), Timeline()))
        await asyncio.sleep(0)
        leaving.leave()
        await waiting
        return 0.0

    asyncio.run(run())
    assert fake.steps == [[1, 2], [1]]


def test_who_gives_up_does_not_stop_the_step() -> None:
    fake, (first, _, second, _) = seats(4)

    async def run() -> None:
        one, other = (
            asyncio.ensure_future(seat.step(segment(n), Timeline())) for n, seat in ((1, first), (2, second))
        )
        await asyncio.sleep(0.002)
        other.cancel()
        hidden, _ = await one
        assert hidden.tolist() == [[1.0]]
        with pytest.raises(asyncio.CancelledError):
            await other
        waiting = asyncio.ensure_future(second.step(segment(3), Timeline()))
        await asyncio.sleep(0)
        waiting.cancel()  # before its step began
        await asyncio.wait([waiting])
        second.leave()
        await first.step(segment(4), Timeline())

    asyncio.run(run())
    assert fake.steps == [[1, 2], [4]]


def test_a_failed_step_fails_for_all_in_it_and_no_other() -> None:
    fake, (first, elsewhere, second, _) = seats(4)

    async def run() -> None:
        results = await asyncio.gather(
            first.step(segment(99), Timeline()),
            second.step(segment(2), Timeline()),
            elsewhere.step(segment(3), Timeline()),
            return_exceptions=True,
        )
        assert [type(r) for r in results] == [ConnectionLost, ConnectionLost, tuple]
        hidden, _ = await second.step(segment(5), Timeline())  # and the group goes on
        assert hidden.tolist() == [[5.0]]

    asyncio.run(run())
    assert fake.under_way == 0


@pytest.mark.parametrize("draft", ["off", "lookup"])
def test_sequences_have_the_tokens_they_would_have_alone(checkpoint: Path, draft: str) -> None:
    """Eight prompts of odd lengths, greedy and sampled, joining and leaving at different times."""
    options: list[dict[str, Any]] = [
        {"max_tokens": 10 + 5 * n, "ignore_eos": True, "temperature": n % 3 / 2, "seed": n} for n in range(8)
    ]

    async def run() -> tuple[list[Any], list[Any], int]:
        async with (
            running(checkpoint, [("0-5", None), ("6-10", None)]) as nodes,
            AsyncEngine(checkpoint, addresses(nodes), draft=draft) as engine,
        ):
            alone = [await engine.generate(p, **o) for p, o in zip(PROMPTS, options, strict=True)]

            before = engine.traffic()[2]

            async def later(number: int) -> Any:
                await until(lambda: engine.traffic()[2] - before >= 16 * number)
                return await engine.generate(PROMPTS[number], **options[number])

            together = await asyncio.gather(*map(later, range(8)))
            return alone, together, engine.traffic()[2] - before

    alone, together, calls = asyncio.run(run())
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert calls < 0.6 * sum(c.usage.calls for c in alone)


def test_steps_of_one_alone_may_follow_each_other() -> None:
    """Two windows of one sequence side by side; a newcomer's rows wait for them."""
    fake, (seat,) = seats(1)

    async def run() -> None:
        assert seat.alone
        first, second = (seat.start(segment(n), Timeline(), Front()) for n in (1, 2))
        await asyncio.sleep(0)
        other = seat._batcher.seat()
        other._group.members -= 1  # into the same group
        other._group = seat._group
        other._group.members += 1
        assert not seat.alone
        third = asyncio.create_task(other.step(segment(3), Timeline()))
        second.cancel()
        assert (await first)[0].item() == 1
        assert (await third)[0].item() == 3

    asyncio.run(run())
    assert fake.steps == [[1], [2], [3]]
