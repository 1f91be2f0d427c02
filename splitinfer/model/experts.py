"""Experts on this machine: a bank of some of them, and the seam through which the model reaches any of them.

Shape letters: H hidden_size, I moe_intermediate_size, K top_k_experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from ctypes import Array
from typing import Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.errors import PlacementError, SplitinferError
from splitinfer.fixed_point import DTYPE as FIXED
from splitinfer.fixed_point import from_fixed, out_of_range
from splitinfer.model.compute import run, runs_inline, submit
from splitinfer.model.exact import expert_in_fixed_point
from splitinfer.model.linear import Linear, matrix_of
from splitinfer.model.native import DTYPES, FIXED_SUM, Answer, Expected, Matrix, Request, kernels
from splitinfer.model.quantize import Packed, format_of
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline, perf_counter

__all__ = [
    "Arriving",
    "ExpertBank",
    "Experts",
    "LocalExperts",
    "Outgoing",
    "Prepare",
    "Preparing",
    "Where",
    "expert_ids",
]

T = TypeVar("T")

_at, _of = ctypes.addressof, ctypes.c_char.from_buffer  # `address_of`, without a Python function


Where: TypeAlias = Literal["here", "near", "away"]


class Arriving(Protocol):
    """What `Experts.dispatch` may return besides: a sum whose one answer is announced by `file`, a descriptor
    that can be read then (-1: none is). `look` takes it if it is there; True where looking is over."""

    file: int

    def look(self) -> bool: ...


class Outgoing(Protocol):
    """A layer's expert calls before there are any rows: messages that lie ready for the kernels, which write
    rows and chosen experts into `requests` and send them on within the call that computed these."""

    requests: Array[Request]

    def expected(self) -> Array[Expected] | None:
        """After they went: the answers, where whoever waits may read them himself; None where `post` has to
        come."""
        ...

    @property
    def patience(self) -> int:
        """For how many nanoseconds at most waiting for them like that is worth it."""
        ...

    def missed(self) -> None:
        """They did not come in the time that patience has."""
        ...

    def answered(self, start: float, timeline: Timeline | None) -> float:
        """They came as expected, so that there is nothing to `post`; what was waited for from `start` on goes
        to `timeline`. Returns when that was over."""
        ...

    def post(
        self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, timeline: Timeline | None = None
    ) -> Awaitable[Tensor]:
        """The same was written into the requests: what `Experts.dispatch` would have returned for it, with
        whatever was read for `expected`."""
        ...


class Preparing(Protocol):
    """What `Experts` may have besides."""

    def outgoing(self, layer: int, x: Tensor, k: int) -> Outgoing | None:
        """The calls for rows like x [rows, H], each with k experts. `post`, or nothing, has to come before
        anything is awaited. None where they have to be dispatched."""
        ...


Prepare: TypeAlias = Callable[[int, Tensor, int], Outgoing | None]  # `Preparing.outgoing`


class Experts(Protocol):
    """What the model asks of its experts, wherever they are."""

    def where(self, layer: int) -> Where:
        """Where a layer's experts compute: "here" within `dispatch`, "near" in another process of this
        machine, or "away". Unless they are here, other work may begin before `dispatch`."""
        ...

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        """Starts the layer's experts on x [rows, H] now; awaiting gives their weighted sum [rows, H]. All
        tensors are on the CPU.

        `top_k_index` [rows, K] int16, `top_k_weights` [rows, K] float32. The sum has x's dtype. What the
        caller waits for goes to `timeline` as "experts" and "network".
        """
        ...


class _TorchExpert:
    """One expert by PyTorch's products. Reference: transformers' `Gemma4TextExperts`."""

    def __init__(self, gate_up_proj: Packed, down_proj: Packed) -> None:
        self.gate_up_proj = Linear(gate_up_proj)  # [2*I, H]
        self.down_proj = Linear(down_proj)  # [H, I]

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, H] to [rows, H], without the router's weight."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate, approximate="tanh").mul_(up))


class _Layer:
    """One layer's experts, by id, as the kernels take them: two tables with holes where nothing is held."""

    def __init__(self, experts: dict[int, tuple[Packed, Packed]], num_experts: int) -> None:
        self.packed = experts
        self.gate_up = (Matrix * num_experts)()
        self.down = (Matrix * num_experts)()
        for expert, (gate_up, down) in experts.items():
            self.gate_up[expert] = matrix_of(gate_up)
            self.down[expert] = matrix_of(down)
        self.products: dict[int, _TorchExpert] = {}

    @property
    def nbytes(self) -> int:
        return sum(gate_up.nbytes + down.nbytes for gate_up, down in self.packed.values())


