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
from splitinfer.model.native import Frame, Request, address_of
from splitinfer.timing import Timeline

__all__ = ["Collect", "ReadyRequests", "Shape"]

Collect = Callable[[Rows, list[ExpertCall], float, "Timeline | None"], Awaitable[Tensor]]


class Shape(NamedTuple):
    """Of the rows that are asked about: x [rows, hidden] of `dtype`, the wire's name, and k experts each."""

    rows: int
    hidden: int
    dtype: str
    k: int


class ReadyRequests:
    """Those of one layer for one shape. Satisfies `model.experts.Outgoing`.

    `owner` says which of the `channels` is asked for which expert, `out` the dtype of the answers, `timeout`
    in seconds how long they may take. `collect(rows, calls, start, timeline)` makes the sum of what was sent.
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
    ) -> None:
        rows, hidden, dtype, k = shape
        specs = [(dtype, (rows, hidden)), ("int16", (rows, k)), ("float32", (rows, k))]
        self._nodes = (
            [owner.sole] if owner.sole is not None else sorted({*owner.table.ravel().tolist()} - {-1})
        )
        self._channels = [channels[node] for node in self._nodes]
        self._parcels = [transport.Parcel(method, specs, {"layer": layer, "out": out}) for _ in self._nodes]
        self._asked = [None if owner.sole is not None else owner.asked(node) for node in self._nodes]
        self._out, self._timeout, self._collect = out, timeout, collect
        self._stamped = False
        self.requests: Array[Request] = (Request * len(self._nodes))(
            *(_request(parcel, asked) for parcel, asked in zip(self._parcels, self._asked, strict=True))
        )

    @staticmethod
    def fits(shape: Shape, owner: Owner) -> bool:
        """Whether such calls can lie ready: they are small, and every node that is asked is sent all rows."""
        largest = shape.rows * (4 * shape.hidden + 6 * shape.k) + 192
        whole = owner.sole is not None and owner.sole >= 0
        return (whole or shape.rows == 1) and largest <= transport.PARCEL_NBYTES

    def stamp(self) -> bool:
        """Make them calls of their nodes. False where one cannot go as it is."""
        self._stamped = all(
            channel.stamp(parcel, self._timeout)
            for channel, parcel in zip(self._channels, self._parcels, strict=True)
        )
        return self._stamped

    def may_go(self) -> bool:
        """Whether they can be filled and sent now."""
        if not self._stamped and not self.stamp():
            return False
        for channel, parcel, request in zip(self._channels, self._parcels, self.requests, strict=True):
            file = channel.direct(parcel)
            if file is None:  # it was for a connection that has ended
                self._stamped = False
                return False
            request.frame.file = file
        self._stamped = False
        return True

    def post(
        self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, timeline: Timeline | None = None
    ) -> Awaitable[Tensor]:
        start = perf_counter()
        calls = []
        wire = Rows(x, top_k_index, top_k_weights)
        for node, channel, parcel, request in zip(
            self._nodes, self._channels, self._parcels, self.requests, strict=True
        ):
            if request.needed:
                experts = parcel.tensors[1]
                kept = transport.Tensor(experts.dtype, experts.shape, memoryview(bytes(experts.data)))
                answer = channel.post(parcel, request.frame.sent, timeout=self._timeout)
                calls.append(
                    ExpertCall(Share(node, None, [x, kept, top_k_weights]), self._out, answer, start)
                )
        return self._collect(wire, calls, start, timeline)


def _request(parcel: transport.Parcel, asked: bytearray | None) -> Request:
    x, index, weights = (address_of(tensor.data) for tensor in parcel.tensors)
    frame = Frame(address_of(parcel.frame), parcel.frame.nbytes, -1, 0)
    return Request(frame, x, index, weights, None if asked is None else address_of(asked), 0)
