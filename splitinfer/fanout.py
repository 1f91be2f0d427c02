"""A block of rows, divided among nodes and added up again: the arithmetic of split execution, no network.

For one decoded row this runs once per layer and adds to the round trip, so what would take many small array
operations there is done with Python's own numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitinfer.fixed_point import DTYPE as FIXED
from splitinfer.fixed_point import from_fixed

__all__ = ["Indices", "Owner", "Partial", "Rows", "Share", "add_partials", "divide", "divide_by"]

Indices = npt.NDArray[np.int64]
Experts = npt.NDArray[np.int16]


class Rows(NamedTuple):
    """A block of rows as it goes on the wire: x [rows, hidden], and top_k_index and weights [rows, k]."""

    x: Tensor
    top_k_index: Indices
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Rows:
        # No operator of torch where it would change nothing: each takes a microsecond or two.
        if x.requires_grad or not x.is_contiguous():
            x = x.detach().contiguous()
        if top_k_weights.dtype is not torch.float32:
            top_k_weights = top_k_weights.to(torch.float32)
        return cls(x, top_k_index.numpy(), top_k_weights.numpy())


class Owner:
    """Who is asked for each expert of a layer: `table` int16 [slices, num_experts], -1 for nobody."""

    __slots__ = ("lists", "sole", "table")

    def __init__(self, table: Experts) -> None:
        self.table = table
        self.lists: list[list[int]] = table.tolist()
        nodes = set(table.ravel().tolist())
        self.sole = nodes.pop() if len(nodes) == 1 else None  # the node that is asked for everything


class Share(NamedTuple):
    """What one node is asked: these `rows` of the block (None: all), and of them the experts named in
    `experts` [rows, k], -1 for those of others."""

    node: int
    rows: Indices | None
    x: Tensor
    experts: Experts
    weights: npt.NDArray[np.float32]


class Partial(NamedTuple):
    """A node's answer for some `rows` of the block (None: all), [rows, hidden]."""

    node: int
    rows: Indices | None
    sums: Tensor


def divide(owner: Owner, wire: Rows) -> list[Share]:
    """One share for every node that has anything to do, lowest node first."""
    if owner.sole is not None and owner.sole >= 0:
        return [Share(owner.sole, None, wire.x, wire.top_k_index.astype(np.int16), wire.weights)]
    if len(wire.top_k_index) == 1:
        return _divide_one(owner.lists, wire)
    return divide_by(owner.table[:, wire.top_k_index], wire)


def _divide_one(lists: list[list[int]], wire: Rows) -> list[Share]:
    experts: list[int] = wire.top_k_index[0].tolist()
    asked: dict[int, list[int]] = {}
    for table in lists:
        for place, expert in enumerate(experts):
            node = table[expert]
            if node >= 0:
                asked.setdefault(node, [-1] * len(experts))[place] = expert
    return [
        Share(node, None, wire.x, np.array([asked[node]], dtype=np.int16), wire.weights)
        for node in sorted(asked)
    ]


def divide_by(owner: Experts, wire: Rows) -> list[Share]:
    """The same for `owner` [slices, rows, k] by entry (-1: nobody to ask for it)."""
    shares = []
    for node in np.unique(owner).tolist():
        if node < 0:
            continue
        mine = (owner == node).any(axis=0)
        needed = mine.any(axis=1)
        experts = np.where(mine, wire.top_k_index, -1).astype(np.int16)
        if needed.all():
            shares.append(Share(node, None, wire.x, experts, wire.weights))
        else:
            rows = np.flatnonzero(needed)
            x = wire.x[torch.from_numpy(rows)]
            shares.append(Share(node, rows, x, experts[rows], wire.weights[rows]))
    return shares


def add_partials(partials: Sequence[Partial], x: Tensor) -> Tensor:
    """Partial sums added in node order, in float32 or fixed point, and rounded once to the dtype of `x`."""
    if len(partials) == 1 and partials[0].rows is None and partials[0].sums.dtype is x.dtype:
        return partials[0].sums
    if all(partial.sums.dtype is FIXED for partial in partials):
        exact = torch.zeros(x.shape, dtype=FIXED)
        for _, rows, sums in partials:
            exact[slice(None) if rows is None else torch.from_numpy(rows)] += sums
        return from_fixed(exact, x.dtype)
    ordered = sorted(partials, key=lambda partial: partial.node)
    first = ordered[0]
    if first.rows is None:
        total = first.sums.float()
        total = total.clone() if total is first.sums else total  # the answer's memory is the transport's
        ordered = ordered[1:]
    else:
        total = torch.zeros(x.shape, dtype=torch.float32)
    for _, rows, sums in ordered:
        if rows is None:
            total += sums
        else:
            total.index_add_(0, torch.from_numpy(rows), sums.float())
    return total.to(x.dtype)
