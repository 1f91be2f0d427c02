"""A layer's expert calls before there are any rows: laid out once, filled and sent by the kernels.

What `dispatch` does for a row takes Python a tenth of a millisecond, on caches that the layer's weights have
swept. Here the nodes are at work before Python takes its turn; its part is done while they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from ctypes import Array
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from splitinfer import transport
from splitinfer.expert_call import answer_parcel
from splitinfer.fanout import Owner, Rows, Share, name_of
from splitinfer.in_flight import ExpertCall
from splitinfer.model.native import MOST_ANSWERS, Expected, Frame, Request, address_of
from splitinfer.timing import Timeline

__all__ = ["Collect", "ReadyCalls", "ReadyRequests", "Shape", "Waits"]

Collect = Callable[[int, Rows, list[ExpertCall], float, "Timeline | None"], Awaitable[Tensor]]

ALIGNMENT = 64  # of tensors on the wire
PATIENCE = 5e-3  # seconds: longer waits leave the event loop to others
_WORTH_FROM, _MOST = 2, 3  # as in transport.polling
_VAIN, _MOST_VAIN = 4, 4096  # waits after one in vain before the next like it: twice as many each time


class Waits:
    """What a client's waits for its nodes were like lately. `seconds` is the nodes' own account of their
    arithmetic, the slowest of each layer."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._short = 0
        self._vain = _VAIN

    @property
    def patience(self) -> int:
        """For how many nanoseconds to wait for the next answer without a turn of the event loop."""
        return int(PATIENCE * 1e9) if self._short >= _WORTH_FROM else 0

    def note(self, waited: float, compute: float) -> None:
        """An answer was waited for so long when all else was done."""
        self.seconds += compute
        if waited <= PATIENCE:
            self._short = min(_MOST, self._short + 1)
        elif self._short > 0:
            self._short -= 1

    def in_vain(self) -> None:
        """Patience was over before the answer came; it may need the very event loop that was kept waiting."""
        if self.patience:
            self._short, self._vain = -self._vain, min(2 * self._vain, _MOST_VAIN)

    def worth_it(self) -> None:
        """It was not over."""
        self._vain = _VAIN


class Shape(NamedTuple):
    """Of the rows that are asked about: x [rows, hidden] of `dtype`, the wire's name, and k experts each."""

    rows: int
    hidden: int
    dtype: str
    k: int


class ReadyRequests:
    """Those of one layer for one shape. Satisfies `model.experts.Outgoing`.

    `owner` says which of the nodes, `names` and `channels`, is asked for which expert, `out` the dtype of the
    answers, `timeout` in seconds how long they may take. `collect(layer, rows, calls, start, timeline)` makes
    the sum of what was sent; `waits` remembers how long that took. `following` are those of the next layer.
    """

    def __init__(
        self,
        method: str,
        layer: int,
        shape: Shape,
        owner: Owner,
        names: Sequence[str],
        channels: Sequence[transport.Channel],
        out: str,
        timeout: float,
        collect: Collect,
        waits: Waits,
    ) -> None:
        rows, hidden, dtype, k = shape
        specs = [(dtype, (rows, hidden)), ("int16", (rows, k)), ("float32", (rows, k))]
        self._layer, self._names = layer, names
        self.following: ReadyRequests | None = None
        self._nodes = (
            [owner.sole] if owner.sole is not None else sorted({*owner.table.ravel().tolist()} - {-1})
        )
        self._channels = [channels[node] for node in self._nodes]
        self._parcels = [transport.Parcel(method, specs, {"layer": layer, "out": out}) for _ in self._nodes]
        self._asked = [None if owner.sole is not None else owner.asked(node) for node in self._nodes]
        self._out, self._timeout, self._collect, self._waits = out, timeout, collect, waits
        self._stamped = False
        self.requests: Array[Request] = (Request * len(self._nodes))(
            *(_request(parcel, asked) for parcel, asked in zip(self._parcels, self._asked, strict=True))
        )
        # The answers as they should come, where the kernels can add them.
        summed = out == (dtype if len(self._nodes) == 1 else "float32")
        self._answers = [
            answer_parcel(out, (rows, hidden))
            for _ in self._nodes
            if summed and len(self._nodes) <= MOST_ANSWERS
        ]
        self._expected = (Expected * len(self._answers))(*map(_expected, self._answers))
        for node, awaited in zip(self._nodes, self._expected, strict=False):
            awaited.awake = int(channels[node].config.busy_poll * 1e9)
        self._start = 0.0

    def stamp(self) -> bool:
        """Make them calls of their nodes. False where one cannot go as it is."""
        self._stamped = all(
            channel.stamp(parcel, self._timeout)
            for channel, parcel in zip(self._channels, self._parcels, strict=True)
        )
        for answer, parcel in zip(self._answers, self._parcels, strict=False):
            answer.stamp(None, parcel.id, 0)
        return self._stamped

    def may_go(self) -> bool:
        """Whether they can be filled and sent now."""
        if not self._stamped and not self.stamp():
            return False
        self._stamped, self._start = False, 0.0
        for expected in self._expected:
            expected.received = 0
        for channel, parcel, request in zip(self._channels, self._parcels, self.requests, strict=True):
            file = channel.direct(parcel)
            if file is None:  # it was for a connection that has ended
                return False
            request.frame.file = file
        return True

    def expected(self) -> Array[Expected] | None:
        if self.following is not None:
            self.following.stamp()  # while the nodes work
        self._start = perf_counter()
        for place, expected in enumerate(self._expected):
            request = self.requests[place]
            expected.file = request.frame.file if request.needed else -1
            if request.needed and not self._may_read(place, expected):
                return None
        return self._expected if self._answers else None

    def _may_read(self, place: int, expected: Expected) -> bool:
        """Sees that the answer has somewhere to go."""
        frame = self.requests[place].frame
        room = self._channels[place].room(expected.nbytes) if frame.sent == frame.nbytes else None
        if room is None:
            return False
        expected.room, expected.size = address_of(room), room.nbytes
        return True

    @property
    def patience(self) -> int:
        return self._waits.patience

    def missed(self) -> None:
        self._waits.in_vain()

    def answered(self, start: float, timeline: Timeline | None) -> float:
        compute, end = 0.0, start
        for place, expected in enumerate(self._expected):
            request, channel = self.requests[place], self._channels[place]
            name = self._names[self._nodes[place]]
            if request.needed:
                channel.settle(request.frame.sent, expected.received)
                seconds, seen = expected.took / 1e6, expected.seen / 1e9
                compute, end = max(compute, seconds), max(end, seen)
                if timeline is not None:
                    timeline.add_remote(self._layer, name, self._start, seen, seconds)
        self._waits.note(end - start, compute)
        self._waits.worth_it()
        if timeline is not None:
            split = max(start, end - compute)
            timeline.add("network", self._layer, start, split)
            timeline.add("experts", self._layer, split, end)
        return end

    def post(
        self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, timeline: Timeline | None = None
    ) -> Awaitable[Tensor]:
        calls, start = [], perf_counter()
        sent = self._start or start
        for place, (node, channel, parcel) in enumerate(
            zip(self._nodes, self._channels, self._parcels, strict=True)
        ):
            request = self.requests[place]
            if request.needed:
                received = self._expected[place].received if self._answers else 0
                experts = parcel.tensors[1]
                kept = transport.Tensor(experts.dtype, experts.shape, memoryview(bytes(experts.data)))
                answer = channel.post(parcel, request.frame.sent, received, timeout=self._timeout)
                share = Share(node, None, [x, kept, top_k_weights])
                calls.append(ExpertCall(share, self._out, answer, sent))
        return self._collect(self._layer, Rows(x, top_k_index, top_k_weights), calls, start, timeline)


