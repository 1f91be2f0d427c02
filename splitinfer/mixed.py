"""Some layers' experts on this machine, the others' on nodes: a local layer costs no round trip at all."""

from __future__ import annotations

from collections.abc import Awaitable

import torch
from torch import Tensor

from splitinfer.errors import UsageError
from splitinfer.model.experts import ExpertBank, Experts, LocalExperts, Outgoing, Where
from splitinfer.model.footprint import Sizes
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.weights import Checkpoint
from splitinfer.placement import parse_ranges, parse_size
from splitinfer.timing import Timeline

__all__ = ["MixedExperts", "chosen_layers", "local_layers"]


class MixedExperts:
    """Experts of `layers` by `local`, of all others by `remote`. Satisfies `model.experts.Experts`."""

    def __init__(self, local: Experts, layers: tuple[int, ...], remote: Experts) -> None:
        self._local = local
        self._layers = frozenset(layers)
        self.remote = remote

    def where(self, layer: int) -> Where:
        return self._of(layer).where(layer)

    def dispatch(
        self,
        layer: int,
        x: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        timeline: Timeline | None = None,
    ) -> Awaitable[Tensor]:
        return self._of(layer).dispatch(layer, x, top_k_index, top_k_weights, timeline)

    def outgoing(self, layer: int, x: Tensor, k: int) -> Outgoing | None:
        prepare = getattr(self._of(layer), "outgoing", None)
        return None if prepare is None else prepare(layer, x, k)

    def _of(self, layer: int) -> Experts:
        return self._local if layer in self._layers else self.remote


def local_layers(
    checkpoint: Checkpoint,
    ranges: str | None,
    memory: str | None,
    dtype: torch.dtype | None,
    format: str | None = None,
    exact: bool = False,
) -> tuple[LocalExperts | None, tuple[int, ...]]:
    """The experts of `chosen_layers`, loaded, and these layers; None where there are none."""
    layers = chosen_layers(checkpoint, ranges, memory, dtype, format)
    if not layers:
        return None, ()
    everything = range(checkpoint.config.num_experts)
    bank = ExpertBank(checkpoint, dict.fromkeys(layers, everything), dtype=dtype, format=format)
    return LocalExperts(bank, exact=exact), layers


def chosen_layers(
    checkpoint: Checkpoint,
    ranges: str | None,
    memory: str | None,
    dtype: torch.dtype | None,
    format: str | None = None,
) -> tuple[int, ...]:
    """The layers whose experts stay here: those in `ranges` ("0-9"), or the first ones that fit into `memory`
    ("6GiB"); whole layers, because a round trip vanishes only when all of a layer's experts are here.

    Raises UsageError for ranges or sizes that cannot be, and where both are given.
    """
    config = checkpoint.config
    if ranges is not None and memory is not None:
        raise UsageError("--local-layers and --local-memory both choose layers", remedy="Give one of them.")
    if not config.enable_moe_block or (ranges is None and memory is None):
        return ()
    if ranges is not None:
        return parse_ranges(ranges, config.num_hidden_layers, "--local-layers")
    room = parse_size(memory or "", "--local-memory")
    one = Sizes.of(checkpoint, quant=QuantConfig(experts=format), dtype=dtype).experts([0])
    layers = tuple(range(min(config.num_hidden_layers, room // one)))
    if not layers:
        raise UsageError(
            f"--local-memory {memory} holds no layer: the experts of one take {one / 2**30:.2f} GiB",
            remedy="Give more memory, or leave it out.",
        )
    return layers
