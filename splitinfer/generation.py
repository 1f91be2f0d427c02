"""What the engine gives back: pieces while it writes, a completion at the end, and stop strings between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from splitinfer.errors import UsageError

__all__ = ["Completion", "Piece", "StopReason", "StopStrings", "Timings", "Usage"]

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Usage:
    """What a completion cost. Bytes and calls are those on the wire while it ran, headers included.
    `drafted_tokens` were verified as guesses, `accepted_tokens` of them were right."""

    prompt_tokens: int
    completion_tokens: int
    bytes_sent: int = 0
    bytes_received: int = 0
    calls: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds. `phases` sums over prefill and decode (see `splitinfer.timing`);
    `layers` has the phases of each layer for one decoded token, on average."""

    ttft: float
    total: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    phases: dict[str, float] = field(default_factory=dict)
    layers: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """The whole answer. `text` is empty when the checkpoint has no tokenizer; a stop string is not in it."""

    text: str
    token_ids: tuple[int, ...]
    stop_reason: StopReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """What came since the last piece. The last one carries the `completion`."""

    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None


class StopStrings:
    """Finds stop strings in text that arrives in pieces, holding back what may turn out to be one.

    >>> stops = StopStrings(["END"])
    >>> stops.feed("the E"), stops.feed("ND of it"), stops.found
    ('the ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if (
            isinstance(stops, str)
            or not isinstance(stops, Sequence)
            or not all(isinstance(stop, str) and stop for stop in stops)
        ):
            raise UsageError("stop takes a list of non-empty strings", remedy='Write stop=["\\n\\n"].')
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """Take `text`, return what can be shown now. After `found`, nothing more is shown."""
        if self.found:
            return ""
        text = self._held + text
        hits = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of `text` that begins `stop`."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
