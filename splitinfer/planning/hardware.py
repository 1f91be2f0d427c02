"""What a cut would cost on machines that are described, not measured: bytes over what memory gives, and what
nobody gets around.

Decoding reads every weight that a row needs once a step, so an operation takes its bytes over the rate at
which the kernels stream them; a further row that shares the weights costs a part of that again. Routing is
taken as uniform: n rows touch 1 - (1 - K/E)^n of E experts, and of several nodes the one with the most to
read decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from splitinfer.model.footprint import Sizes, cache_nbytes
from splitinfer.planning.cost import CallCost, ClientCost, Curve, Setup
from splitinfer.planning.cuts import Cut, Machine, Part

__all__ = ["DRAFT_NBYTES", "Assumed", "Rate", "formats_of", "setup_of"]

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
DRAWS = 200  # of random routing, always the same
DRAFT_NBYTES = 100e6  # what a guess of Gemma 4's assistant reads, about: its trunk, without most of its head
ROW_NBYTES = 150  # of a call and its answer beside the rows: two headers


@dataclass(frozen=True)
class Rate:
    """How fast weights of one format stream through the kernels: bytes/s for one row, and what every further
    row costs as a part of the first."""

    nbytes: float
    row: float

    def scaled(self, factor: float) -> Rate:
        return Rate(self.nbytes * factor, self.row)


@dataclass(frozen=True)
class Assumed:
    """This machine as it was measured, and the link as it was described.

    `read` is what this machine reads from memory in bytes/s, `rates` what the kernels make of that by format;
    nodes are taken to be alike, or as much faster as their own bandwidth says. `layer`, `step` and `token`
    are seconds that a layer, a step and a token cost whatever their size; `call` what a call costs for each
    node beside its round trip. `bandwidth` is the client's link in bytes/s, 0 for any.
    """

    read: float
    rates: Mapping[str, Rate]
    layer: float
    step: float
    token: float
    call: float
    round_trip: float
    bandwidth: float = 0.0

    def rate(self, formats: str, machine: Machine | None = None) -> Rate:
        """That of weights in this format, or in several ("int4+int8", as some files mix them): the
        slowest."""
        known = min((self.rates[format] for format in formats.split("+")), key=lambda rate: rate.nbytes)
        return known.scaled(machine.bandwidth / self.read) if machine and machine.bandwidth else known


def formats_of(sizes: Sizes) -> dict[str, str]:
    """What the parts that a step reads are held in."""
    formats = {part: sizes.formats(part) for part in ("experts", "attention", "dense")}
    return formats | {
        "lm_head": sizes.quant.lm_head or sizes.formats("lm_head") or sizes.formats("embeddings")
    }


def setup_of(cut: Cut, sizes: Sizes, assumed: Assumed, *, tokens: int, int8_cache: bool = False) -> Setup:
    """What steps over this cut would cost, with `tokens` in the cache."""
    config = sizes.config
    stages: list[tuple[int, CallCost | None]] = [(len(cut.local), None)] if cut.local else []
    if cut.kind == "by layers":
        stages += [(len(part.layers), _call((part,), sizes, assumed)) for part in cut.parts]
    elif cut.parts:
        remote = config.num_hidden_layers - len(cut.local)
        parts = cut.parts if cut.kind != "replicas" else tuple(_shared_out(cut.parts, config.num_experts))
        stages.append((remote, _call(parts, sizes, assumed)))
    return Setup(_client(sizes, assumed, tokens, int8_cache), tuple(stages))


def _client(sizes: Sizes, assumed: Assumed, tokens: int, int8_cache: bool) -> ClientCost:
    config, half = sizes.config, sizes.client(0)
    layers = config.num_hidden_layers
    formats = formats_of(sizes)
    held = cache_nbytes(config, tokens, sizes.dtype.itemsize, int8=int8_cache)
    keys = held / layers / assumed.read
    attention, dense = assumed.rate(formats["attention"]), assumed.rate(formats["dense"])
    head = assumed.rate(formats["lm_head"])
    everything, own = (tuple(range(config.num_experts)),), _seconds(sizes, assumed, None, None)
    return ClientCost(
        attention=_reading((half.attention + half.other) / layers, attention, assumed.layer + keys),
        dense=_reading(half.dense / layers, dense),
        experts=Curve.of({n: _busiest(sizes, everything, n, (own,)) for n in ROWS}),
        head=_reading(half.lm_head or half.embeddings, head),
        step=Curve.constant(assumed.step),
        sequence=keys,
        token=Curve.constant(assumed.token),
        draft=assumed.layer + DRAFT_NBYTES / assumed.read,
    )


def _reading(nbytes: float, rate: Rate, fixed: float = 0.0) -> Curve:
    first = nbytes / rate.nbytes
    return Curve.of({n: fixed + first * (1 + rate.row * (n - 1)) for n in (1, 2)})


def _call(parts: tuple[Part, ...], sizes: Sizes, assumed: Assumed) -> CallCost:
    """One layer's call to these nodes. Every one of them is taken to be asked for every row."""
    config = sizes.config
    row = config.hidden_size * sizes.dtype.itemsize
    answer = row if len(parts) == 1 else config.hidden_size * 4  # partial sums travel in float32
    up = row + config.top_k_experts * 6  # expert ids in two bytes, weights in four
    groups = tuple(part.experts for part in parts)
    seconds = tuple(_seconds(sizes, assumed, part.machine, part.columns) for part in parts)
    return CallCost(
        assumed.round_trip,
        experts=Curve.of({n: _busiest(sizes, groups, n, seconds) for n in ROWS}),
        handling=Curve.constant(assumed.call * len(parts)),
        nodes=len(parts),
        nbytes=len(parts) * (up + answer + ROW_NBYTES),
        bandwidth=assumed.bandwidth,
    )


