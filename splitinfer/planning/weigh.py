"""Which of several ways is the best: each predicted for plain, drafted and batched decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitinfer.planning.cost import Prediction, Setup, batched, drafted, plain, tokens_per_step

__all__ = ["ACCEPTANCE", "STREAMS", "Weighed", "weigh"]

# The chance that a draft and all before it are right, by place: Gemma 4 26B-A4B with its own assistant, as
# users of another engine report it.
ACCEPTANCE = (0.84, 0.60, 0.39, 0.27)
MAX_DEPTH = 8
STREAMS = 8


@dataclass(frozen=True)
class Weighed:
    """Predictions for one way. `depth` is the number of drafts that suits it best, 0 where none helps:
    `drafted` is `plain` then."""

    plain: Prediction
    drafted: Prediction
    batched: Prediction
    depth: int


def weigh(setup: Setup, *, acceptance: Sequence[float] = ACCEPTANCE, streams: int = STREAMS) -> Weighed:
    """Predict every kind of decoding over `setup`; no `acceptance` means no drafts."""
    alone = plain(setup)
    best, depth = alone, 0
    for count in range(1, MAX_DEPTH + 1 if acceptance else 1):
        found = drafted(setup, count, tokens_per_step(acceptance, count))
        if found.tokens_per_second > best.tokens_per_second:
            best, depth = found, count
    return Weighed(alone, best, batched(setup, streams), depth)
