"""A layer's expert calls while they are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from reprlib import repr as shortened
from time import perf_counter
from typing import Any

from torch import Tensor

from splitinfer import transport
from splitinfer.errors import RemoteProtocolError
from splitinfer.fanout import Partial, Share

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

    def partial(self, reply: transport.Reply, address: str) -> Partial:
        """The answer of the node at `address`, checked against what was asked. Raises RemoteProtocolError."""
        share, tensors = self.share, reply.tensors
        expected = tuple(share.tensors[0].shape)  # as x
        if len(tensors) == 1 and tensors[0].shape == expected and tensors[0].dtype == self.out:
            return Partial(share.node, share.rows, tensors[0])
        found = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors) or "nothing"
        raise _wrong(address, f"{found}, not {self.out} {list(expected)}")

    @staticmethod
    def arithmetic(reply: transport.Reply, address: str) -> float:
        """The node's own account of its seconds, 0 where it gives none. Raises RemoteProtocolError."""
        microseconds = reply.meta.get("compute_us", 0)
        if type(microseconds) is int and microseconds >= 0:
            return microseconds / 1e6
        raise _wrong(address, f"compute_us {shortened(microseconds)}, which is no number of microseconds")

    def give_up(self) -> None:
        """Nobody waits for the answer any more. One that has failed already is not worth a word either."""
        if not self.answer.cancel() and not self.answer.cancelled():
            self.answer.exception()


def _wrong(address: str, found: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"node {address} answered an expert call with {found}",
        peer=address,
        remedy="Run the same version of splitinfer on both machines.",
    )


class Pending:
    """What `dispatch` returns: awaiting it adds the partial sums, cancelling it gives the calls up.

    Where there is one call, on `channel`, somebody with other work to do may `look` for its answer.
    """

    __slots__ = ("_calls", "_channel", "_combine", "_total")

    def __init__(
        self,
        calls: list[ExpertCall],
        combine: Callable[[], Coroutine[Any, Any, Tensor]],
        channel: transport.Channel | None = None,
    ) -> None:
        self._calls = calls
        self._combine = combine
        self._channel = channel
        self._total: asyncio.Future[Tensor] | None = None

    @property
    def file(self) -> int:
        """The descriptor that can be read once the answer is there; -1 where there is none."""
        return -1 if self._channel is None else self._channel.file

    def look(self) -> bool:
        """Take the answer if it has come, and do with it all that there is to do. True where no other look
        can bring more: whoever awaits this has the sum then, or mends what went wrong."""
        answer = self._calls[0].answer
        if self._channel is None or self._total is not None:
            return True
        if not answer.done():
            self._channel.look()
            if not answer.done():
                return False
            self._calls[0].note_time(None)  # its callbacks come in the loop's next turn
        if answer.cancelled() or answer.exception() is not None:
            return True
        total: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        try:
            self._combine().send(None)  # with the answer there it waits for nothing
        except StopIteration as done:
            total.set_result(done.value)
        except Exception as error:
            total.set_exception(error)
        self._total = total
        return True

    def __await__(self) -> Generator[Any, None, Tensor]:
        return (self._combine() if self._total is None else self._total).__await__()

    def cancel(self) -> None:
        for call in self._calls:
            call.give_up()
        if self._total is not None:
            self._total.exception()  # seen, if there is one
