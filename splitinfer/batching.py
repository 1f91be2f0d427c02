"""Many sequences at once: those that decode side by side share their steps, so that one call per node and
layer carries the rows of all of them, and weights are read once for all.

Sequences sit in two groups. While one group's rows are with the experts, the other's attention runs here:
with more sequences than one neither this machine nor the nodes stand idle. A sequence takes its seat between
two steps and leaves it between two steps. A row's bits do not depend on the other rows of a step, so each
sequence has the tokens that it would have alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from splitinfer.model.compute import compute
from splitinfer.model.front import Front
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.timing import Span, Timeline

__all__ = ["Batcher", "Seat"]

GROUPS = 2
PATIENCE = 0.1  # of the last step's time: how long a group waits for a sequence that is late with its rows

Result = tuple[Tensor, Tensor]  # hidden states [rows, H] and logits [rows, V] of one sequence's rows


@dataclass(slots=True, eq=False)
class _Rows:
    """What one sequence gives to a step, and where it gets its part of the result."""

    segment: Segment
    timeline: Timeline
    result: asyncio.Future[Result]


class Batcher:
    """The groups of one model's sequences. `spans` are kept for a trace (see `Timeline`)."""

    def __init__(self, model: Gemma, spans: list[Span] | None = None) -> None:
        self._groups = [_Group(model, spans) for _ in range(GROUPS)]

    @property
    def members(self) -> int:
        """Sequences that have a seat."""
        return sum(group.members for group in self._groups)

    def seat(self) -> Seat:
        """A place in the smaller group, until it is left."""
        return Seat(self, min(self._groups, key=lambda group: group.members))


class Seat:
    """One sequence's place in a group."""

    def __init__(self, batcher: Batcher, group: _Group) -> None:
        self._batcher = batcher
        self._group = group
        self._group.members += 1

    @property
    def alone(self) -> bool:
        """Whether no other sequence decodes beside this one."""
        return self._batcher.members == 1

    async def step(self, segment: Segment, timeline: Timeline) -> Result:
        """Run the rows of `segment`, with whatever the group's other sequences have ready.

        Raises as `Gemma.forward` does; what fails one step fails it for every sequence in it. A sequence that
        gives up waiting (is cancelled) has to give up its cache: the step goes on for the others.
        """
        return await self._group.step(segment, timeline, self.alone)

    def start(self, segment: Segment, timeline: Timeline, front: Front) -> asyncio.Task[Result]:
        """A step of this sequence's rows by themselves, behind the one that `front` follows; for one `alone`.

        The first of several has to find no step of `step` under way. Cancelled, it takes its rows back.
        """
        return self._group.start(segment, timeline, front)

    def leave(self) -> None:
        """Give up the place. No step of this sequence may be under way."""
        self._group.members -= 1
        self._group.launch_if_ready()


class _Group:
    def __init__(self, model: Gemma, spans: list[Span] | None) -> None:
        self.members = 0
        self._model = model
        self._spans = spans
        self._waiting: list[_Rows] = []
        self._running: asyncio.Task[None] | None = None
        self._alone = 0  # steps of one sequence under way that are nobody else's
        self._timer: asyncio.TimerHandle | None = None
        self._took = 0.0

    async def step(self, segment: Segment, timeline: Timeline, alone: bool = False) -> Result:
        if self.members == 1 and not self._busy:
            self._alone += 1
            try:
                return await self._forward([segment], timeline, alone=alone)
            finally:
                self._left()
        rows = _Rows(segment, timeline, asyncio.get_running_loop().create_future())
        self._waiting.append(rows)
        self.launch_if_ready()
        try:
            return await rows.result
        finally:
            if rows in self._waiting:  # cancelled before its step began
                self._waiting.remove(rows)

    def start(self, segment: Segment, timeline: Timeline, front: Front) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(self._forward([segment], timeline, front))
        self._alone += 1
        task.add_done_callback(self._left)
        return task

    def _left(self, _: object = None) -> None:
        self._alone -= 1
        self.launch_if_ready()

    @property
    def _busy(self) -> bool:
        return self._alone > 0 or self._running is not None

    def launch_if_ready(self) -> None:
        """Begin a step when all are there, and otherwise see that it begins before long."""
        if self._busy or not self._waiting:
            return
        if len(self._waiting) >= self.members:
            self._launch()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._took * PATIENCE, self._launch)

    def _launch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting and not self._busy:
            rows, self._waiting = self._waiting, []
            self._running = asyncio.get_running_loop().create_task(self._run(rows))

    async def _run(self, rows: Sequence[_Rows]) -> None:
        start, timeline = perf_counter(), Timeline(self._spans)
        try:
            hidden, logits = await self._forward([r.segment for r in rows], timeline)
        except BaseException as error:
            for r in rows:
                if not r.result.done():
                    r.result.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            low = 0
            for r in rows:
                high = low + len(r.segment.token_ids)
                r.timeline.merge(timeline)
                if not r.result.done():
                    r.result.set_result((hidden[low:high], logits[low:high]))
                low = high
        finally:
            self._running = None
            self._took = perf_counter() - start
            self.launch_if_ready()

    async def _forward(
        self,
        segments: Sequence[Segment],
        timeline: Timeline,
        front: Front | None = None,
        alone: bool = False,
    ) -> Result:
        hidden = await self._model.forward(segments, timeline=timeline, front=front, alone=alone)
        return hidden, await compute(len(hidden), self._model.logits, hidden, timeline=timeline)
