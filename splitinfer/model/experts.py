"""Experts on this machine: a bank of some of them, and the seam through which the model reaches any of them.

Shape letters: H hidden_size, I moe_intermediate_size, K top_k_experts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Generator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from splitinfer.errors import PlacementError
from splitinfer.model.compute import INLINE_ROWS, submit
from splitinfer.model.dense import linear
from splitinfer.model.weights import Checkpoint
from splitinfer.timing import Timeline, perf_counter

__all__ = ["DenseExpert", "ExpertBank", "ExpertProduct", "Experts", "LocalExperts"]

T = TypeVar("T")


class Experts(Protocol):
    """What the model asks of its experts, wherever they are."""

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        """Starts the layer's experts on x [rows, H] now; awaiting gives their weighted sum [rows, H].

        `top_k_index` [rows, K] int64, `top_k_weights` [rows, K] float32. The sum has x's dtype. What the
        caller waits for goes to `timeline` as "experts" and "network".
        """
        ...


class ExpertProduct(Protocol):
    """One expert in some weight format."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, H] to [rows, H], without the router's weight."""
        ...


class DenseExpert:
    """An expert in the weights' own floating-point format. Reference: transformers' `Gemma4TextExperts`."""

    __slots__ = ("down_proj", "gate_up_proj", "nbytes")

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor) -> None:
        self.gate_up_proj = gate_up_proj  # [2*I, H]
        self.down_proj = down_proj  # [H, I]
        self.nbytes = gate_up_proj.nbytes + down_proj.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return linear(F.gelu(gate, approximate="tanh").mul_(up), self.down_proj)


class ExpertBank:
    """Some experts of some layers, mapped from a checkpoint; only their pages become resident, on first use.

    `holding` maps a layer to the ids of its experts held. `dtype` None keeps the checkpoint's own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        holding: Mapping[int, Sequence[int]],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.dtype = dtype or checkpoint.dtype
        self.hidden_size = checkpoint.config.hidden_size
        self.device = torch.device(device)
        self._layers: dict[int, dict[int, ExpertProduct]] = {}
        for layer, ids in holding.items():
            products: dict[int, ExpertProduct] = {}
            for lo, hi in _runs(ids):
                gate_up, down = (
                    part.to(self.device, self.dtype) for part in checkpoint.expert_slice(layer, lo, hi)
                )
                for i in range(hi - lo):
                    products[lo + i] = DenseExpert(gate_up[i], down[i])
            self._layers[layer] = products

    @property
    def weight_format(self) -> str:
        """The weights' numeric format, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held: what this bank makes resident once every expert was used."""
        return sum(product.nbytes for products in self._layers.values() for product in products.values())

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
        [rows, K]. Sums in float32 by ascending expert and rounds once, to `out_dtype` (default: x's).
        Raises PlacementError for an expert that is not held.
        """
        out_dtype = out_dtype or x.dtype
        products = self._layers.get(layer)
        if products is None:
            raise PlacementError(f"layer {layer} is not held here")
        total: Tensor | None = None
        source = x.to(self.device, self.dtype)
        flat_weights = top_k_weights.to(self.device, torch.float32).flatten()
        k = top_k_index.shape[-1]
        for expert, places in sorted(_by_expert(top_k_index).items()):
            product = products.get(expert)
            if product is None:
                raise PlacementError(f"expert {expert} of layer {layer} is not held here")
            if len(x) == 1:
                part = product(source).float().mul_(flat_weights[places[0]])
                total = part if total is None else total.add_(part)
                continue
            place = torch.tensor(places, device=self.device)
            rows = place // k
            part = product(source[rows]).float().mul_(flat_weights[place].unsqueeze(-1))
            if total is None:
                total = torch.zeros(x.shape, dtype=torch.float32, device=self.device)
            total.index_add_(0, rows, part)
        if total is None:
            return torch.zeros(x.shape, dtype=out_dtype, device=x.device)
        return total.to(x.device, out_dtype)


class LocalExperts:
    """Experts over a bank that holds all of them."""

    def __init__(self, bank: ExpertBank) -> None:
        self.bank = bank

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        if len(x) > INLINE_ROWS:
            return submit(self._forward, layer, x, top_k_index, top_k_weights, timeline)
        with torch.inference_mode():
            return _Ready(self._forward(layer, x, top_k_index, top_k_weights, timeline))

    def _forward(
        self, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, timeline: Timeline | None
    ) -> Tensor:
        start = perf_counter()
        routed = self.bank.forward(layer, x, top_k_index, top_k_weights)
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
