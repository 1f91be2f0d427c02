"""A sum that is waited for while there is other work: its answer may be taken in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from splitinfer import transport
from splitinfer.errors import ConnectionLost
from splitinfer.fanout import Share
from splitinfer.in_flight import ExpertCall, Pending

SUM = torch.ones(1, 4)


class Channel:
    """Answers, or fails, when it is looked at; not at all without `bring`."""

    file = 7

    def __init__(self, bring: Callable[[asyncio.Future[Any]], None] = lambda _: None) -> None:
        self.bring = bring
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.looks = 0

    def look(self) -> None:
        self.looks += 1
        self.bring(self.answer)


def pending(channel: Channel, combined: list[str], wrong: Exception | None = None) -> Pending:
    async def combine() -> Tensor:
        combined.append("begun")
        await channel.answer
        if wrong is not None:
            raise wrong
        return SUM

    call = ExpertCall(Share(0, None, []), "float32", channel.answer, 0.0)
    return Pending([call], combine, cast(transport.Channel, channel))


def test_an_answer_that_is_there_is_added_up_at_once() -> None:
    async def main() -> None:
        channel, combined = Channel(lambda answer: answer.set_result("reply")), list[str]()
        waits = pending(channel, combined)
        assert waits.file == 7
        for _ in range(2):
            assert waits.look()
            assert (channel.looks, combined) == (1, ["begun"])
        assert waits._calls[0].answered > 0
        assert await waits is SUM
        assert combined == ["begun"]
        waits.cancel()

    asyncio.run(main())


def test_an_answer_that_is_not_there_is_waited_for() -> None:
    async def main() -> None:
        channel, combined = Channel(), list[str]()
        waits = pending(channel, combined)
        assert not waits.look()
        assert (channel.looks, combined) == (1, [])
        asyncio.get_running_loop().call_soon(channel.answer.set_result, "reply")
        assert await waits is SUM

    asyncio.run(main())


def test_a_lost_call_is_left_to_whoever_awaits() -> None:
    async def main() -> None:
        channel = Channel(lambda answer: answer.set_exception(ConnectionLost("gone", peer="there")))
        combined = list[str]()
        waits = pending(channel, combined)
        assert waits.look()
        assert combined == []
        with pytest.raises(ConnectionLost):
            await waits

    asyncio.run(main())


@pytest.mark.parametrize("awaited", [True, False])
def test_a_wrong_answer_is_told_to_whoever_awaits(awaited: bool) -> None:
    async def main() -> None:
        channel = Channel(lambda answer: answer.set_result("reply"))
        waits = pending(channel, [], ValueError("wrong"))
        waits.look()
        if not awaited:
            waits.cancel()
            return
        with pytest.raises(ValueError, match="wrong"):
            await waits

    asyncio.run(main())


def test_several_calls_have_no_descriptor() -> None:
    async def main() -> None:
        channel = Channel()
        calls = [ExpertCall(Share(n, None, []), "float32", channel.answer, 0.0) for n in range(2)]
        waits = Pending(calls, asyncio.Event().wait)  # type: ignore[arg-type]  # never run
        assert waits.file == -1
        waits.look()
        assert channel.looks == 0

    asyncio.run(main())