class ReadyCalls:
    """The ready requests of all layers, laid out when they are first asked for, while `owners` are asked."""

    def __init__(
        self,
        method: str,
        owners: Mapping[int, Owner],
        names: Sequence[str],
        channels: Sequence[transport.Channel],
        exact: bool,
        timeout: float,
        collect: Collect,
        waits: Waits,
    ) -> None:
        self._method, self._owners, self._exact = method, owners, exact
        self._names, self._channels, self._timeout = names, channels, timeout
        self._collect, self._waits = collect, waits
        # By layer, shape and dtype of x; False where such calls cannot lie ready.
        self._known: dict[Any, ReadyRequests | Literal[False]] = {}

    def of(self, layer: int, x: Tensor, k: int) -> ReadyRequests | None:
        """Those of a layer for rows like x [rows, H] with k experts each."""
        ready = self._known.get((layer, x.shape, x.dtype))
        if ready is None:
            ready = self._known[layer, x.shape, x.dtype] = self._lay_out(layer, x, k)
            before = self._known.get((layer - 1, x.shape, x.dtype))
            if before and ready:
                before.following = ready
        return ready or None

    def _lay_out(self, layer: int, x: Tensor, k: int) -> ReadyRequests | Literal[False]:
        owner, rows, dtype = self._owners[layer], x.shape[0], name_of(x.dtype)
        sole = owner.sole is not None and owner.sole >= 0
        out = "int64" if self._exact else dtype if sole else "float32"
        # They are small, and every node that is asked is sent all rows.
        request = x.nbytes + rows * 6 * k + 3 * ALIGNMENT
        answer = x.numel() * getattr(torch, out).itemsize + ALIGNMENT
        if not (sole or rows == 1) or max(request, answer) > transport.PARCEL_NBYTES:
            return False
        shape = Shape(rows, x.shape[1], dtype, k)
        return ReadyRequests(
            self._method,
            layer,
            shape,
            owner,
            self._names,
            self._channels,
            out,
            self._timeout,
            self._collect,
            self._waits,
        )


def _request(parcel: transport.Parcel, asked: bytearray | None) -> Request:
    x, index, weights = (address_of(tensor.data) for tensor in parcel.tensors)
    return Request(Frame.of(parcel.frame), x, index, weights, None if asked is None else address_of(asked), 0)


def _expected(answer: transport.Parcel) -> Expected:
    frame = Frame.of(answer.frame)
    number, body = (address_of(part) - frame.bytes for part in (answer.number, answer.tensors[0].data))
    return Expected(frame.bytes, frame.nbytes, number, body, file=-1)
