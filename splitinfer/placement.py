"""Who holds which expert of which layer, whether the nodes together cover the model, and who is asked.

A node says what it holds in the transport's handshake (`Holding.to_info`); the client needs no second list.
Holdings compose freely: by experts, by layers, or both; two nodes that hold the same are replicas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from splitinfer.errors import PlacementError, RemoteProtocolError, UsageError

__all__ = ["Holding", "Placement", "format_ranges", "parse_ranges", "parse_size"]

MAX_ID = 1 << 15  # layer and expert ids travel as int16

_PART = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")
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

    `weight_format` is the numeric format of the weights; nodes with different formats do not give the same
    sums, so they are never replicas of each other.
    """

    fingerprint: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    weight_format: str

    def __str__(self) -> str:
        layers, experts = format_ranges(self.layers), format_ranges(self.experts)
        return f"layers {layers}, experts {experts} ({self.weight_format})"

    def to_info(self) -> dict[str, Any]:
        """The handshake's form: runs instead of ids, so that it stays small for any model."""
        return {
            "service": "experts",
            "fingerprint": self.fingerprint,
            "layers": [list(run) for run in _runs(self.layers)],
            "experts": [list(run) for run in _runs(self.experts)],
            "format": self.weight_format,
        }

    @classmethod
    def from_info(cls, info: dict[str, Any], peer: str) -> Holding:
        """Read a peer's claim. Raises `RemoteProtocolError` where it is not the claim of an expert node."""
        try:
            if info["service"] != "experts":
                raise ValueError(f"service {info['service']!r}")
            fingerprint, weight_format = info["fingerprint"], info["format"]
            if not isinstance(fingerprint, str) or not isinstance(weight_format, str):
                raise TypeError("fingerprint and format are strings")
            return cls(fingerprint, _expand(info["layers"]), _expand(info["experts"]), weight_format)
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


@dataclass(frozen=True)
class Placement:
    """Which node is asked for which expert.

    `addresses` are the nodes in a canonical order (by what they hold, then by address), so that sums are
    added in the same order however the nodes were listed. `holders[layer]` is a boolean table
    [nodes, num_experts]; `owner(layer, down)` picks one holder for each expert.
    """

    addresses: tuple[str, ...]
    holdings: tuple[Holding, ...]
    holders: dict[int, npt.NDArray[np.bool_]]

    @classmethod
    def plan(
        cls,
        nodes: Sequence[tuple[str, Holding]],
        *,
        layers: Sequence[int],
        num_experts: int,
        fingerprint: str,
    ) -> Placement:
        """Check that the nodes together hold every expert of `layers`, and that they agree.

        Raises `PlacementError` listing, by layer and range, what is missing and what is held twice in
        different formats, and any node that holds another model.
        """
        for address, holding in nodes:
            if holding.fingerprint != fingerprint:
                raise PlacementError(
                    f"node {address} holds another model (fingerprint {holding.fingerprint[:12]}, "
                    f"this one is {fingerprint[:12]})",
                    remedy="Start the node on the same checkpoint, or leave it out of --nodes.",
                )
        ordered = sorted(nodes, key=lambda node: (node[1].experts, node[1].layers, node[0]))
        holders = {layer: np.zeros((len(ordered), num_experts), dtype=np.bool_) for layer in layers}
        for row, (address, holding) in enumerate(ordered):
            if holding.experts[-1] >= num_experts:
                raise PlacementError(
                    f"node {address} offers expert {holding.experts[-1]}, the model has {num_experts}",
                    remedy="Start the node on the same checkpoint.",
                )
            for layer in set(holding.layers) & holders.keys():
                holders[layer][row, list(holding.experts)] = True
        gaps = _lines({layer: np.flatnonzero(~table.any(0)).tolist() for layer, table in holders.items()})
        conflicts = _conflicts(ordered, holders)
        if gaps or conflicts:
            trouble = [f"nobody holds {line}" for line in gaps] + [
                f"held in two formats: {c}" for c in conflicts
            ]
            raise PlacementError(
                f"the nodes do not serve the whole model: {'; '.join(trouble)}",
                gaps=gaps,
                conflicts=conflicts,
                remedy="Start nodes for what is missing and give all addresses with --nodes."
                if gaps
                else "Give every replica the same weight format.",
            )
        return cls(
            tuple(address for address, _ in ordered), tuple(holding for _, holding in ordered), holders
        )

    def owner(self, layer: int, down: frozenset[int] = frozenset()) -> npt.NDArray[np.int16]:
        """The node asked for each expert of a layer, int16 [num_experts]; -1 where every holder is `down`.

        Among replicas the one with the fewest experts assigned so far is taken, lowest first: the same answer
        on every client, and an even load.
        """
        table = self.holders[layer].copy()
        table[list(down)] = False
        load = [0] * len(self.addresses)
        owner = np.full(table.shape[1], -1, dtype=np.int16)
        # Experts with the fewest holders go first, so that replicas even out what is left.
        for expert in np.argsort(table.sum(0), kind="stable").tolist():
            holders = np.flatnonzero(table[:, expert]).tolist()
            if holders:
                chosen = min(holders, key=lambda node: (load[node], node))
                load[chosen] += 1
                owner[expert] = chosen
        return owner


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


def _conflicts(
    nodes: Sequence[tuple[str, Holding]], holders: dict[int, npt.NDArray[np.bool_]]
) -> tuple[str, ...]:
    """What two nodes both hold in different weight formats, one line for each pair and range."""
    found: list[str] = []
    for i, (first, one) in enumerate(nodes):
        for j, (second, other) in enumerate(nodes[i + 1 :], start=i + 1):
            if one.weight_format != other.weight_format:
                both = {
                    layer: np.flatnonzero(table[i] & table[j]).tolist() for layer, table in holders.items()
                }
                found += [
                    f"{line} ({first} {one.weight_format}, {second} {other.weight_format})"
                    for line in _lines(both)
                ]
    return tuple(found)
