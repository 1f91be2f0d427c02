"""What nodes have to agree on for `--exact`: the same bits from every one of them, whatever part it holds."""

from __future__ import annotations

from splitinfer.errors import PlacementError
from splitinfer.placement import SLICE_STEP, Placement

__all__ = ["check_exact"]


def check_exact(placement: Placement, arithmetic: str) -> None:
    """Raises PlacementError, naming the nodes, where an expert's bits would depend on the node that is asked.

    `arithmetic` is how this machine rounds (`model.native.arithmetic`).
    """
    nodes = list(zip(placement.addresses, placement.holdings, strict=True))
    other = [f"{address} ({h.arithmetic or 'unknown'})" for address, h in nodes if h.arithmetic != arithmetic]
    if other:
        raise PlacementError(
            f"--exact: not every machine rounds alike: here {arithmetic}, {', '.join(other)}",
            remedy="Use machines with the same vector instructions and version of splitinfer, "
            "or run without --exact.",
        )
    spans = zip(placement.addresses, placement.spans, strict=True)
    uneven = [
        f"{address} (columns {low}-{high - 1})"
        for address, (low, high) in spans
        if low % SLICE_STEP or (high % SLICE_STEP and high != placement.columns)
    ]
    if uneven:
        raise PlacementError(
            f"--exact: slices have to end at multiples of {SLICE_STEP} columns: {', '.join(uneven)}",
            remedy="Cut this model by experts or layers, or run without --exact.",
        )
