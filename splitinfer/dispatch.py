"""Split execution, the client's half: fan rows out to the nodes that hold their experts, add what comes back.

One call per node per layer, whatever the number of experts, rows or sequences; a node is sent only the rows
it has work for. `dispatch` puts the bytes on the wire before it returns, so that the caller's dense MLP runs
while the experts travel. A call that the link lost is tried again, on a replica first: nodes keep no state.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import numpy.typing as npt
from torch import Tensor

from splitinfer import transport
from splitinfer.errors import (
    DeadlineExceeded,
    LinkError,
    Overloaded,
    PlacementError,
)
from splitinfer.exact_nodes import check_exact
from splitinfer.fanout import Owner, Partial, Rows, Share, add_partials, divide, divide_by, name_of
from splitinfer.in_flight import ExpertCall, Pending
from splitinfer.lost_nodes import gone, late, naming, still_holds
from splitinfer.model.experts import Where, expert_ids
from splitinfer.placement import Columns, Holding, Placement
from splitinfer.ready_requests import ReadyCalls, ReadyRequests, Waits
from splitinfer.timing import Timeline

__all__ = ["NodeInfo", "RemoteExperts"]

log = logging.getLogger(__name__)

RETRY_PAUSE = 0.2  # seconds before the same node is asked again when it has no replica
AVOID_FOR = 5.0  # seconds that a node whose link failed is passed over while its replicas serve
EXPERT_CALL = "experts"


@dataclass(frozen=True)
class NodeInfo:
    """A connected node: where it is and what it holds."""

    address: str
    holding: Holding

    def __str__(self) -> str:
        return f"{self.address}: {self.holding}"


class RemoteExperts:
    """The experts of a model, held by nodes. Satisfies `model.experts.Experts`.

    Open with `await RemoteExperts.connect(...)`; close with `await close()`.
    """

    def __init__(
        self,
        channels: dict[str, transport.Channel],
        placement: Placement,
        timeout: float,
        exact: bool = False,
    ) -> None:
        self.placement = placement
        self._exact = exact
        self.nodes = [
            NodeInfo(address, holding)
            for address, holding in zip(placement.addresses, placement.holdings, strict=True)
        ]
        self._channels = [channels[address] for address in placement.addresses]
        self._timeout = timeout
        self._avoided: frozenset[int] = frozenset()
        self._avoided_until = 0.0
        self._looking: set[asyncio.Future[float]] = set()
        near = any(transport.Address.parse(address).is_local for address in placement.addresses)
        self._where: Where = "near" if near else "away"
        self._waits = Waits()
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
        exact: str | None = None,
    ) -> RemoteExperts:
        """Connect to all nodes at once, ask what each holds, and check coverage before the first token.

        `columns` is the model's moe_intermediate_size, `timeout` the deadline of one expert call in seconds.
        `exact`, the name of this machine's arithmetic, has all nodes compute by the same and answer in fixed
        point. Raises `PlacementError` for gaps, conflicts and other models, and what `transport.connect`
        raises, naming the node.
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
                    raise naming(address, failure)
            holdings = [(a, Holding.from_info(channel.info, a)) for a, channel in channels.items()]
            for address, holding in holdings:
                channels[address].on_info = partial(still_holds, holding, address)
            placement = Placement.plan(
                holdings,
                layers=layers,
                num_experts=num_experts,
                columns=columns,
                fingerprint=fingerprint,
            )
            if exact is not None:
                check_exact(placement, exact)
            return cls(channels, placement, timeout, exact is not None)
        except BaseException:
            await asyncio.gather(*(channel.close() for channel in channels.values()))
            raise

    async def close(self) -> None:
        """Close the connections. Calls in flight fail."""
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def ping(self) -> float:
        """Seconds of an empty message to the first node and back. Raises what `Channel.ping` raises."""
        return await self._channels[0].ping()

    def traffic(self) -> tuple[int, int, int]:
        """(bytes sent, bytes received, calls) since the connections opened, headers included."""
        stats = [channel.stats for channel in self._channels]
        return (
            sum(s.sent_nbytes for s in stats),
            sum(s.received_nbytes for s in stats),
            sum(s.calls for s in stats),
        )

    @property
    def compute_seconds(self) -> float:
        """The nodes' own account of their arithmetic, the slowest of each layer."""
        return self._waits.seconds

    def where(self, layer: int) -> Where:
        return self._where

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        """Send rows `x` [rows, hidden] to the nodes that hold their experts; await the weighted sum.

        `top_k_index` [rows, k] int16 names experts, `top_k_weights` [rows, k] float32 weighs them. The result
        has the shape and dtype of `x`. A node answers in that dtype when it is the only one asked (the sum is
        rounded once, there), in float32 when several add up (rounded once, here), and in fixed point where
        sums have to be exact.

        Awaiting raises `PlacementError` when every holder of an expert is gone, and the node's own error
        otherwise. A missing answer is never replaced by zeros.
        """
        start = perf_counter()
        wire = Rows(x, expert_ids(top_k_index, layer), top_k_weights)
        deadline = start + self._timeout
        if self._avoided and start > self._avoided_until:
            self._look_again()
        for channel in self._channels:
            if not channel.connected:
                self._pass_over()
                break
        shares = divide(self._owners[layer], wire)
        out = name_of(wire.x.dtype) if len(shares) == 1 and not self._exact else self._wide
        calls = self._send(layer, shares, out, deadline)
        return self._collect(layer, wire, calls, start, timeline)

    def outgoing(self, layer: int, x: Tensor, k: int) -> ReadyRequests | None:
        """See `model.experts.Preparing`. None where the rows are too many, where a node is sent some of them
        only, and where something is to be seen to that `dispatch` sees to."""
        if self._avoided and perf_counter() > self._avoided_until:
            return None  # `dispatch` looks again
        ready = self._ready.of(layer, x, k)
        return ready if ready is not None and ready.may_go() else None

    def _collect(
        self,
        layer: int,
        wire: Rows,
        calls: list[ExpertCall],
        start: float,
        timeline: Timeline | None,
    ) -> Pending:
        """The sum of what was asked at `start`."""
        deadline = start + self._timeout
        if timeline is not None:
            timeline.add("dispatch", layer, start, perf_counter())
            if timeline.spans is not None:
                for call in calls:
                    call.answer.add_done_callback(call.note_time)
        sole = self._channels[calls[0].share.node] if len(calls) == 1 else None
        return Pending(calls, lambda: self._combine(layer, wire, calls, deadline, timeline), sole)

    @property
    def _wide(self) -> str:
        """The dtype of partial sums."""
        return "int64" if self._exact else "float32"

    def _avoid(self, nodes: frozenset[int]) -> None:
        """Ask others instead of these `nodes` for a while, wherever there are others."""
        self._avoided, self._avoided_until = nodes, perf_counter() + AVOID_FOR
        self._owners = {layer: Owner(self._owner(layer)) for layer in self.placement.holders}
        self._ready = ReadyCalls(
            EXPERT_CALL,
            self._owners,
            self.placement.addresses,
            self._channels,
            self._exact,
            self._timeout,
            self._collect,
            self._waits,
        )

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

    def _pass_over(self) -> None:
        """Ask others instead of nodes whose connection ended between two calls, and dial these meanwhile."""
        gone = {node for node, channel in enumerate(self._channels) if not channel.connected} - self._avoided
        if gone:
            self._avoid(self._avoided | gone)
            for node in gone:
                log.warning("%s", self._loss(node, "the connection has ended"))
            self._look_after(gone)

    def _loss(self, node: int, why: object) -> str:
        """One line for whoever watches: what is gone, why, and what happens now."""
        address = self.placement.addresses[node]
        alone = any(node in owner.table for owner in self._owners.values())
        then = f"trying again for up to {self._timeout:g} s" if alone else "its replicas take over"
        return f"node {address} is gone ({why}): {then}"

    def _look_again(self) -> None:
        """Ask those avoided nodes again that have come back; look after the others without waiting."""
        away = frozenset(node for node in self._avoided if not self._channels[node].connected)
        self._look_after(away)
        self._avoid(away)

    def _look_after(self, nodes: Iterable[int]) -> None:
        for node in nodes:
            task = asyncio.ensure_future(self._channels[node].ping())
            self._looking.add(task)
            task.add_done_callback(self._seen)

    def _seen(self, task: asyncio.Future[float]) -> None:
        self._looking.discard(task)
        if not task.cancelled():
            task.exception()  # still away: no news

    def _send(self, layer: int, shares: list[Share], out: str, deadline: float) -> list[ExpertCall]:
        """One call for each share, to be answered in dtype `out`."""
        calls = []
        now = perf_counter()
        timeout, meta = max(deadline - now, 0.001), {"layer": layer, "out": out}
        for share in shares:
            try:
                answer = self._channels[share.node].start(EXPERT_CALL, share.tensors, meta, timeout=timeout)
            except Overloaded as error:  # it drains: known before anything was sent
                answer = asyncio.get_running_loop().create_future()
                answer.set_exception(error)
            calls.append(ExpertCall(share, out, answer, now))
        return calls

    async def _combine(
        self,
        layer: int,
        wire: Rows,
        calls: list[ExpertCall],
        deadline: float,
        timeline: Timeline | None,
    ) -> Tensor:
        """Wait for all calls, mend what the link lost, and add the partial sums in the nodes' order."""
        start = perf_counter()
        partials: list[Partial] = []
        compute = 0.0
        try:
            while calls:
                lost: list[tuple[ExpertCall, LinkError | Overloaded]] = []
                for call in calls:
                    if not call.answer.done():
                        self._channels[call.share.node].look()
                        if call.answer.done():
                            call.note_time(None)  # its callbacks come in the loop's next turn
                    try:
                        reply = await call.answer
                    except DeadlineExceeded as error:
                        raise self._silent(call, layer) from error
                    except (LinkError, Overloaded) as error:
                        lost.append((call, error))
                        continue
                    address = self.placement.addresses[call.share.node]
                    partials.append(call.partial(reply, address))
                    seconds = call.arithmetic(reply, address)
                    compute = max(compute, seconds)
                    if timeline is not None and call.answered:
                        timeline.add_remote(layer, address, call.sent, call.answered, seconds)
                calls = []
                if lost:
                    calls = await self._again(layer, wire, lost, deadline)
        except BaseException:
            for call in calls:
                call.give_up()
            raise
        end = perf_counter()
        self._waits.note(end - start, compute)
        total = add_partials(partials, wire.x)
        if timeline is not None:
            # What the caller waited for, split by the slowest node's own account of its arithmetic.
            split = max(start, end - compute)
            timeline.add("network", layer, start, split)
            timeline.add("experts", layer, split, end)
            timeline.add("combine", layer, end, perf_counter())
        return total

    def _asked(self, call: ExpertCall) -> tuple[str, set[int]]:
        """The node's address, and the experts that it was asked for."""
        return self.placement.addresses[call.share.node], set(call.share.experts.ravel().tolist()) - {-1}

    def _silent(self, call: ExpertCall, layer: int) -> DeadlineExceeded | PlacementError:
        address, experts = self._asked(call)
        if not self._channels[call.share.node].connected:
            return gone(address, experts, layer)
        return late(address, layer, self._timeout)

    async def _again(
        self, layer: int, wire: Rows, lost: list[tuple[ExpertCall, LinkError | Overloaded]], deadline: float
    ) -> list[ExpertCall]:
        """Send what the link lost once more: to replicas where there are some, else to the same node.

        Raises `PlacementError` when nobody has answered by the deadline, with the link's error as its cause.
        """
        asked: dict[Columns, npt.NDArray[np.int16]] = {}  # experts by the slice that is missing of them
        for call, _ in lost:
            span = self.placement.spans[call.share.node]
            missing = asked.setdefault(span, np.full(wire.top_k_index.shape, -1, dtype=np.int16))
            rows = slice(None) if call.share.rows is None else call.share.rows
            missing[rows] = np.where(call.share.experts >= 0, call.share.experts, missing[rows])
        news = [(call.share.node, error) for call, error in lost if call.share.node not in self._avoided]
        self._avoid(self._avoided | {call.share.node for call, _ in lost})
        for node, error in news:  # once, not for every call that meets it
            log.warning("%s", self._loss(node, error))
        owners = []
        for span, missing in asked.items():
            owner = self._owner(layer, span)[:, missing]
            owners.append(np.where(missing >= 0, owner, np.int16(-1)))
        if any(set(owner.ravel().tolist()) & self._avoided for owner in owners):
            # Some expert has no holder left: the lost node gets another chance, until the deadline.
            if perf_counter() + RETRY_PAUSE >= deadline:
                call, error = lost[0]
                raise gone(*self._asked(call), layer) from error
            await asyncio.sleep(RETRY_PAUSE)
        # As partial sums, whatever was asked before: rounded once, here.
        shares = [share for owner in owners for share in divide_by(owner, wire)]
        return self._send(layer, shares, self._wide, deadline)
