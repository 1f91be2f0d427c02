"""Who holds which expert of which layer, whether the nodes together cover the model, and who is asked.

A node says what it holds in the transport's handshake (`Holding.to_info`); the client needs no second list.
Holdings compose freely: by experts, by layers, by slices of every expert's intermediate dimension; two nodes
that hold the same are replicas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from splitinfer.errors import PlacementError, RemoteProtocolError, UsageError

__all__ = [
    "SLICE_STEP",
    "Columns",
    "Holding",
    "Placement",
    "format_ranges",
    "parse_ranges",
    "parse_size",
    "parse_slice",
    "slice_step",
]

MAX_ID = 1 << 15  # layer and expert ids travel as int16

SLICE_STEP = 32  # columns; slices begin at multiples, so that a group of quantised weights is not divided
MAX_TILINGS = 64  # ways to put an expert together from slices that are weighed

Columns = tuple[int, int]  # from the first to before the last, of moe_intermediate_size

_PART = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
_SLICE = re.compile(r"\s*(?:(\d{1,3})\s*/\s*(\d{1,3})|(\d?\.?\d{1,9})\s*:\s*(\d?\.?\d{1,9}))\s*")
_SIZE = re.compile(r"\s*(\d{1,9}(?:\.\d+)?)\s*([KMGTkmgt])(i?)[Bb]\s*")


def parse_ranges(text: str, count: int, flag: str) -> tuple[int, ...]:
    """Read `"0-31,64-95"` into sorted ids below `count`. `flag` names the option in errors.

    Raises `UsageError` for anything that is not a list of ranges, a reversed range, an id that is not in the
    model, or an id named twice.
    """
    ids: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise UsageError(
                f"{flag} {text!r}: {part.strip()!r} is not a range",
                remedy=f"Write it like {flag} 0-31,64-95.",
            )
        low = int(match[1])
        high = int(match[2]) if match[2] else low
        if high < low:
            raise UsageError(
                f"{flag} {text!r}: the range {low}-{high} runs backwards",
                remedy=f"Write {flag} {high}-{low}.",
            )
        if high >= count:
            raise UsageError(
                f"{flag} {text!r}: {high} is out of bounds, this model has {count} (0-{count - 1})",
                remedy=f"Choose within 0-{count - 1}.",
            )
        span = range(low, high + 1)
        if not ids.isdisjoint(span):
            raise UsageError(f"{flag} {text!r}: {low}-{high} is named twice", remedy="Name every id once.")
        ids.update(span)
    return tuple(sorted(ids))


def parse_slice(text: str, columns: int, flag: str) -> Columns:
    """`"1/2"` (the first of two) or `"0.3:0.7"` (from three tenths to seven) of `columns`.

    Edges are rounded to `SLICE_STEP` where `columns` is a larger multiple of it, the same for every node.
    Raises `UsageError` for anything that is no slice or holds nothing. `flag` names the option in errors.
    """
    match = _SLICE.fullmatch(text)
    low = high = Fraction(0)
    if match is not None and match[1]:
        part, parts = int(match[1]), int(match[2])
        if 1 <= part <= parts:
            low, high = Fraction(part - 1, parts), Fraction(part, parts)
    elif match is not None:
        low, high = Fraction(match[3]), Fraction(match[4])
    if not low < high <= 1:
        raise UsageError(
            f"{flag} {text!r} is not a slice", remedy=f"Write it like {flag} 1/2 or {flag} 0.3:0.7."
        )
    step = slice_step(columns)
    begin, end = (round(edge * columns / step) * step for edge in (low, high))
    if begin == end:
        raise UsageError(f"{flag} {text!r} holds nothing of {columns} columns", remedy="Take a larger slice.")
    return begin, end


def slice_step(columns: int) -> int:
    """What the edges of slices of `columns` are multiples of."""
    return SLICE_STEP if columns % SLICE_STEP == 0 and columns > SLICE_STEP else 1


def parse_size(text: str, flag: str) -> int:
    """Bytes from `"6GiB"`, `"512 MiB"` or `"8GB"`. `flag` names the option in errors. Raises `UsageError`."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"{flag} {text!r} is not a size", remedy=f"Write it like {flag} 6GiB.")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** (1 + "KMGT".index(match[2].upper())))


