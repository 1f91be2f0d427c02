"""What a link to a node carries: echoes of one row, of a large tensor, and of many rows at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from splitinfer.cli.console import human_size
from splitinfer.cli.rtt import percentile

if TYPE_CHECKING:
    from rich.table import Table

    from splitinfer.transport import Channel

__all__ = ["IN_FLIGHT", "LARGE_NBYTES", "ROW_NBYTES", "LoadFigures", "measure_transport", "table_of"]

ROW_NBYTES: Final = 5632  # a row of Gemma 4 26B-A4B in bfloat16
LARGE_NBYTES: Final = 16 << 20
IN_FLIGHT: Final = 64

_AT_LEAST: Final = 10
_AT_MOST: Final = 5000
_WARM_UP: Final = 3


@dataclass(frozen=True)
class LoadFigures:
    """Round trips of one load: `seconds` each, `nbytes` each way, so many at a time."""

    load: str
    nbytes: int
    in_flight: int
    seconds: tuple[float, ...]
    elapsed: float

    @property
    def calls_per_second(self) -> float:
        return len(self.seconds) / self.elapsed

    @property
    def bytes_per_second(self) -> float:
        """Both ways together."""
        return 2 * self.nbytes * self.calls_per_second

    def to_json(self) -> dict[str, Any]:
        return {
            "load": self.load,
            "nbytes": self.nbytes,
            "in_flight": self.in_flight,
            "calls": len(self.seconds),
            "round_trip_ms": {f"p{p}": percentile(self.seconds, p) * 1e3 for p in (50, 90, 99)},
            "calls_per_second": self.calls_per_second,
            "bytes_per_second": self.bytes_per_second,
        }


async def measure_transport(channel: Channel, *, seconds: float, timeout: float) -> list[LoadFigures]:
    """Measure each load for about so long. `timeout` is the deadline of one call. Times in seconds.

    The node has to answer "echo"; its own arithmetic plays no part.
    """
    import numpy as np

    from splitinfer.node import ECHO_CALL

    async def ping() -> None:
        await channel.ping(timeout=timeout)

    def echo(nbytes: int) -> Callable[[], Awaitable[Any]]:
        # Noise: what compresses would say nothing of the link.
        tensor = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        return lambda: channel.call(ECHO_CALL, [tensor], timeout=timeout)

    return [
        await _measure("ping", 0, 1, ping, seconds),
        await _measure("one row", ROW_NBYTES, 1, echo(ROW_NBYTES), seconds),
        await _measure("16 MiB", LARGE_NBYTES, 1, echo(LARGE_NBYTES), seconds),
        await _measure(f"{IN_FLIGHT} rows at a time", ROW_NBYTES, IN_FLIGHT, echo(ROW_NBYTES), seconds),
    ]


def table_of(title: str, figures: Sequence[LoadFigures]) -> Table:
    """One line for each load."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("there and back")
    for heading in ("p50 ms", "p90 ms", "p99 ms", "calls/s", "both ways"):
        table.add_column(heading, justify="right")
    for load in figures:
        times = [f"{percentile(load.seconds, p) * 1e3:.3f}" for p in (50, 90, 99)]
        rate = f"{human_size(int(load.bytes_per_second))}/s" if load.nbytes else ""
        table.add_row(load.load, *times, f"{load.calls_per_second:,.0f}", rate)
    return table


async def _measure(
    load: str, nbytes: int, in_flight: int, call: Callable[[], Awaitable[Any]], seconds: float
) -> LoadFigures:
    from asyncio import gather  # not above: `--help` answers without it

    for _ in range(_WARM_UP):
        await call()
    times: list[float] = []
    begun = perf_counter()

    async def caller() -> None:
        while len(times) < _AT_MOST and (len(times) < _AT_LEAST or perf_counter() - begun < seconds):
            start = perf_counter()
            await call()
            times.append(perf_counter() - start)

    await gather(*(caller() for _ in range(in_flight)))
    return LoadFigures(load, nbytes, in_flight, tuple(times), perf_counter() - begun)
