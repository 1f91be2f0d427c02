"""Draft and verify: several tokens per step of the model, and exactly the tokens of plain decoding.

A step runs the last token and k drafts through the model as k + 1 rows, which over a network costs the round
trips of one. Each row's logits give that position's token by the position's own randomness, as in plain
decoding; drafts count as far as they equal those tokens, the first that differs is replaced by the right one,
and rows behind it are taken back from the cache. So the output does not depend on the drafter, greedy or
sampled. (Speculative sampling by rejection, Leviathan et al. 2023, accepts a little more often above
temperature 0 and gives other tokens of the same distribution.)

Such a step is a window. Where drafts are mostly right, further windows start down the layers behind it before
its result is known, as the chunks of a prompt do, on the assumption that all of it is right and that its next
token is their first. Where that fails they are given up, and their rows leave the cache.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from splitinfer.batching import Result, Seat
from splitinfer.draft_depth import Depth, Step
from splitinfer.errors import UsageError
from splitinfer.model.cache import KVCache
from splitinfer.model.drafter import Context, Drafter, PromptLookup, open_drafter
from splitinfer.model.front import Front
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.native import row_invariant
from splitinfer.model.sampling import Sampler
from splitinfer.timing import Timeline

__all__ = ["Count", "Decoder", "choose_drafter"]

log = logging.getLogger(__name__)


def choose_drafter(
    setting: str, target: Gemma, model: Path, nodes: Mapping[str, str] | None = None
) -> Callable[[], Drafter] | None:
    """What `--draft` names: "off", "lookup", a checkpoint's directory, or "auto".

    "auto" takes the drafter that comes with the model (a folder "assistant" in the model's own, or "drafter"
    beside "target") and prompt lookup where there is none. Raises as `open_drafter` does.

    Drafts give the tokens of plain decoding where a row's bits do not depend on the rows beside it. Where
    they do, here or on one of `nodes` (arithmetic by address), "auto" leaves drafts off, and others are
    warned of.
    """
    if setting == "off":
        return None
    uneven = [] if target.row_invariant else ["this machine"]
    uneven += [f"node {address}" for address, how in (nodes or {}).items() if not row_invariant(how)]
    if uneven:
        log.warning(
            "%s: on %s a row's last bits depend on the rows beside it, so a near tie could fall otherwise",
            "drafts are off" if setting == "auto" else "drafts may change tokens",
            ", ".join(uneven),
        )
    if uneven and setting == "auto":
        return None
    if setting == "lookup":
        return PromptLookup
    if setting != "auto":
        if not Path(setting).expanduser().exists():
            raise UsageError(
                f"--draft {setting!r} is neither a folder nor one of auto, off, lookup",
                remedy="Name a drafter's folder, or choose one of these.",
            )
        return open_drafter(setting, target)
    companion = model.parent / "drafter" if model.name == "target" else model / "assistant"
    return open_drafter(companion, target) if (companion / "config.json").is_file() else PromptLookup


class Count(NamedTuple):
    """Steps taken after the prompt, drafts verified in them, and drafts that were right."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class _Window:
    """Rows that are being verified: a token, certain or, where it `follows` another window, a guess, and the
    drafts behind it."""

    rows: list[int]
    follows: bool
    start: int  # the cache's length before
    result: Awaitable[Result]
    front: Front | None
    timeline: Timeline
    began: float
    drafting: float  # seconds