def _runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted ids as inclusive runs: [0, 1, 2, 7] -> [(0, 2), (7, 7)]."""
    ordered = sorted(ids)
    if not ordered:
        return []
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1]
    starts, ends = [0, *cuts], [*cuts, len(ordered)]
    return [(ordered[s], ordered[e - 1]) for s, e in zip(starts, ends, strict=True)]


def format_ranges(ids: Iterable[int]) -> str:
    """The reverse of `parse_ranges`: [0, 1, 2, 7] -> "0-2,7"."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(ids))


@dataclass(frozen=True)
class Holding:
    """What one node holds: these experts of each of these layers, of the model with this fingerprint.

    `columns` is the slice held of each expert's intermediate dimension, None for all of it.

    `weight_format` is the numeric format of the weights; nodes with different formats do not give the same
    sums, so they are never replicas of each other. `arithmetic` names how the node rounds, "" if it does not
    say (`model.native.arithmetic`).
    """

    fingerprint: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    weight_format: str
    columns: Columns | None = None
    arithmetic: str = ""

    def __str__(self) -> str:
        layers, experts = format_ranges(self.layers), format_ranges(self.experts)
        part = "" if self.columns is None else f", columns {self.columns[0]}-{self.columns[1] - 1}"
        return f"layers {layers}, experts {experts}{part} ({self.weight_format})"

    def to_info(self) -> dict[str, Any]:
        """The handshake's form: runs instead of ids, so that it stays small for any model."""
        whole = {} if self.columns is None else {"columns": list(self.columns)}
        return whole | {
            "service": "experts",
            "fingerprint": self.fingerprint,
            "layers": [list(run) for run in _runs(self.layers)],
            "experts": [list(run) for run in _runs(self.experts)],
            "format": self.weight_format,
            "arithmetic": self.arithmetic,
        }

    @classmethod
    def from_info(cls, info: dict[str, Any], peer: str) -> Holding:
        """Read a peer's claim. Raises `RemoteProtocolError` where it is not the claim of an expert node."""
        try:
            if info["service"] != "experts":
                raise ValueError(f"service {info['service']!r}")
            fingerprint, weight_format = info["fingerprint"], info["format"]
            arithmetic = info.get("arithmetic", "")
            if not all(isinstance(text, str) for text in (fingerprint, weight_format, arithmetic)):
                raise TypeError("fingerprint, format and arithmetic are strings")
            layers, experts = _expand(info["layers"]), _expand(info["experts"])
            columns = _columns(info.get("columns"))
            return cls(fingerprint, layers, experts, weight_format, columns, arithmetic)
        except (KeyError, TypeError, ValueError) as error:
            raise RemoteProtocolError(
                f"{peer} answers, but not as an expert node ({error})",
                peer=peer,
                remedy="Check the address: `splitinfer node` prints the one it listens on.",
            ) from error


def _expand(runs: Any) -> tuple[int, ...]:
    """[[0, 2], [7, 7]] -> (0, 1, 2, 7), refusing what is unsorted, overlapping or too large."""
    ids: list[int] = []
    for low, high in runs:
        if (
            type(low) is not int
            or type(high) is not int
            or not (ids[-1] if ids else -1) < low <= high < MAX_ID
        ):
            raise ValueError(f"range {low!r}-{high!r}")
        ids.extend(range(low, high + 1))
    if not ids:
        raise ValueError("holds nothing")
    return tuple(ids)


def _columns(claim: Any) -> Columns | None:
    if claim is None:
        return None
    low, high = claim
    if type(low) is not int or type(high) is not int or not 0 <= low < high < 1 << 31:
        raise ValueError(f"columns {low!r}-{high!r}")
    return low, high


