"""Fixed point: sums of the experts' answers that depend neither on their order nor on who adds what.

A value is a whole number of steps of 2^-36 in an int64. Integers add up alike in any order and any grouping,
and wrap around on the way without harm, so only the range of the single parts has to be checked: each is less
than `LARGEST`, and `MAX_PARTS` of them fit. Only the client rounds, once, to what the model computes in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitinfer.errors import SplitinferError, UsageError

__all__ = ["DTYPE", "check_parts", "from_fixed", "out_of_range", "to_fixed"]

DTYPE = torch.int64
STEP_BITS = 36
LARGEST = 2.0**13
MAX_PARTS = 1 << 14


def to_fixed(parts: Tensor) -> Tensor:
    """Each of `parts`, float64, to the nearest step. Raises SplitinferError for NaN and what is too large."""
    if not (parts.abs() < LARGEST).all():
        raise out_of_range()
    return parts.mul(2.0**STEP_BITS).round_().to(DTYPE)


def from_fixed(total: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum, a CPU tensor as not every device has 64 bits, in the model's dtype."""
    return total.to(torch.float64).mul_(2.0**-STEP_BITS).to(dtype)


def out_of_range() -> SplitinferError:
    return SplitinferError(
        f"an expert's answer is not a number, or too large to be added exactly ({LARGEST:.0f} or more)",
        remedy="Run without --exact.",
    )


def check_parts(top_k: int, columns: int) -> None:
    """Raises UsageError for a model whose sums could leave 64 bits: each of its `columns`, the intermediate
    dimension of an expert, may give a part."""
    if top_k * columns > MAX_PARTS:
        raise UsageError(
            f"{top_k} experts of {columns} columns are more than --exact can add up",
            remedy="Run without --exact.",
        )
