"""Where the time of a step went: named spans on one clock, cheap enough to leave on.

Phases are the words of the design: "attention", "router", "dense", "experts" (arithmetic), "network"
(waiting for a node, less its own arithmetic), "head", "sampling". Times are `time.perf_counter()` seconds.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

__all__ = ["Span", "Timeline", "perf_counter"]


class Span(NamedTuple):
    """One stretch of one phase. `layer` is -1 outside the layers; `where` is "" here, else a node."""

    phase: str
    layer: int
    start: float
    end: float
    where: str = ""


@dataclass(slots=True)
class Timeline:
    """Collects spans. Adding one is a list append; sums are made when somebody asks."""

    spans: list[Span] = field(default_factory=list)

    def add(self, phase: str, layer: int, start: float, end: float, where: str = "") -> None:
        self.spans.append(Span(phase, layer, start, end, where))

    def totals(self) -> dict[str, float]:
        """Seconds by phase, summed over layers and nodes."""
        sums: defaultdict[str, float] = defaultdict(float)
        for span in self.spans:
            sums[span.phase] += span.end - span.start
        return dict(sums)

    def clear(self) -> None:
        self.spans.clear()
