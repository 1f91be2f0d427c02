"""Split execution, the client's half: fan rows out to the nodes that hold their experts, add what comes back.

One call per node per layer, whatever the number of experts, rows or sequences; a node is sent only the rows
it has work for. `dispatch` puts the bytes on the wire before it returns, so that the caller's dense MLP runs
while the experts travel. A call that the link lost is tried again, on a replica first: nodes keep no state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitinfer import transport
from splitinfer.errors import (
    DeadlineExceeded,
    LinkError,
    Overloaded,
    PlacementError,
    RemoteProtocolError,
    TransportError,
)
from splitinfer.placement import Columns, Holding, Placement, format_ranges
from splitinfer.timing import Timeline

__all__ = ["NodeInfo", "RemoteExperts"]

log = logging.getLogger(__name__)

RETRY_PAUSE = 0.2  # seconds before the same node is asked again when it has no replica
AVOID_FOR = 5.0  # seconds that a node whose link failed is passed over while its replicas serve
EXPERT_CALL = "experts"

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NodeInfo:
    """A connected node: where it is and what it holds."""

    address: str
    holding: Holding

    def __str__(self) -> str:
        return f"{self.address}: {self.holding}"


@dataclass(slots=True)
class _Call:
    """One call in flight: the node, the rows of the block it was sent (None: all), the experts asked for
    ([rows, k], -1 for the others), the dtype it answers in, and the answer."""

    node: int
    rows: Indices | None
    experts: npt.NDArray[np.int16]
    out: str
    answer: asyncio.Future[transport.Reply]


class _Pending:
    """What `dispatch` returns: awaiting it adds the partial sums, cancelling it gives the calls up."""

    __slots__ = ("_calls", "_combine")

    def __init__(self, calls: list[_Call], combine: Callable[[], Coroutine[Any, Any, Tensor]]) -> None:
        self._calls = calls
        self._combine = combine

    def __await__(self) -> Generator[Any, None, Tensor]:
        return self._combine().__await__()

    def cancel(self) -> None:
        for call in self._calls:
            call.answer.cancel()


class RemoteExperts:
    """The experts of a model, held by nodes. Satisfies `model.experts.Experts`.

    Open with `await RemoteExperts.connect(...)`; close with `await close()`.
    """

    def __init__(self, channels: dict[str, transport.Channel], placement: Placement, timeout: float) -> None:
        self.placement = placement
        self.nodes = [
            NodeInfo(address, holding)
            for address, holding in zip(placement.addresses, placement.holdings, strict=True)
        ]
        self._channels = [channels[address] for address in placement.addresses]
        self._timeout = timeout
        self._avoided: frozenset[int] = frozenset()
        self._avoided_until = 0.0
        self._looking: set[asyncio.Future[float]] = set()
        self._avoid(frozenset())

    @classmethod
    async def connect(
        cls,
        addresses: Sequence[str],
        *,
        layers: Sequence[int],
        num_experts: int,
        columns: int,
        fingerprint: str,
        timeout: float,
        config: transport.ClientConfig | None = None,
    ) -> RemoteExperts:
        """Connect to all nodes at once, ask what each holds, and check coverage before the first token.

        `columns` is the model's moe_intermediate_size, `timeout` the deadline of one expert call in seconds.
        Raises `PlacementError` for gaps, conflicts and other models, and what `transport.connect` raises,
        naming the node.
        """
        unique = list(dict.fromkeys(addresses))
        opened = await asyncio.gather(
            *(transport.connect(address, config=config) for address in unique), return_exceptions=True
        )
        channels = {
            address: channel
            for address, channel in zip(unique, opened, strict=True)
            if not isinstance(channel, BaseException)
        }
        try:
            for address, failure in zip(unique, opened, strict=True):
                if isinstance(failure, BaseException):
                    raise _naming(address, failure)
            holdings = [(a, Holding.from_info(channel.info, a)) for a, channel in channels.items()]
            for address, holding in holdings:
                channels[address].on_info = partial(_still_holds, holding, address)
            placement = Placement.plan(
                holdings,
                layers=layers,
                num_experts=num_experts,
                columns=columns,
                fingerprint=fingerprint,
            )
            return cls(channels, placement, timeout)
        except BaseException:
            await asyncio.gather(*(channel.close() for channel in channels.values()))
            raise

    async def close(self) -> None:
        """Close the connections. Calls in flight fail."""
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def traffic(self) -> tuple[int, int, int]:
        """(bytes sent, bytes received, calls) since the connections opened, headers included."""
        stats = [channel.stats for channel in self._channels]
        return (
            sum(s.sent_nbytes for s in stats),
            sum(s.received_nbytes for s in stats),
            sum(s.calls for s in stats),
        )

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        """Send rows `x` [rows, hidden] to the nodes that hold their experts; await the weighted sum.

        `top_k_index` [rows, k] names experts, `top_k_weights` [rows, k] (float32) weighs them. The result has
        the shape and dtype of `x`. A node answers in the dtype of `x` when it is the only one asked (the sum
        is rounded once, there) and in float32 when several add up (rounded once, here).

        Awaiting raises `PlacementError` when every holder of an expert is gone, and the node's own error
        otherwise. A missing answer is never replaced by zeros.
        """
        wire = _Rows(
            x.detach().cpu().contiguous(),
            top_k_index.cpu().numpy(),
            top_k_weights.to(device="cpu", dtype=torch.float32).numpy(),
        )
        deadline = perf_counter() + self._timeout
        if self._avoided and perf_counter() > self._avoided_until:
            self._look_again()
        calls = self._send(layer, wire, self._owners[layer][:, wire.index], deadline)
        return _Pending(calls, lambda: self._combine(layer, wire, calls, deadline, timeline, x))

    def _avoid(self, nodes: frozenset[int]) -> None:
        """Ask others instead of these `nodes` for a while, wherever there are others."""
        self._avoided, self._avoided_until = nodes, perf_counter() + AVOID_FOR
        self._owners = {layer: self._owner(layer) for layer in self.placement.holders}

    def _owner(self, layer: int, span: Columns | None = None) -> npt.NDArray[np.int16]:
        """`Placement.owner`, asking avoided nodes only for what nobody else holds."""
        owner = self.placement.owner(layer, self._avoided, span)
        if (owner[0] >= 0).all():
            return owner
        anyone = self.placement.owner(layer, span=span)
        slices = max(len(owner), len(anyone))
        owner, anyone = (
            np.pad(o, ((0, slices - len(o)), (0, 0)), constant_values=-1) for o in (owner, anyone)
        )
        return np.where(owner[0] < 0, anyone, owner)

    def _look_again(self) -> None:
        """Ask those avoided nodes again that have come back; look after the others without waiting."""
        away = frozenset(node for node in self._avoided if not self._channels[node].connected)
        for node in away:
            task = asyncio.ensure_future(self._channels[node].ping())
            self._looking.add(task)
            task.add_done_callback(self._seen)
        self._avoid(away)

    def _seen(self, task: asyncio.Future[float]) -> None:
        self._looking.discard(task)
        if not task.cancelled():
            task.exception()  # still away: no news

    def _send(
        self,
        layer: int,
        wire: _Rows,
        owner: npt.NDArray[np.int16],
        deadline: float,
        *,
        again: bool = False,
    ) -> list[_Call]:
        """One call to every node in `owner` [slices, rows, k] (-1: nobody to ask for this entry)."""
        calls = []
        timeout = max(deadline - perf_counter(), 0.001)
        nodes = sorted(set(owner.ravel().tolist()) - {-1})
        alone = len(nodes) == 1 and not again
        out = str(wire.x.dtype).removeprefix("torch.") if alone else "float32"
        meta = {"layer": layer, "out": out}
        for node in nodes:
            mine = (owner == node).any(axis=0)
            needed = mine.any(axis=1)
            rows = None if needed.all() else np.flatnonzero(needed)
            index = np.where(mine, wire.index, -1).astype(np.int16)
            x, weights = wire.x, wire.weights
            if rows is not None:
                x, index, weights = x[torch.from_numpy(rows)], index[rows], weights[rows]
            try:
                answer = self._channels[node].start(EXPERT_CALL, [x, index, weights], meta, timeout=timeout)
            except Overloaded as error:  # it drains: known before anything was sent
                answer = asyncio.get_running_loop().create_future()
                answer.set_exception(error)
            calls.append(_Call(node, rows, index, out, answer))
        return calls

    async def _combine(
        self,
        layer: int,
        wire: _Rows,
        calls: list[_Call],
        deadline: float,
        timeline: Timeline | None,
        like: Tensor,
    ) -> Tensor:
        """Wait for all calls, mend what the link lost, and add the partial sums in the nodes' order."""
        start = perf_counter()
        partials: list[tuple[int, Indices | None, Tensor]] = []
        compute = 0.0
        while calls:
            lost: list[tuple[_Call, LinkError | Overloaded]] = []
            for call in calls:
                try:
                    reply = await call.answer
                except DeadlineExceeded as error:
                    raise self._late(call, layer) from error
                except (LinkError, Overloaded) as error:
                    lost.append((call, error))
                    continue
                partials.append((call.node, call.rows, self._partial(call, reply, wire)))
                compute = max(compute, reply.meta.get("compute_us", 0) / 1e6)
            calls = []
            if lost:
                calls = await self._again(layer, wire, lost, deadline)
        if timeline is not None:
            end = perf_counter()
            # What the caller waited for, split by the slowest node's own account of its arithmetic.
            split = max(start, end - compute)
            timeline.add("network", layer, start, split)
            timeline.add("experts", layer, split, end)
        return _sum(partials, wire.x).to(like.device)

    def _late(self, call: _Call, layer: int) -> DeadlineExceeded:
        address = self.placement.addresses[call.node]
        return DeadlineExceeded(
            f"node {address} gave no answer for layer {layer} within {self._timeout:g} s",
            timeout=self._timeout,
            peer=address,
            remedy=f"See whether the node at {address} runs and is not overloaded, or raise --timeout.",
        )

    def _partial(self, call: _Call, reply: transport.Reply, wire: _Rows) -> Tensor:
        """The answer's tensor, checked against what was asked."""
        expected = (len(call.experts), wire.x.shape[1])
        address = self.placement.addresses[call.node]
        if len(reply.tensors) != 1 or tuple(reply.tensors[0].shape) != expected:
            shapes = [tuple(t.shape) for t in reply.tensors]
            raise RemoteProtocolError(
                f"node {address} answered an expert call with {shapes}, not [{expected}]",
                peer=address,
                remedy="Run the same version of splitinfer on both machines.",
            )
        if reply.tensors[0].dtype != call.out:
            raise RemoteProtocolError(
                f"node {address} answered in {reply.tensors[0].dtype}, asked was {call.out}", peer=address
            )
        partial: Tensor = reply.tensors[0].torch()
        return partial

    async def _again(
        self, layer: int, wire: _Rows, lost: list[tuple[_Call, LinkError | Overloaded]], deadline: float
    ) -> list[_Call]:
        """Send what the link lost once more: to replicas where there are some, else to the same node.

        Raises `PlacementError` when nobody has answered by the deadline, with the link's error as its cause.
        """
        asked: dict[Columns, npt.NDArray[np.int16]] = {}  # experts by the slice that is missing of them
        for call, error in lost:
            span = self.placement.spans[call.node]
            missing = asked.setdefault(span, np.full(wire.index.shape, -1, dtype=np.int16))
            rows = slice(None) if call.rows is None else call.rows
            missing[rows] = np.where(call.experts >= 0, call.experts, missing[rows])
            log.warning("layer %d: node %s: %s", layer, self.placement.addresses[call.node], error)
        self._avoid(self._avoided | {call.node for call, _ in lost})
        owners = []
        for span, missing in asked.items():
            owner = self._owner(layer, span)[:, missing]
            owners.append(np.where(missing >= 0, owner, np.int16(-1)))
        if any(set(owner.ravel().tolist()) & self._avoided for owner in owners):
            # Some expert has no holder left: the lost node gets another chance, until the deadline.
            if perf_counter() + RETRY_PAUSE >= deadline:
                call, error = lost[0]
                address = self.placement.addresses[call.node]
                experts = format_ranges(set(call.experts.ravel().tolist()) - {-1})
                raise PlacementError(
                    f"node {address} is gone and nobody else holds its experts of layer {layer}",
                    gaps=(f"layer {layer}: experts {experts}",),
                    remedy=f"Restart the node at {address}, or start a replica and name it in --nodes.",
                ) from error
            await asyncio.sleep(RETRY_PAUSE)
        return [call for owner in owners for call in self._send(layer, wire, owner, deadline, again=True)]