class Decoder:
    """Continues one sequence, a step at a time, with a drafter or (None) without.

    `ids` are all its tokens so far; whoever owns the sequence appends to it what `step` returns. `hidden`
    [1, H] is the model's final hidden state of the last token that is in `cache`. Sequences that run on the
    same machines with the same drafter may share a `depth`, and so what was learned about both.
    """

    def __init__(
        self,
        seat: Seat,
        cache: KVCache,
        ids: list[int],
        hidden: Tensor,
        *,
        sampler: Sampler,
        timeline: Timeline,
        drafter: Drafter | None,
        depth: Depth,
    ) -> None:
        self._seat = seat
        self._cache = cache
        self._ids = ids
        self._prompt = len(ids)
        self._hidden = hidden
        self._sampler = sampler
        self._timeline = timeline
        self._drafter = drafter
        self._depth = depth
        self._windows: deque[_Window] = deque()  # under way, the oldest first
        self.count = Count()

    def first(self, logits: Tensor) -> int:
        """The first token of the reply, from the prompt's last logits [1, V]."""
        return self._sample(logits, [])[0]

    async def step(self, limit: int) -> list[int]:
        """The next tokens, 1 to `limit` of them."""
        try:
            await self._fill(limit)
            window = self._windows.popleft()
            hidden, logits = await window.result
        except BaseException:
            await self.close()
            raise
        if window.timeline is not self._timeline:
            self._timeline.merge(window.timeline)
        tokens = self._sample(logits, window.rows[1:])
        following = self._windows[0].rows[0] if self._windows else None
        whole = len(tokens) == len(window.rows)
        if self._windows and not (whole and following == tokens[-1]):
            await self.close()
        if not (whole and self._windows):
            self._cache.truncate(window.start + len(tokens))
        self._hidden = hidden[len(tokens) - 1 : len(tokens)]
        self._record(window, tokens, following)
        return tokens

    async def close(self) -> None:
        """Give up what is under way. Afterwards the cache holds the windows whose results were taken."""
        given_up = [window.result for window in self._windows if isinstance(window.result, asyncio.Task)]
        for task in given_up:
            task.cancel()
        # No other step may begin before their rows have left the cache.
        await asyncio.gather(*given_up, return_exceptions=True)
        self._windows.clear()

    async def _fill(self, limit: int) -> None:
        """Start windows, so many as pay. Only the first may have to be there: it needs no drafts."""
        depth = windows = 0
        if self._drafter is not None:
            depth, windows = self._depth.choose(limit - 1, alone=self._seat.alone)
        if not self._windows:
            await self._begin(min(depth, limit - 1), behind=windows > 1)
        while len(self._windows) < windows:
            room = limit - sum(len(window.rows) for window in self._windows)
            if room < 1 or not await self._follow(min(depth, room - 1)):
                break

    async def _begin(self, depth: int, *, behind: bool) -> None:
        """The first window, whose first row is certain; as a task where others are to start `behind` it."""
        start = perf_counter()
        rows = [self._ids[-1], *await self._draft(depth)]
        self._launch(rows, Front() if behind else None, start)
        if behind:
            await asyncio.sleep(0)  # it is on the wire before the next one is drafted

    async def _follow(self, depth: int) -> bool:
        """One window more, if the drafter has anything to say behind those under way and these take one."""
        last, start = self._windows[-1], perf_counter()
        if last.front is None or not self._seat.alone:
            return False
        rows = await self._draft(depth + 1)
        if rows:
            self._launch(rows, Front(last.front), start)
            await asyncio.sleep(0)
        return bool(rows)

    async def _draft(self, depth: int) -> list[int]:
        """At most `depth` tokens behind all that is known and assumed."""
        if self._drafter is None or not depth:
            return []
        start = perf_counter()
        index = len(self._ids) - self._prompt
        guesses = [row for window in self._windows for row in window.rows][1:]
        context = Context(self._ids, self._hidden, self._cache, self._sampler, index, guesses)
        drafts = await self._drafter.propose(context, depth)
        self._timeline.add("draft", -1, start, perf_counter())
        return drafts

    def _launch(self, rows: list[int], front: Front | None, start: float) -> None:
        """Send `rows` down the layers; `start` is when their drafting began."""
        # What a step took by itself matters to the depth of drafts only.
        timeline = self._timeline if self._drafter is None else Timeline(self._timeline.spans)
        segment = Segment(torch.tensor(rows), self._cache)
        before = self._windows[-1] if self._windows else None
        length = self._cache.length if before is None else before.start + len(before.rows)
        result: Awaitable[Result]
        if front is None:
            result = self._seat.step(segment, timeline)
        else:
            result = self._seat.start(segment, timeline, front)
        now = perf_counter()
        self._windows.append(
            _Window(rows, before is not None, length, result, front, timeline, now, now - start)
        )

    def _record(self, window: _Window, tokens: list[int], following: int | None) -> None:
        """Count what a window gave, and learn from it."""
        if self._drafter is None:
            self.count = Count(self.count.steps + 1)
            return
        drafted, accepted = len(window.rows) - 1, len(tokens) - 1
        judged = following is not None and accepted == drafted
        self._depth.record(
            Step(
                drafted,
                accepted,
                drafting=window.drafting,
                seconds=perf_counter() - window.began,
                network=window.timeline.by_phase().get("network", 0.0),
                follows=window.follows,
                followed=following == tokens[-1] if judged else None,
            )
        )
        guessed = window.follows  # its first row, which was right: else the window would not be here
        steps, all_drafted, all_accepted = self.count
        self.count = Count(steps + 1, all_drafted + drafted + guessed, all_accepted + accepted + guessed)

    def _sample(self, logits: Tensor, drafts: list[int]) -> list[int]:
        """The tokens that rows `logits` give: one for each right draft, and one more."""
        start = perf_counter()
        tokens: list[int] = []
        index, penalised = len(self._ids) - self._prompt, self._sampler.params.repetition_penalty != 1
        for row in logits.cpu():
            seen = [*self._ids, *tokens] if penalised else ()
            tokens.append(self._sampler(row, index + len(tokens), seen))
            if len(tokens) > len(drafts) or tokens[-1] != drafts[len(tokens) - 1]:
                break
        self._timeline.add("sampling", -1, start, perf_counter())
        return tokens
