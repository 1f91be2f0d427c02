"""How deep to draft, and how many windows of drafts to keep under way: what gives the most tokens per second,
by what was measured so far."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from splitinfer.errors import UsageError
from splitinfer.model.compute import INLINE_ROWS

__all__ = ["MAX_DEPTH", "Depth", "Step", "check_depth"]

MAX_DEPTH = INLINE_ROWS - 1  # drafts of one step
FIRST_DEPTH = 4  # of the very first, when nothing has been measured
WINDOWS = (1, 2, 4)  # under way at once; four of MAX_DEPTH + 1 rows are what the cache takes back
FOLLOWING = 0  # the place of all drafts in windows that follow another


def check_depth(setting: int | str) -> int | None:
    """`--draft-depth`: a number of drafts, or None for "auto". Raises UsageError."""
    if setting == "auto":
        return None
    if isinstance(setting, int) and not isinstance(setting, bool) and 1 <= setting <= MAX_DEPTH:
        return setting
    raise UsageError(
        f"a draft depth of {setting} is not possible", remedy=f"Choose auto, or 1 to {MAX_DEPTH}."
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One window, verified: how many drafts it had and how many of them were right. `follows`: it began
    behind another one. `followed`: whether the guess that the next one began with was right (None: unknown).
    Seconds of drafting, of the step without it, and the part of those that the network took."""

    drafted: int
    accepted: int
    drafting: float
    seconds: float
    network: float
    follows: bool = False
    followed: bool | None = None


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
    """How many drafts to verify in a window, and how many windows to keep under way: what gives the most
    tokens per second by what was measured so far. `fixed` overrules the number of drafts.

    With depth n a window yields 1 + a1 + a1 a2 + ... + a1 ... an tokens, where ai is how often draft i was
    right when the ones before it were, and takes the time of n + 1 rows and n drafts. The round trips are in
    that time, so a slow link or a good drafter makes it deep, a fast link and a poor one 0. Now and then it
    tries again where it had given up.

    Windows that follow come out of the layers not a whole step apart but as soon as this machine and the
    nodes can have computed them, until a guess was wrong (`_rate`).
    """

    fixed: int | None = None
    fade: float = 0.97
    reached: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    right: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    line: _Line = field(default_factory=_Line)
    network: float = 0.0  # seconds of a step that pass on the network
    draft_seconds: float = 0.0
    idle: int = 0  # steps without drafts since the last with some
    patience: int = 8  # so many of them, then a try

    def choose(self, limit: int, *, alone: bool = False) -> tuple[int, int]:
        """The number of drafts of the next window, at most `limit`, and of windows: 1 unless `alone`."""
        limit = min(limit, MAX_DEPTH)
        if not self.line.weight:
            return min(self.fixed or FIRST_DEPTH, limit), 1
        depths = range(limit + 1)
        if self.fixed is not None:
            depths = range(min(self.fixed, limit), min(self.fixed, limit) + 1)
        elif self.idle >= self.patience:
            return min(1, limit), 1
        best, best_rate, expected, chain = (depths[0], 1), 0.0, 1.0, 1.0
        for depth in range(depths[-1] + 1):
            if depth:
                chain *= self.acceptance(depth)
                expected += chain
            if depth not in depths:
                continue
            for windows in WINDOWS if alone and depth else WINDOWS[:1]:
                rate = self._rate(depth, windows, expected, chain)
                if rate > best_rate:
                    best, best_rate = (depth, windows), rate
        return best

    def _rate(self, depth: int, windows: int, expected: float, chain: float) -> float:
        """Tokens per second. A window of `depth` yields `expected` tokens, all of them right with `chain`."""
        whole = self.line.at(depth + 1) + depth * self.draft_seconds
        if windows == 1:
            return expected / whole
        rows = depth + 1
        # What keeps the machines busy, and cannot be hidden; to draft, an assistant reads what is under way.
        busy = min(whole, whole - self.network + windows * rows * self.draft_seconds)
        apart = max(busy, whole / windows)
        # Those that follow are computed in the pauses of the first, as far as there are any.
        whole += (windows - 1) * busy * busy / whole
        far = self.acceptance(FOLLOWING)
        first, again = chain * far, far**rows
        more = first / (1 - again)  # windows that follow until a guess is wrong
        return (expected + more * (1 - again) / (1 - far)) / (whole + more * apart)

    def acceptance(self, place: int) -> float:
        """How often draft `place` (from 1) of a window is right, once it is reached; the mean of all where
        few were. Place 0 stands for all rows of windows that follow another."""
        pooled = (sum(self.right.values()) + 1.2) / (sum(self.reached.values()) + 2.0)
        return (self.right[place] + 2 * pooled) / (self.reached[place] + 2)

    def record(self, step: Step) -> None:
        """Learn from a window that was verified."""
        if step.followed is not None:
            self._judge(FOLLOWING, step.followed)
        for place in range(1, min(step.accepted + 1, step.drafted) + 1):
            self._judge(FOLLOWING if step.follows else place, place <= step.accepted)
        if step.follows:
            return
        self.line.add(step.drafted + 1, step.seconds, step.network)
        self.network += (step.network - self.network) * (0.1 if self.network else 1.0)
        if not step.drafted:
            self.idle += 1
            return
        if self.idle >= self.patience:
            self.patience = 8 if step.accepted else min(128, self.patience * 2)
        self.idle = 0
        per_draft = step.drafting / step.drafted
        self.draft_seconds += (per_draft - self.draft_seconds) * (0.2 if self.draft_seconds else 1.0)

    def _judge(self, place: int, right: bool) -> None:
        self.reached[place] = self.reached[place] * self.fade + 1
        self.right[place] = self.right[place] * self.fade + right