def _naming(address: str, error: BaseException) -> BaseException:
    """The error of one connection among several, saying which: a parser of bytes does not know its peer."""
    if isinstance(error, TransportError) and address not in str(error):
        error.args = (f"{address}: {error}",)
        error.peer = address
    return error


def _still_holds(before: Holding, address: str, info: dict[str, Any]) -> None:
    """A node that came back must hold what it held: the placement was made from it."""
    now = Holding.from_info(info, address)
    if now != before:
        same_model = now.fingerprint == before.fingerprint
        what = str(now) if same_model else f"another model ({now.fingerprint[:12]})"
        raise PlacementError(
            f"node {address} came back holding {what}, not {before}",
            conflicts=(f"{address}: {now}",),
            remedy="Restart the node as it was, or open the engine again.",
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """A block of rows as it goes on the wire: [rows, hidden], and [rows, k] twice."""

    x: Tensor
    index: Indices
    weights: npt.NDArray[np.float32]


def _sum(partials: list[tuple[int, Indices | None, Tensor]], x: Tensor) -> Tensor:
    """Partial sums [some rows, hidden] added in node order, in float32, rounded once to the dtype of `x`."""
    if len(partials) == 1 and partials[0][1] is None:
        return partials[0][2].to(x.dtype)
    partials.sort(key=lambda entry: entry[0])
    total = torch.zeros(x.shape, dtype=torch.float32)
    for _, rows, part in partials:
        if rows is None:
            total += part
        else:
            total.index_add_(0, torch.from_numpy(rows), part.float())
    return total.to(x.dtype)
