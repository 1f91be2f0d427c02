"""A layer's expert calls while they are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from torch import Tensor

from splitinfer import transport
from splitinfer.fanout import Share

__all__ = ["ExpertCall", "Pending"]


@dataclass(slots=True)
class ExpertCall:
    """One call in flight: what was asked, the dtype it answers in, the answer, and when both were there."""

    share: Share
    out: str
    answer: asyncio.Future[transport.Reply]
    sent: float
    answered: float = 0.0

    def note_time(self, _: object) -> None:
        self.answered = perf_counter()

    def give_up(self) -> None:
        """Nobody waits for the answer any more. One that has failed already is not worth a word either."""
        if not self.answer.cancel() and not self.answer.cancelled():
            self.answer.exception()


class Pending:
    """What `dispatch` returns: awaiting it adds the partial sums, cancelling it gives the calls up."""

    __slots__ = ("_calls", "_combine")

    def __init__(self, calls: list[ExpertCall], combine: Callable[[], Coroutine[Any, Any, Tensor]]) -> None:
        self._calls = calls
        self._combine = combine

    def __await__(self) -> Generator[Any, None, Tensor]:
        return self._combine().__await__()

    def cancel(self) -> None:
        for call in self._calls:
            call.give_up()