class ExpertBank:
    """Some experts of some layers. Weights that keep their stored form are mapped, not read: only their own
    pages become resident, on first use. Others are converted here, expert by expert.

    `holding` maps a layer to the ids of its experts held. `format` is one of `quantize.FORMATS`; None keeps
    the checkpoint's own, or bfloat16 if that is `dtype`. Activations keep the dtype they come in. `columns`
    holds that slice of every expert's intermediate dimension only: sums over banks are sums over experts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        holding: Mapping[int, Sequence[int]],
        *,
        dtype: torch.dtype | None = None,
        format: str | None = None,
        columns: tuple[int, int] | None = None,
    ) -> None:
        self.hidden_size = checkpoint.config.hidden_size
        self._kernels = kernels()
        self._layers: dict[int, _Layer] = {}
        formats = set()
        for layer, ids in holding.items():
            held: dict[int, tuple[Packed, Packed]] = {}
            for lo, hi in _runs(ids):
                found = checkpoint.experts(layer, lo, hi, format, floating=format_of(dtype), columns=columns)
                held.update(zip(range(lo, hi), found, strict=True))
            formats |= {packed.format for pair in held.values() for packed in pair}
            self._layers[layer] = _Layer(held, checkpoint.config.num_experts)
        self.weight_format = "+".join(sorted(formats))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held: what this bank makes resident once every expert was used."""
        return sum(layer.nbytes for layer in self._layers.values())

    @property
    def sends(self) -> bool:
        """Whether `forward_bytes` sends answers: with the kernels."""
        return self._kernels is not None

    def forward(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Weighted sum [rows, H] over the experts held, of x [rows, H].

        `top_k_index` [rows, K] of any integer dtype, -1 for an expert held elsewhere; `top_k_weights`
        [rows, K]. Sums in float32 by ascending expert and rounds once, to `out_dtype` (default: x's); for
        int64 the sums are in fixed point, of which those over several banks add up exactly. Raises
        PlacementError for an expert that is not held, SplitinferError where fixed point does not reach.
        """
        out_dtype = out_dtype or x.dtype
        held = self._layers.get(layer)
        if held is None:
            raise PlacementError(f"layer {layer} is not held here")
        if not x.shape[0]:
            return x.to(out_dtype)
        if self._kernels is None or not {x.dtype, out_dtype} <= {*DTYPES, FIXED}:
            forward = self._forward_fixed if out_dtype is FIXED else self._forward
            return forward(held, layer, x, top_k_index, top_k_weights).to(out_dtype)
        try:
            return self._kernels.experts(
                held.gate_up,
                held.down,
                x.contiguous(),
                expert_ids(top_k_index, layer),
                top_k_weights.to(torch.float32).contiguous(),
                torch.empty(x.shape, dtype=out_dtype),
            )
        except (KeyError, OverflowError) as error:
            raise _refusal(error, layer) from None

    def forward_bytes(
        self,
        layer: int,
        x: memoryview,
        top_k_index: memoryview,
        top_k_weights: memoryview,
        places: tuple[int, ...],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        out: bytearray | memoryview,
        answer: Answer | None = None,
    ) -> None:
        """`forward` of x's bytes in `dtype`, to the sums' bytes in `out_dtype`, into `out`. `places` is
        [rows, K], the shape of the index, int16, and of the weights, float32.

        For one decoded row, tensors of what came off the wire would cost as much as a small expert. The
        memory given is writable, and aligned for its dtypes. An `answer`, in whose frame `out` lies, goes on
        its way at once, if `sends`.
        """
        rows, k = places
        held = self._layers.get(layer)
        if held is None or self._kernels is None or not top_k_index.nbytes:
            tensors = (torch.frombuffer(x, dtype=dtype) if x.nbytes else torch.empty(0, dtype=dtype)).view(
                rows, self.hidden_size
            )
            index = torch.from_numpy(np.ndarray(places, np.int16, top_k_index))
            weights = torch.from_numpy(np.ndarray(places, np.float32, top_k_weights))
            sums = self.forward(layer, tensors, index, weights, out_dtype)
            out[:] = sums.contiguous().view(torch.uint8).numpy().tobytes()
            return
        kind = FIXED_SUM if out_dtype is FIXED else int(out_dtype is torch.bfloat16)
        try:
            self._kernels.experts_at(
                held.gate_up, held.down, _at(_of(x)), dtype is torch.bfloat16, rows, _at(_of(top_k_index)),
                _at(_of(top_k_weights)), k, _at(_of(out)), kind, answer,
            )  # fmt: skip
        except (KeyError, OverflowError) as error:
            raise _refusal(error, layer) from None

    def _forward(
        self, held: _Layer, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The same by PyTorch's products, float32."""
        total = torch.zeros(x.shape, dtype=torch.float32)
        flat_weights = top_k_weights.to(torch.float32).flatten()
        k = top_k_index.shape[-1]
        for expert, places in sorted(_by_expert(top_k_index).items()):
            product = held.products.get(expert)
            if product is None:
                if expert not in held.packed:
                    raise _not_held(expert, layer)
                product = held.products[expert] = _TorchExpert(*held.packed[expert])
            place = torch.tensor(places)
            rows = place // k
            part = product(x[rows]).float().mul_(flat_weights[place].unsqueeze(-1))
            total.index_add_(0, rows, part)
        return total

    def _forward_fixed(
        self, held: _Layer, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The same in fixed point."""
        total, k = torch.zeros(x.shape, dtype=FIXED), top_k_index.shape[-1]
        flat_weights = top_k_weights.to(torch.float32).flatten()
        for expert, places in _by_expert(top_k_index).items():
            if expert not in held.packed:
                raise _not_held(expert, layer)
            place = torch.tensor(places)
            rows = place // k
            part = expert_in_fixed_point(*held.packed[expert], x[rows], flat_weights[place])
            total.index_add_(0, rows, part)
        return total


class LocalExperts:
    """Experts over a bank that holds all of them. With `exact` they are added as nodes would do it then."""

    def __init__(self, bank: ExpertBank, *, exact: bool = False) -> None:
        self.bank = bank
        self._exact = exact

    def where(self, layer: int) -> Where:
        return "here"

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        if not runs_inline(x.shape[0], self._forward):
            return submit(self._forward, layer, x, top_k_index, top_k_weights, timeline)
        return _Ready(run(self._forward, layer, x, top_k_index, top_k_weights, timeline))

    def _forward(
        self, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, timeline: Timeline | None
    ) -> Tensor:
        start = perf_counter()
        routed = self.bank.forward(layer, x, top_k_index, top_k_weights, FIXED if self._exact else None)
        if self._exact:
            routed = from_fixed(routed, x.dtype)
        if timeline is not None:
            timeline.add("experts", layer, start, perf_counter())
        return routed


class _Ready(Generic[T]):
    """A value that is awaited without a turn of the event loop."""

    __slots__ = ("value",)

    def __init__(self, value: T) -> None:
        self.value = value

    def __await__(self) -> Generator[None, None, T]:
        return self.value
        yield


def _refusal(error: KeyError | OverflowError, layer: int) -> SplitinferError:
    """What the kernels say, as it is said elsewhere."""
    return _not_held(int(error.args[0]), layer) if isinstance(error, KeyError) else out_of_range()


def _not_held(expert: int, layer: int) -> PlacementError:
    return PlacementError(f"expert {expert} of layer {layer} is not held here")


def expert_ids(top_k_index: Tensor, layer: int) -> Tensor:
    """`top_k_index` as the kernels and the wire have it: int16, contiguous. Raises PlacementError for ids
    that have no room in it, which nobody holds."""
    if top_k_index.dtype is not torch.int16:
        given, top_k_index = top_k_index, top_k_index.to(torch.int16)
        for wrong in given[given != top_k_index].tolist()[:1]:
            raise _not_held(wrong, layer)
    return top_k_index if top_k_index.is_contiguous() else top_k_index.contiguous()


def _by_expert(top_k_index: Tensor) -> dict[int, list[int]]:
    """Expert id to the places (row * K + k) that chose it; -1 is nobody's here."""
    chosen: dict[int, list[int]] = {}
    for place, expert in enumerate(top_k_index.flatten().tolist()):
        if expert != -1:
            chosen.setdefault(expert, []).append(place)
    return chosen


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending ids as half-open runs: (3, 4, 5, 9) to [(3, 6), (9, 10)]."""
    runs: list[tuple[int, int]] = []
    for i in sorted(set(ids)):
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