def _seconds(
    sizes: Sizes, assumed: Assumed, machine: Machine | None, columns: tuple[int, int] | None
) -> tuple[float, float]:
    """Seconds of one expert for its first row, and for each further one."""
    rate = assumed.rate(sizes.formats("experts"), machine)
    first = sizes.expert(sizes.config.num_hidden_layers // 2, columns) / rate.nbytes
    return first, first * rate.row


def _shared_out(parts: tuple[Part, ...], num_experts: int) -> list[Part]:
    """Replicas as the client uses them: each expert is asked of one of them, and they get about equally
    many."""
    groups = [tuple(range(i, num_experts, len(parts))) for i in range(len(parts))]
    return [
        Part(part.machine, part.layers, group, part.columns, part.nbytes)
        for part, group in zip(parts, groups, strict=True)
    ]


def _busiest(
    sizes: Sizes, groups: tuple[tuple[int, ...], ...], rows: int, seconds: tuple[tuple[float, float], ...]
) -> float:
    """Seconds of the slowest of nodes that hold `groups` of experts, on average over random routing."""
    config = sizes.config
    asked = _asked(config.num_experts, config.top_k_experts, rows)  # [draws, experts]: rows that want it
    times = []
    for group, (first, further) in zip(groups, seconds, strict=True):
        own = asked[:, list(group)]
        experts = (own > 0).sum(1)
        times.append(experts * first + (own.sum(1) - experts) * further)
    return float(np.max(times, axis=0).mean())


@lru_cache(maxsize=64)
def _asked(num_experts: int, top_k: int, rows: int) -> npt.NDArray[np.int64]:
    """Of so many rows that choose `top_k` experts at random, how many want each; int64 [draws, experts]."""
    scores = np.random.default_rng(0).random((rows, DRAWS, num_experts))  # more rows: the same ones first
    chosen = np.argpartition(scores, num_experts - top_k, axis=2)[:, :, num_experts - top_k :]
    counts = np.zeros((DRAWS, num_experts), dtype=np.int64)
    for row in chosen:
        counts[np.arange(DRAWS)[:, None], row] += 1
    return counts
