"""Where the time of a step went: named phases on one clock, cheap enough to leave on.

Phases are the words of the design: "attention" (and routing), "dispatch" (handing rows to the kernel, where
that is not done within attention), "dense" (what is left of it, where it began beside the dispatch; an answer
that comes meanwhile is taken then, between two spans), "experts" (their arithmetic, as far as it was waited
for), "network" (the rest of that wait), "combine" (the answers, and these with the dense branch; in one span
where one call does both), "head", "sampling", "draft". Times are
`time.perf_counter()` seconds. Phases of a step do not overlap, so their sum is the time of the step less what
no phase claims; the chunks of a long prompt are steps that do overlap.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

__all__ = ["Span", "Timeline", "perf_counter"]


class Span(NamedTuple):
    """One stretch of one phase. `layer` is -1 outside the layers. `node` is the address of the node whose
    arithmetic it is, "" for this machine."""

    phase: str
    layer: int
    start: float
    end: float
    node: str = ""


@dataclass(slots=True)
class Timeline:
    """Sums seconds by phase and layer. With `spans` a list it keeps every stretch too, without bound."""

    spans: list[Span] | None = None
    seconds: defaultdict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, phase: str, layer: int, start: float, end: float) -> None:
        self.seconds[phase, layer] += end - start
        if self.spans is not None:
            self.spans.append(Span(phase, layer, start, end))

    def merge(self, other: Timeline) -> None:
        """Count `other`'s times here too, those of a step that several share. Its spans stay its own."""
        for key, seconds in other.seconds.items():
            self.seconds[key] += seconds

    def add_remote(self, layer: int, node: str, sent: float, answered: float, seconds: float) -> None:
        """Keep a node's own account of `seconds` of arithmetic for a call from `sent` to `answered`.

        Clocks differ between machines: it is shown as if both ways had taken equally long.
        """
        if self.spans is not None:
            start = max(sent, (sent + answered - seconds) / 2)
            self.spans.append(Span("experts", layer, start, min(answered, start + seconds), node))

    def by_phase(self) -> dict[str, float]:
        """Seconds by phase, summed over layers."""
        sums: defaultdict[str, float] = defaultdict(float)
        for (phase, _), seconds in self.seconds.items():
            sums[phase] += seconds
        return dict(sums)

    def by_layer(self) -> list[dict[str, float]]:
        """Seconds by phase for each layer, from layer 0 on."""
        layers: list[dict[str, float]] = []
        for (phase, layer), seconds in self.seconds.items():
            if layer >= 0:
                while len(layers) <= layer:
                    layers.append({})
                layers[layer][phase] = seconds
        return layers
