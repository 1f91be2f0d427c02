"""What this machine does in a second, measured in a few: reading memory, products by format, the work around
them. The basis of `splitinfer plan`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from splitinfer.cli.calibration import Effort, calibrate_client
from splitinfer.planning.hardware import Rate

if TYPE_CHECKING:
    from splitinfer.model.quantize import Packed

__all__ = ["EFFORT", "READ_NBYTES", "Overheads", "measure_overheads", "measure_rates", "measure_read"]

EFFORT = Effort(steps=12, calls=40, pings=20, tokens=24)
READ_NBYTES = 256 << 20  # far beyond any cache
HIDDEN = 2816  # columns of the matrices that are timed: those of Gemma 4 26B-A4B
REPEATS = 5
FEW, MANY = 1, 4  # rows


@dataclass(frozen=True)
class Overheads:
    """Seconds that a layer, a step and a token cost however small the model is."""

    layer: float
    step: float
    token: float


def measure_read() -> float:
    """Bytes per second that this machine's cores read from memory together."""
    import torch

    memory = torch.ones(READ_NBYTES // 4, dtype=torch.float32)
    return READ_NBYTES / min(_seconds(memory.sum) for _ in range(REPEATS))


def measure_rates(formats: Iterable[str]) -> dict[str, Rate]:
    """How fast products stream weights of each format."""
    import torch

    from splitinfer.model.linear import Linear

    rates = {}
    for format in sorted(set(formats)):
        matrix = _matrix(format)
        product = Linear(matrix)
        dtype = torch.float32 if format == "float32" else torch.bfloat16
        seconds = {}
        for rows in (FEW, MANY):
            x = torch.ones((rows, HIDDEN), dtype=dtype)
            with torch.inference_mode():
                product(x)
                seconds[rows] = median(_seconds(lambda: product(x)) for _ in range(REPEATS))  # noqa: B023
        slope = (seconds[MANY] - seconds[FEW]) / (MANY - FEW)
        rates[format] = Rate(matrix.nbytes / seconds[FEW], max(0.0, slope / seconds[FEW]))
    return rates


def _matrix(format: str) -> Packed:
    """A matrix of about READ_NBYTES in that format. What it holds does not matter, but that it is in
    memory."""
    import torch

    from splitinfer.model.quantize import BLOCK, Packed, packed_nbytes, packed_shapes

    rows = READ_NBYTES // packed_nbytes(format, BLOCK, HIDDEN) * BLOCK
    parts = {
        name: torch.ones(shape, dtype=dtype)
        for name, (dtype, shape) in packed_shapes(format, rows, HIDDEN).items()
    }
    group = HIDDEN if format == "int8" else 0
    return Packed(format, rows, HIDDEN, group, parts["weight"], parts.get("scales"))


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


async def measure_overheads() -> Overheads:
    """From the demo model, whose weights are small enough to cost nothing."""
    from splitinfer import demo
    from splitinfer.engine import AsyncEngine

    async with AsyncEngine(demo.path(), draft="off") as engine:
        client = await calibrate_client(engine, None, EFFORT)
    return Overheads(client.attention.at(1) + client.dense.at(1), client.step.at(1), client.token.at(1))
