"""Draft and verify: several tokens per step of the model, and exactly the tokens of plain decoding.

A step runs the last token and k drafts through the model as k + 1 rows, which over a network costs the round
trips of one. Each row's logits give that position's token by the position's own randomness, as in plain
decoding; drafts count as far as they equal those tokens, the first that differs is replaced by the right one,
and rows behind it are taken back from the cache. So the output does not depend on the drafter, greedy or
sampled. (Speculative sampling by rejection, Leviathan et al. 2023, accepts a little more often above
temperature 0 and gives other tokens of the same distribution.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from splitinfer.batching import Seat
from splitinfer.errors import UsageError
from splitinfer.model.cache import KVCache
from splitinfer.model.compute import INLINE_ROWS
from splitinfer.model.drafter import Context, Drafter, PromptLookup, open_drafter
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.sampling import Sampler
from splitinfer.timing import Timeline

__all__ = ["MAX_DEPTH", "Count", "Decoder", "Depth", "check_depth", "choose_drafter"]

MAX_DEPTH = INLINE_ROWS - 1  # drafts of one step
FIRST_DEPTH = 4  # of the very first, when nothing has been measured


def choose_drafter(setting: str, target: Gemma, model: Path) -> Callable[[], Drafter] | None:
    """What `--draft` names: "off", "lookup", a checkpoint's directory, or "auto".

    "auto" takes the drafter that comes with the model (a folder "assistant" in the model's own, or "drafter"
    beside "target") and prompt lookup where there is none. Raises as `open_drafter` does.
    """
    if setting == "off":
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


def check_depth(setting: int | str) -> int | None:
    """`--draft-depth`: a number of drafts, or None for "auto". Raises UsageError."""
    if setting == "auto":
        return None
    if isinstance(setting, int) and 1 <= setting <= MAX_DEPTH:
        return setting
    raise UsageError(
        f"a draft depth of {setting} is not possible", remedy=f"Choose auto, or 1 to {MAX_DEPTH}."
    )


@dataclass(slots=True)
class _Line:
    """Seconds of a step as a line over its rows, by least squares in which older steps fade.

    As long as all steps had as many rows, the slope is a guess: half of the arithmetic of one row, as experts
    are rarely shared by two rows and everything else is.
    """

    decay: float = 0.9
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    arithmetic: float = 0.0  # seconds of a row that were not spent on the network

    def add(self, rows: int, seconds: float, network: float) -> None:
        for name, value in {
            "weight": 1.0, "x": rows, "y": seconds, "xx": rows * rows, "xy": rows * seconds,
            "arithmetic": (seconds - network) / rows,
        }.items():  # fmt: skip
            setattr(self, name, getattr(self, name) * self.decay + value)

    def at(self, rows: int) -> float:
        guess, trust = 0.5 * self.arithmetic / self.weight, 1.0
        spread = self.xx - self.x * self.x / self.weight
        slope = max(0.0, (self.xy - self.x * self.y / self.weight + trust * guess) / (spread + trust))
        return max(1e-9, self.y / self.weight + slope * (rows - self.x / self.weight))


@dataclass(slots=True)
class Depth:
    """How many drafts to verify: as many as give the most tokens per second, by what was measured so far.

    `fixed` overrules it. With depth n a step yields 1 + a1 + a1 a2 + ... + a1 ... an tokens, where ai is how
    often draft i was right when the ones before it were, and takes the time of n + 1 rows and n drafts. The
    round trips are in that time, so a slow link or a good drafter makes it deep, a fast link and a poor one
    0. Now and then it tries again where it had given up.
    """

    fixed: int | None = None
    fade: float = 0.97
    reached: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    right: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    line: _Line = field(default_factory=_Line)
    draft_seconds: float = 0.0
    idle: int = 0  # steps without drafts since the last with some
    patience: int = 8  # so many of them, then a try

    def choose(self, limit: int) -> int:
        """The number of drafts for the next step, at most `limit`."""
        limit = min(limit, MAX_DEPTH)
        if self.fixed is not None:
            return min(self.fixed, limit)
        if not self.line.weight:
            return min(FIRST_DEPTH, limit)
        if self.idle >= self.patience:
            return min(1, limit)
        best, best_rate, expected, chain = 0, 1 / self.line.at(1), 1.0, 1.0
        for depth in range(1, limit + 1):
            chain *= self.acceptance(depth)
            expected += chain
            rate = expected / (self.line.at(depth + 1) + depth * self.draft_seconds)
            if rate > best_rate:
                best, best_rate = depth, rate
        return best

    def acceptance(self, place: int) -> float:
        """How often draft `place` (from 1) is right, once it is reached; the mean of all where few were."""
        pooled = (sum(self.right.values()) + 1.2) / (sum(self.reached.values()) + 2.0)
        return (self.right[place] + 2 * pooled) / (self.reached[place] + 2)

    def record(self, drafted: int, accepted: int, drafting: float, seconds: float, network: float) -> None:
        """A step with `drafted` drafts, `accepted` of them right: seconds of drafting, of the step without
        it, and the part of those that the network took."""
        self.line.add(drafted + 1, seconds, network)
        if not drafted:
            self.idle += 1
            return
        if self.idle >= self.patience:
            self.patience = 8 if accepted else min(128, self.patience * 2)
        self.idle = 0
        per_draft = drafting / drafted
        self.draft_seconds += (per_draft - self.draft_seconds) * (0.2 if self.draft_seconds else 1.0)
        for place in range(1, min(accepted + 1, drafted) + 1):
            self.reached[place] = self.reached[place] * self.fade + 1
            self.right[place] = self.right[place] * self.fade + (place <= accepted)


class Count(NamedTuple):
    """Steps taken after the prompt, drafts verified in them, and drafts that were right."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


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
        self.count = Count()

    def first(self, logits: Tensor) -> int:
        """The first token of the reply, from the prompt's last logits [1, V]."""
        return self._sample(logits, [])[0]

    async def step(self, limit: int) -> list[int]:
        """The next tokens, 1 to `limit` of them."""
        start, drafts = perf_counter(), list[int]()
        depth = self._depth.choose(limit - 1) if self._drafter is not None else 0
        if self._drafter is not None and depth:
            index = len(self._ids) - self._prompt
            context = Context(self._ids, self._hidden, self._cache, self._sampler, index)
            drafts = await self._drafter.propose(context, depth)
            self._timeline.add("draft", -1, start, perf_counter())
        drafted, network = perf_counter(), self._network()
        kept = self._cache.length
        rows = torch.tensor([self._ids[-1], *drafts])
        hidden, logits = await self._seat.step(Segment(rows, self._cache), self._timeline)
        tokens = self._sample(logits, drafts)
        if len(tokens) <= len(drafts):
            self._cache.truncate(kept + len(tokens))
        self._hidden = hidden[len(tokens) - 1 : len(tokens)]
        self._depth.record(
            len(drafts),
            len(tokens) - 1,
            drafted - start,
            perf_counter() - drafted,
            self._network() - network,
        )
        steps, proposed, accepted = self.count
        self.count = Count(steps + 1, proposed + len(drafts), accepted + len(tokens) - 1)
        return tokens

    def _sample(self, logits: Tensor, drafts: list[int]) -> list[int]:
        """The tokens that rows `logits` give: one for each right draft, and one more."""
        start = perf_counter()
        tokens: list[int] = []
        index, penalised = len(self._ids) - self._prompt, self._sampler.params.repetition_penalty != 1
        for row in logits:
            seen = [*self._ids, *tokens] if penalised else ()
            tokens.append(self._sampler(row, index + len(tokens), seen))
            if len(tokens) > len(drafts) or tokens[-1] != drafts[len(tokens) - 1]:
                break
        self._timeline.add("sampling", -1, start, perf_counter())
        return tokens

    def _network(self) -> float:
        """Seconds on the network so far."""
        return self._timeline.by_phase().get("network", 0.0)
