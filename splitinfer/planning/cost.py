"""What a step of decoding costs, and the tokens per second that follow. Pure arithmetic.

With L layers, R a call's round trip, a attention and routing, d the dense network, e(n) the experts'
arithmetic for n rows, h lm_head, m a draft, K drafts a step and A tokens that a step of them yields:

    plain     1 / (L (a + max(d, R + e(1))) + h)
    drafted   A / (L (a + max(d, R + e(K + 1))) + h + K m), all for K + 1 rows
    batched   B rows in two groups that alternate: the client computes for one while the other's rows travel

A layer whose experts are on the client has no R, and its experts do not overlap with the dense network. What
handing rows over and adding answers up costs the client is counted beside R, and bytes over a link's
bandwidth within it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate

__all__ = [
    "Alone",
    "CallCost",
    "ClientCost",
    "Curve",
    "Prediction",
    "Setup",
    "batched",
    "drafted",
    "plain",
    "tokens_per_step",
]

GROUPS = 2  # as `splitinfer.batching` forms them
STEPS = 8  # of each group that are followed until their rhythm counts as steady


@dataclass(frozen=True)
class Curve:
    """Seconds by rows: straight between the points given, and beyond the last as between the last two."""

    points: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, seconds: Mapping[int, float]) -> Curve:
        return cls(tuple(sorted(seconds.items())))

    @classmethod
    def constant(cls, seconds: float) -> Curve:
        return cls(((1, seconds),))

    def at(self, rows: float) -> float:
        points = self.points
        if len(points) == 1 or rows <= points[0][0]:
            return points[0][1]
        last = next((i for i, (n, _) in enumerate(points) if n >= rows), len(points) - 1)
        (n0, s0), (n1, s1) = points[last - 1], points[last]
        return s0 + (s1 - s0) * (rows - n0) / (n1 - n0)


ZERO = Curve.constant(0.0)


@dataclass(frozen=True)
class ClientCost:
    """Seconds of this machine's own work. By rows: `attention` (with routing) and `dense` of one layer,
    `experts` of one layer that is kept here, `head`, and `step`, what a step costs beside its layers.

    `sequence` is what a layer costs for each sequence of a step beyond the first, beside its rows; `token`
    what every token costs that is handed out; `draft` what one guess costs.
    """

    attention: Curve
    dense: Curve
    experts: Curve
    head: Curve
    step: Curve = ZERO
    sequence: float = 0.0
    token: Curve = ZERO
    draft: float = 0.0


@dataclass(frozen=True)
class Alone:
    """As `send`, `combine` and `handling` of `CallCost`, where kernels send a call and wait for its answer,
    for up to `longest` seconds: for one sequence that nothing else is under way beside. `handling` may be
    less than nothing, as the message that a round trip is measured with is sent and waited for by Python.
    """

    longest: float
    send: Curve
    combine: Curve
    handling: Curve


@dataclass(frozen=True)
class CallCost:
    """Seconds of one layer's call to its `nodes`. `round_trip` is that of an empty message to one of them, of
    which `message` keeps the client busy; `nbytes` of one row, both ways, pass at `bandwidth` bytes/s (0:
    any).

    By rows: `send` and `combine` are the client's work before and after, `handling` what transport and node
    take beside the link and the arithmetic, `experts` the arithmetic of the slowest node. `alone` has what is
    different where one sequence decodes.
    """

    round_trip: float
    experts: Curve
    send: Curve = ZERO
    combine: Curve = ZERO
    handling: Curve = ZERO
    message: float = 0.0
    nodes: int = 1
    nbytes: float = 0.0
    bandwidth: float = 0.0
    alone: Alone | None = None

    def for_one(self, rows: float, dense: float) -> Alone | CallCost:
        """`send`, `combine` and `handling` of a call of one sequence, which has `dense` to do meanwhile."""
        wait = self.round_trip + self.transfer(rows) + self.experts.at(rows) - dense
        return self.alone if self.alone is not None and wait <= self.alone.longest else self

    def shares(self, rows: float) -> tuple[float, float, float]:
        """Where a call's seconds beside arithmetic, `send` and `combine` go: to the client, to the nodes, and
        to the link, each way. Of handling the client has the other nodes' messages, or half of one node's
        part if that is more.
        """
        message, handling = min(self.message, self.round_trip), self.handling.at(rows)
        here = max(handling / (2 * self.nodes), min(handling, (self.nodes - 1) * message))
        return message + here, handling - here, (self.round_trip - message + self.transfer(rows)) / 2

    def transfer(self, rows: float) -> float:
        return rows * self.nbytes / self.bandwidth if self.bandwidth else 0.0


@dataclass(frozen=True)
class Setup:
    """A client and the nodes behind its layers: `layers` has (how many, their call) in order, None for layers
    whose experts are on the client."""

    client: ClientCost
    layers: tuple[tuple[int, CallCost | None], ...]


@dataclass(frozen=True)
class Prediction:
    """`terms` are seconds of one step by what they are spent on; what runs hidden behind something longer is
    not among them. `binds` names the largest, or what has no time left where several groups alternate."""

    tokens_per_second: float
    step_seconds: float
    terms: Mapping[str, float] = field(default_factory=dict)
    binds: str = ""


def tokens_per_step(acceptance: Sequence[float], depth: int) -> float:
    """Tokens that a step of `depth` drafts yields: one, and each draft with the chance that it is accepted.

    `acceptance` are these chances by place, each for all drafts up to there; beyond its end they fall on by
    the last ratio.
    """
    if not acceptance:
        return 1.0
    chances = list(acceptance[:depth])
    ratio = acceptance[-1] / acceptance[-2] if len(acceptance) > 1 and acceptance[-2] else acceptance[-1]
    beyond = accumulate([ratio] * (depth - len(chances)), lambda a, b: a * b, initial=acceptance[-1])
    return 1 + sum(chances) + sum(list(beyond)[1:])


def plain(setup: Setup) -> Prediction:
    """One sequence, a token a step."""
    terms = step_terms(setup, 1)
    terms["engine"] += setup.client.token.at(1)
    return _prediction(1, terms)


def drafted(setup: Setup, depth: int, yields: float) -> Prediction:
    """One sequence with `depth` drafts a step, which yields that many tokens (see `tokens_per_step`)."""
    terms = step_terms(setup, depth + 1)
    terms["drafting"] = depth * setup.client.draft
    terms["engine"] += yields * setup.client.token.at(1)
    return _prediction(yields, terms)


def step_terms(setup: Setup, rows: int, sequences: int = 1) -> dict[str, float]:
    """Seconds of one step of `rows` rows, alone on the way, by what they are spent on."""
    client, terms = setup.client, defaultdict[str, float](float)
    for count, call in setup.layers:
        attention = client.attention.at(rows) + (sequences - 1) * client.sequence
        dense, parts = client.dense.at(rows), {"attention": attention}
        if call is None:
            parts |= {"dense network": dense, "local experts": client.experts.at(rows)}
        else:
            way = call.for_one(rows, dense) if sequences == 1 else call
            away = {
                "round trip": call.round_trip,
                "link bandwidth": call.transfer(rows),
                "node experts": call.experts.at(rows),
                "call handling": way.handling.at(rows),
            }
            parts |= away
            parts["dense network"] = max(0.0, dense - sum(away.values()))
            parts["call handling"] += way.send.at(rows) + way.combine.at(rows)
        for name, seconds in parts.items():
            terms[name] += count * seconds
    terms["lm_head"] = client.head.at(rows)
    terms["engine"] = client.step.at(rows)
    return terms


def batched(setup: Setup, streams: int) -> Prediction:
    """`streams` sequences, a token each a step, in two groups that alternate."""
    sizes = [size for size in (-(-streams // GROUPS), streams // GROUPS) if size]
    period, client_busy, nodes_busy = _alternate(setup, sizes)
    terms = step_terms(setup, sizes[0], sizes[0])
    terms["engine"] += sizes[0] * setup.client.token.at(sizes[0])
    alone = _prediction(streams, terms)
    binds = alone.binds
    if client_busy >= 0.9 * period:
        binds = "client arithmetic"
    elif nodes_busy >= 0.9 * period:
        binds = "node experts"
    return Prediction(streams / period, period, alone.terms, binds)


def _prediction(tokens: float, terms: Mapping[str, float]) -> Prediction:
    total = sum(terms.values())
    return Prediction(tokens / total, total, dict(terms), max(terms, key=lambda name: terms[name]))


def _alternate(setup: Setup, sizes: Sequence[int]) -> tuple[float, float, float]:
    """Follows groups of `sizes` rows through their steps, on one client and one queue per kind of call, which
    share what a call takes as `CallCost.shares` says.

    Seconds of a step of all groups once steady, and how long client and busiest nodes work in it.
    """
    client, stages = setup.client, [call for count, call in setup.layers for _ in range(count)]
    free = defaultdict[object, float](float)
    busy = defaultdict[object, float](float)
    ends: list[list[float]] = [[] for _ in sizes]
    waiting = [(0.0, group, 0) for group in range(len(sizes))]

    def work(where: object, ready: float, seconds: float) -> float:
        free[where] = max(free[where], ready) + seconds
        busy[where] += seconds
        return free[where]

    while waiting and min(map(len, ends)) < STEPS:
        ready, group, layer = heappop(waiting)
        rows = sizes[group]
        now = ready
        before = stages[layer - 1] if layer else None
        if before is not None:
            now = work("client", now, before.shares(rows)[0] + before.combine.at(rows))
        if layer == len(stages):
            handed_out = client.head.at(rows) + client.step.at(rows) + rows * client.token.at(rows)
            now = work("client", now, handed_out)
            ends[group].append(now)
            heappush(waiting, (now, group, 0))
            continue
        now = work("client", now, client.attention.at(rows) + (rows - 1) * client.sequence)
        call, dense = stages[layer], client.dense.at(rows)
        if call is None:
            now = work("client", now, dense + client.experts.at(rows))
            heappush(waiting, (now, group, layer + 1))
            continue
        sent = work("client", now, call.send.at(rows))
        computed = work("client", sent, dense)
        _, there, way = call.shares(rows)
        answered = work(id(call), sent + way, call.experts.at(rows) + there)
        back = answered + way
        heappush(waiting, (max(back, computed), group, layer + 1))
    half = STEPS // 2
    period = max((times[-1] - times[half - 1]) / (len(times) - half) for times in ends)
    share = period / max(free.values())
    nodes = max((seconds for where, seconds in busy.items() if where != "client"), default=0.0)
    return period, busy["client"] * share, nodes * share