@dataclass(frozen=True)
class Placement:
    """Which node is asked for which expert.

    `addresses` are the nodes in a canonical order (by what they hold, then by address), so that sums are
    added in the same order however the nodes were listed. `holders[layer]` is a boolean table
    [nodes, num_experts]; `owner(layer, down)` picks holders for each expert. `columns` is the model's
    moe_intermediate_size.
    """

    addresses: tuple[str, ...]
    holdings: tuple[Holding, ...]
    holders: dict[int, npt.NDArray[np.bool_]]
    columns: int

    @classmethod
    def plan(
        cls,
        nodes: Sequence[tuple[str, Holding]],
        *,
        layers: Sequence[int],
        num_experts: int,
        columns: int,
        fingerprint: str,
    ) -> Placement:
        """Check that the nodes together hold every expert of `layers`, and that they agree.

        Raises `PlacementError` listing, by layer and range, what is missing, what is held twice in different
        formats and where slices do not meet, and any node that holds another model.
        """
        whole = (0, columns)
        ordered = sorted(nodes, key=lambda n: (n[1].experts, n[1].layers, n[1].columns or whole, n[0]))
        holders = {layer: np.zeros((len(ordered), num_experts), dtype=np.bool_) for layer in layers}
        for row, (address, holding) in enumerate(ordered):
            _check(address, holding, fingerprint, num_experts, columns)
            for layer in set(holding.layers) & holders.keys():
                holders[layer][row, list(holding.experts)] = True
        placement = cls(tuple(a for a, _ in ordered), tuple(h for _, h in ordered), holders, columns)
        gaps, conflicts = placement._gaps(), placement._conflicts()
        if gaps or conflicts:
            trouble = [f"nobody holds {line}" for line in gaps]
            trouble += [f"held in two formats: {line}" for line in conflicts]
            raise PlacementError(
                f"the nodes do not serve the whole model: {'; '.join(trouble)}",
                gaps=gaps,
                conflicts=conflicts,
                remedy="Start nodes for what is missing and give all addresses with --nodes."
                if gaps
                else "Give every replica the same weight format.",
            )
        return placement

    @cached_property
    def spans(self) -> tuple[Columns, ...]:
        """The columns that each node holds of its experts."""
        return tuple(holding.columns or (0, self.columns) for holding in self.holdings)

    def owner(
        self, layer: int, down: frozenset[int] = frozenset(), span: Columns | None = None
    ) -> npt.NDArray[np.int16]:
        """The nodes asked for each expert of a layer, int16 [slices, num_experts].

        An expert that is put together from fewer slices than others has -1 in the further places; one whose
        holders not in `down` do not make up `span` (default: all columns) has -1 throughout. Of several ways
        the one with the least work given out so far is taken, lowest node first: the same answer on every
        client, and an even load.
        """
        table = self.holders[layer].copy()
        table[list(down)] = False
        load = [0] * len(self.addresses)
        chosen: dict[int, tuple[int, ...]] = {}
        # Experts with the fewest holders go first, so that replicas even out what is left.
        for expert in np.argsort(table.sum(0), kind="stable").tolist():
            holders = np.flatnonzero(table[:, expert]).tolist()
            ways = []
            for tiling in _tilings(frozenset(self.spans[n] for n in holders), span or (0, self.columns)):
                among = [[n for n in holders if self.spans[n] == tile] for tile in tiling]
                nodes = tuple(min(same, key=lambda node: (load[node], node)) for same in among)
                busiest = max(load[n] + self.spans[n][1] - self.spans[n][0] for n in nodes)
                ways.append((busiest, len(nodes), nodes))
            if ways:
                chosen[expert] = min(ways)[2]
                for node in chosen[expert]:
                    load[node] += self.spans[node][1] - self.spans[node][0]
        owner = np.full((max(map(len, chosen.values()), default=1), table.shape[1]), -1, dtype=np.int16)
        for expert, nodes in chosen.items():
            owner[: len(nodes), expert] = nodes
        return owner

    def _gaps(self) -> tuple[str, ...]:
        """What the nodes do not hold between them, one line for each range and reason."""
        missing: dict[str, dict[int, list[int]]] = {}
        for layer, table in self.holders.items():
            for expert, column in enumerate(table.T):
                spans = frozenset(self.spans[n] for n in np.flatnonzero(column).tolist())
                if not _tilings(spans, (0, self.columns)):
                    missing.setdefault(_reason(spans, self.columns), {}).setdefault(layer, []).append(expert)
        return tuple(line + reason for reason, found in missing.items() for line in _lines(found))

    def _conflicts(self) -> tuple[str, ...]:
        """What two nodes both hold in different weight formats, one line for each pair and range."""
        found: list[str] = []
        for i, one in enumerate(self.holdings):
            for j, other in enumerate(self.holdings[i + 1 :], start=i + 1):
                overlap = max(self.spans[i][0], self.spans[j][0]) < min(self.spans[i][1], self.spans[j][1])
                if overlap and one.weight_format != other.weight_format:
                    both = {
                        layer: np.flatnonzero(table[i] & table[j]).tolist()
                        for layer, table in self.holders.items()
                    }
                    first, second = self.addresses[i], self.addresses[j]
                    formats = f"({first} {one.weight_format}, {second} {other.weight_format})"
                    found += [f"{line} {formats}" for line in _lines(both)]
        return tuple(found)


