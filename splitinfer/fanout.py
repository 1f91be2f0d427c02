"""A block of rows, divided among nodes and added up again: the arithmetic of split execution, no network.

For one decoded row this runs once per layer and adds to the round trip, with caches that the layer's weights
have just swept: there a call into numpy or PyTorch takes ten microseconds, and few are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import memmove, string_at
from struct import pack
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from splitinfer import transport
from splitinfer.fixed_point import DTYPE as FIXED
from splitinfer.fixed_point import from_fixed
from splitinfer.model.native import DTYPES, address_of
from splitinfer.model.row_kernels import row_kernels

__all__ = ["Indices", "Owner", "Partial", "Rows", "Share", "add_partials", "divide", "divide_by", "name_of"]

Indices = npt.NDArray[np.int64]
Experts = npt.NDArray[np.int16]

COPIED_NBYTES = 32 << 10  # up to here a copy costs less than a view


class Rows:
    """A block of rows: x [rows, hidden], top_k_index (as `expert_ids` gives it) and weights [rows, k]."""

    __slots__ = ("_tensors", "_top_k_index", "_weights", "x")

    def __init__(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        # No operator of torch where it would change nothing: each takes a microsecond or two.
        if x.requires_grad or not x.is_contiguous():
            x = x.detach().contiguous()
        if top_k_weights.dtype is not torch.float32 or not top_k_weights.is_contiguous():
            top_k_weights = top_k_weights.to(torch.float32).contiguous()
        self.x, self._top_k_index, self._weights = x, top_k_index, top_k_weights
        self._tensors: list[transport.Array] | None = None

    @property
    def tensors(self) -> list[transport.Array]:
        """All of it, as it goes to a node that is asked for everything."""
        if self._tensors is None:
            x, index = self.x, self._top_k_index
            if x.nbytes <= COPIED_NBYTES:
                shape, places = tuple(x.shape), tuple(index.shape)
                self._tensors = [
                    transport.Tensor(_NAMES[x.dtype], shape, _copy(x)),
                    transport.Tensor("int16", places, _copy(index)),
                    transport.Tensor("float32", places, _copy(self._weights)),
                ]
            else:
                self._tensors = [x, self.top_k_index, self.weights]
        return self._tensors

    @property
    def top_k_index(self) -> Experts:
        return cast(Experts, self._top_k_index.numpy())

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        return cast("npt.NDArray[np.float32]", self._weights.numpy())


class Owner:
    """Who is asked for each expert of a layer: `table` int16 [slices, num_experts], -1 for nobody."""

    __slots__ = ("lists", "sole", "table")

    def __init__(self, table: Experts) -> None:
        self.table = table
        self.lists: list[list[int]] = table.tolist()
        nodes = set(table.ravel().tolist())
        self.sole = nodes.pop() if len(nodes) == 1 else None  # the node that is asked for everything

    def asked(self, node: int) -> bytearray:
        """By expert: 1 where this node is asked for it, or for a slice of it."""
        return bytearray((self.table == node).any(axis=0).astype(np.uint8).tobytes())


class Share(NamedTuple):
    """What one node is asked: these `rows` of the block (None: all), as the `tensors` that it is sent: x
    [rows, hidden], the experts [rows, k] int16, -1 for those of others, and the weights [rows, k]."""

    node: int
    rows: Indices | None
    tensors: list[transport.Array]

    @property
    def experts(self) -> Experts:
        experts = self.tensors[1]
        return cast(Experts, experts.numpy() if isinstance(experts, transport.Tensor) else experts)


class Partial(NamedTuple):
    """A node's answer for some `rows` of the block (None: all), [rows, hidden]."""

    node: int
    rows: Indices | None
    sums: transport.Tensor


def divide(owner: Owner, wire: Rows) -> list[Share]:
    """One share for every node that has anything to do, lowest node first."""
    if owner.sole is not None and owner.sole >= 0:
        return [Share(owner.sole, None, wire.tensors)]
    x, index, weights = wire.tensors
    if isinstance(index, transport.Tensor) and index.shape[0] == 1:
        return _divide_one(owner.lists, x, index, weights)
    return divide_by(owner.table[:, wire.top_k_index], wire)


def _divide_one(
    lists: list[list[int]], x: transport.Array, index: transport.Tensor, weights: transport.Array
) -> list[Share]:
    experts: list[int] = index.data.cast("h").tolist()
    asked: dict[int, list[int]] = {}
    for table in lists:
        for place, expert in enumerate(experts):
            node = table[expert]
            if node >= 0:
                asked.setdefault(node, [-1] * len(experts))[place] = expert
    layout = f"={len(experts)}h"
    return [
        Share(
            node,
            None,
            [x, transport.Tensor("int16", index.shape, memoryview(pack(layout, *asked[node]))), weights],
        )
        for node in sorted(asked)
    ]


def divide_by(owner: Experts, wire: Rows) -> list[Share]:
    """The same for `owner` [slices, rows, k] by entry (-1: nobody to ask for it)."""
    shares = []
    top_k_index, weights = wire.top_k_index, wire.weights
    for node in np.unique(owner).tolist():
        if node < 0:
            continue
        mine = (owner == node).any(axis=0)
        needed = mine.any(axis=1)
        experts = np.where(mine, top_k_index, np.int16(-1))
        if needed.all():
            shares.append(Share(node, None, [wire.x, experts, weights]))
        else:
            rows = np.flatnonzero(needed)
            x = wire.x[torch.from_numpy(rows)]
            shares.append(Share(node, rows, [x, experts[rows], weights[rows]]))
    return shares


def add_partials(partials: Sequence[Partial], x: Tensor) -> Tensor:
    """Partial sums added in node order, in float32 or fixed point, and rounded once to the dtype of `x`."""
    first = partials[0]
    if len(partials) == 1 and first.rows is None and first.sums.dtype == _NAMES[x.dtype]:
        return _taken(first.sums, x)
    ordered = sorted(partials, key=lambda partial: partial.node)
    kernels = row_kernels()
    if kernels is not None and x.dtype in DTYPES and x.numel() and all(map(_is_whole, partials)):
        return kernels.sum([address_of(partial.sums.data) for partial in ordered], torch.empty_like(x))
    if all(partial.sums.dtype == "int64" for partial in partials):
        total = torch.zeros(x.shape, dtype=FIXED)
    else:
        total = torch.zeros(x.shape, dtype=torch.float32)
    for _, rows, sums in ordered:
        if rows is None:
            total += sums.torch()
        else:
            total.index_add_(0, torch.from_numpy(rows), sums.torch().to(total.dtype))
    return from_fixed(total, x.dtype) if total.dtype is FIXED else total.to(x.dtype)


def _is_whole(partial: Partial) -> bool:
    return partial.rows is None and partial.sums.dtype == "float32"


def _taken(sums: transport.Tensor, x: Tensor) -> Tensor:
    """A sum that needs no adding, like `x`."""
    if not 0 < sums.nbytes <= COPIED_NBYTES:
        return sums.torch()
    out = torch.empty_like(x)
    memmove(out.data_ptr(), address_of(sums.data), sums.nbytes)
    return out


def _copy(x: Tensor) -> memoryview:
    return memoryview(string_at(x.data_ptr(), x.nbytes))


def name_of(dtype: torch.dtype) -> str:
    """As the wire has it."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*DTYPES, torch.float16, torch.float64)}
