"""A layer's expert calls before there are any rows: laid out once, filled and sent by the kernels.

What `dispatch` does for a row takes Python a tenth of a millisecond, on caches that the layer's weights have
swept. Here the nodes are at work before Python takes its turn; its part is done while they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from ctypes import Array
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from splitinfer import transport
from splitinfer.fanout import Owner, Rows, Share
from splitinfer.in_flight import ExpertCall
from splitinfer.model.native import Expected, Frame, Request, address_of
from splitinfer.timing import Timeline

__all__ = ["Collect", "ReadyRequests", "Shape"]

Collect = Callable[[Rows, list[ExpertCall], float, "Timeline | None"], Awaitable[Tensor]]
Account = Callable[[float], None]


class Shape(NamedTuple):
    """Of the rows that are asked about: x [rows, hidden] of `dtype`, the wire's name, and k experts each."""

    rows: int
    hidden: int
    dtype: str
    k: int


class ReadyRequests:
    """Those of one layer for one shape. Satisfies `model.experts.Outgoing`.

    `owner` says which of the `nodes` is asked for which expert, `out` the dtype of the answers, `timeout` in
    seconds how long they may take. `collect(rows, calls, start, timeline)` makes the sum of what was sent;
    `account` hears a node's own account of its seconds where that was not needed. `following` are those of
    the next layer.
    """

    def __init__(
        self,
        method: str,
        layer: int,
        shape: Shape,
        owner: Owner,
        channels: Sequence[transport.Channel],
        out: str,
        timeout: float,
        collect: Collect,
        account: Account,
    ) -> None:
        rows, hidden, dtype, k = shape
        specs = [(dtype, (rows, hidden)), ("int16", (rows, k)), ("float32", (rows, k))]
        self.layer = layer
        self.following: ReadyRequests | None = None
        self._nodes = (
            [owner.sole] if owner.sole is not None else sorted({*owner.table.ravel().tolist()} - {-1})
        )
        self._channels = [channels[node] for node in self._nodes]
        self._parcels = [transport.Parcel(method, specs, {"layer": layer, "out": out}) for _ in self._nodes]
        self._asked = [None if owner.sole is not None else owner.asked(node) for node in self._nodes]
        self._out, self._timeout, self._collect, self._account = out, timeout, collect, account
        self._stamped = False
        self.requests: Array[Request] = (Request * len(self._nodes))(
            *(_request(parcel, asked) for parcel, asked in zip(self._parcels, self._asked, strict=True))
        )
        # The one answer, as it should come, where it is the sum.
        self._answer: transport.Parcel | None = None
        self._expected = Expected()
        self._room: memoryview | None = None
        self._start = 0.0
        if len(self._nodes) == 1 and out == dtype:
            self._answer = transport.Parcel("", [(out, (rows, hidden))], {"compute_us": transport.NUMBER})
            self._expected = _expected(self._answer)

    @staticmethod
    def fits(shape: Shape, owner: Owner) -> bool:
        """Whether such calls can lie ready: they are small, and every node that is asked is sent all rows."""
        largest = shape.rows * (8 * shape.hidden + 6 * shape.k) + 192
        whole = owner.sole is not None and owner.sole >= 0
        return (whole or shape.rows == 1) and largest <= transport.PARCEL_NBYTES

    def stamp(self) -> bool:
        """Make them calls of their nodes. False where one cannot go as it is."""
        self._stamped = all(
            channel.stamp(parcel, self._timeout)
            for channel, parcel in zip(self._channels, self._parcels, strict=True)
        )
        if self._answer is not None:
            self._answer.stamp(None, self._parcels[0].id, 0)
        return self._stamped

    def may_go(self) -> bool:
        """Whether they can be filled and sent now."""
        if not self._stamped and not self.stamp():
            return False
        self._stamped, self._start, self._expected.received = False, 0.0, 0
        for channel, parcel, request in zip(self._channels, self._parcels, self.requests, strict=True):
            file = channel.direct(parcel)
            if file is None:  # it was for a connection that has ended
                return False
            request.frame.file = file
        return True

    def expected(self) -> Expected | None:
        if self.following is not None:
            self.following.stamp()  # while the nodes work
        self._start = perf_counter()
        frame, expected = self.requests[0].frame, self._expected
        if self._answer is None or frame.sent < frame.nbytes:
            return None
        room = self._channels[0].room(expected.nbytes)
        if room is None:
            return None
        if room is not self._room:
            self._room = room
            expected.room, expected.size = address_of(room), room.nbytes
        expected.file = frame.file
        return expected

    def answered(self, expected: Expected, timeline: Timeline | None) -> None:
        channel, seconds = self._channels[0], expected.took / 1e6
        channel.settle(self.requests[0].frame.sent, expected.received)
        self._account(seconds)
        if timeline is not None:
            timeline.add_remote(self.layer, channel.address, self._start, expected.seen / 1e9, seconds)

    def post(
        self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, timeline: Timeline | None = None
    ) -> Awaitable[Tensor]:
        calls = []
        received, start = self._expected.received, self._start or perf_counter()
        for node, channel, parcel, request in zip(
            self._nodes, self._channels, self._parcels, self.requests, strict=True
        ):
            if request.needed:
                experts = parcel.tensors[1]
                kept = transport.Tensor(experts.dtype, experts.shape, memoryview(bytes(experts.data)))
                sent = request.frame.sent
                answer = channel.post(parcel, sent, received, timeout=self._timeout)
                share = Share(node, None, [x, kept, top_k_weights])
                calls.append(ExpertCall(share, self._out, answer, start))
        return self._collect(Rows(x, top_k_index, top_k_weights), calls, start, timeline)


def _request(parcel: transport.Parcel, asked: bytearray | None) -> Request:
    x, index, weights = (address_of(tensor.data) for tensor in parcel.tensors)
    return Request(_frame(parcel), x, index, weights, None if asked is None else address_of(asked), 0)


def _expected(answer: transport.Parcel) -> Expected:
    frame = _frame(answer)
    number, body = (address_of(part) - frame.bytes for part in (answer.number, answer.tensors[0].data))
    return Expected(frame.bytes, frame.nbytes, number, body, file=-1)


def _frame(parcel: transport.Parcel) -> Frame:
    return Frame(address_of(parcel.frame), parcel.frame.nbytes, -1, 0)