def _check(address: str, holding: Holding, fingerprint: str, num_experts: int, columns: int) -> None:
    """Raises PlacementError for a node of another model."""
    if holding.fingerprint != fingerprint:
        raise PlacementError(
            f"node {address} holds another model (fingerprint {holding.fingerprint[:12]}, "
            f"this one is {fingerprint[:12]})",
            remedy="Start the node on the same checkpoint, or leave it out of --nodes; a GGUF file and a "
            "folder of one model count as two.",
        )
    for what, last, count in (
        ("expert", holding.experts[-1], num_experts),
        ("column", (holding.columns or (0, columns))[1] - 1, columns),
    ):
        if last >= count:
            raise PlacementError(
                f"node {address} offers {what} {last}, the model has {count}",
                remedy="Start the node on the same checkpoint.",
            )


@lru_cache(maxsize=1024)
def _tilings(spans: frozenset[Columns], whole: Columns) -> tuple[tuple[Columns, ...], ...]:
    """The ways to put `whole` together from `spans` that do not overlap, fewest first."""
    found: list[tuple[Columns, ...]] = []
    open_: list[tuple[Columns, ...]] = [()]
    while open_ and len(found) < MAX_TILINGS:
        begun = open_.pop(0)
        reached = begun[-1][1] if begun else whole[0]
        if reached == whole[1]:
            found.append(begun)
        elif len(open_) < MAX_TILINGS:
            open_ += [(*begun, span) for span in sorted(spans) if span[0] == reached and span[1] <= whole[1]]
    return tuple(found)


def _reason(spans: frozenset[Columns], columns: int) -> str:
    """Why `spans` are not all of an expert."""
    if not spans:
        return ""
    held = {column for low, high in spans for column in range(low, high)}
    missing = format_ranges(set(range(columns)) - held)
    if missing:
        return f" (columns {missing} of {columns})"
    edges = ", ".join(f"{low}-{high - 1}" for low, high in sorted(spans))
    return f" (slices {edges} overlap and do not add up)"


def _lines(by_layer: dict[int, list[int]]) -> tuple[str, ...]:
    """{0: [1, 2], 1: [1, 2], 2: []} -> ("layers 0-1: experts 1-2",): equal layers share a line."""
    grouped: dict[str, list[int]] = {}
    for layer, experts in by_layer.items():
        if experts:
            grouped.setdefault(format_ranges(experts), []).append(layer)
    return tuple(
        f"layer{'s' if len(layers) > 1 else ''} {format_ranges(layers)}: experts {experts}"
        for experts, layers in grouped.items()
    )
