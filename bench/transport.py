"""What a call costs: ours against the bare socket and against the usual ways, in one run with the same
payloads.

    python bench/transport.py                     everything, about two minutes
    python bench/transport.py --quick             a fifth of the calls
    python bench/transport.py --peers raw,tcp     some of them
    python bench/transport.py --cores any         cores as the scheduler likes

Three loads: one row of 5,632 bytes there and back, a tensor of 16 MiB there, and 64 rows in flight. Client
and server are two processes. Each has half of the cores to itself, as two machines would: left alone, some
schedulers put two blocking processes on one core, where they need no wake-up, and in the next run apart. The
peers take turns in short rounds, and the figures are medians of the rounds' own medians and ratios: what
disturbs less than half of the rounds, or all peers alike, does not show. p99 is over all calls; the first
round only warms up. What a bench on loopback leaves out is the link: see
`splitinfer bench --rtt`.

Needs the `bench` extra. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cores import halves
from transport_peers import BULK_NBYTES, PEERS, ROW_NBYTES
from transport_processes import run_client, run_server

WAIT_SECONDS: Final = 60.0
# Per round: rows, tensors, rounds of 64 rows.
LOAD: Final = {"row": 250, "bulk": 6, "flight": 8}


@dataclass
class Runner:
    """The two processes of one peer, and what was measured so far, round by round."""

    name: str
    server: BaseProcess
    client: BaseProcess
    pipe: Connection
    rows: list[list[float]] = field(default_factory=list)
    bulks: list[list[float]] = field(default_factory=list)
    flights: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, cores: tuple[set[int], set[int]]) -> Runner:
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        server = spawn.Process(target=run_server, args=(name, there, cores[0]), daemon=True)
        server.start()
        address = receive(here, name, server)
        here, there = spawn.Pipe()
        client = spawn.Process(target=run_client, args=(name, address, there, cores[1]), daemon=True)
        client.start()
        return cls(name, server, client, here)

    def measure(self, what: str, count: int) -> Any:
        self.pipe.send((what, count))
        return receive(self.pipe, self.name, self.client)

    def stop(self) -> None:
        self.pipe.send(None)
        self.client.join(5)
        for process in (self.client, self.server):
            process.terminate()
            process.join(5)


def receive(pipe: Connection, name: str, process: BaseProcess) -> Any:
    """What the process has to say; ends the run where it died or is silent."""
    try:
        if pipe.poll(WAIT_SECONDS):
            return pipe.recv()
    except EOFError:
        pass
    state = "is silent" if process.is_alive() else f"died with {process.exitcode}"
    raise SystemExit(f"error: {name}: its process {state}")


def run(names: Sequence[str], rounds: int, share: float, apart: bool, console: Console) -> list[Runner]:
    """Measure all peers in turns. The first of `rounds` + 1 rounds is not counted."""
    cores = halves(apart)
    runners = [Runner.start(name, cores) for name in names]
    load = {what: max(int(count * share), 1) for what, count in LOAD.items()}
    try:
        # Drawn between measurements only: a thread that draws takes the core from one of the peers.
        with Progress(console=console, transient=True, auto_refresh=False) as progress:
            bar = progress.add_task("measuring", total=(rounds + 1) * len(runners))
            for turn in range(rounds + 1):
                for runner in runners:
                    progress.update(bar, description=PEERS[runner.name].name, advance=1, refresh=True)
                    taken = {what: runner.measure(what, count) for what, count in load.items()}
                    if turn:
                        runner.rows.append(taken["row"])
                        runner.bulks.append(taken["bulk"])
                        runner.flights.append(taken["flight"])
    finally:
        for runner in runners:
            runner.stop()
    return runners


def p50(rounds: Sequence[Sequence[float]]) -> float:
    return median(median(values) for values in rounds)


def p99(rounds: Sequence[Sequence[float]]) -> float:
    values = sorted(value for values in rounds for value in values)
    return values[min(int(len(values) * 0.99), len(values) - 1)]


def times(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """How many times as long as `theirs` `ours` take."""
    return median(median(one) / median(other) for one, other in zip(ours, theirs, strict=True))


def summarise(runners: Sequence[Runner]) -> list[dict[str, Any]]:
    """One record per peer; ratios are to the raw socket of the same run, above 1 where the peer is faster."""
    records: list[dict[str, Any]] = [
        {
            "peer": runner.name,
            "row_p50_us": p50(runner.rows) * 1e6,
            "row_p99_us": p99(runner.rows) * 1e6,
            "bulk_p50_gb_s": BULK_NBYTES / p50(runner.bulks) / 1e9,
            "bulk_p99_gb_s": BULK_NBYTES / p99(runner.bulks) / 1e9,
            "in_flight_calls_s": median(runner.flights),
        }
        for runner in runners
    ]
    peers = {runner.name: runner for runner in runners}
    for record, runner in zip(records, runners, strict=True):
        if raw := peers.get("raw"):
            record["row_times_raw"] = times(runner.rows, raw.rows)
            record["bulk_share_of_raw"] = times(raw.bulks, runner.bulks)
        if ours := peers.get("tcp"):
            record["row_times_ours"] = times(runner.rows, ours.rows)
    return records


def table_of(records: Sequence[dict[str, Any]], rounds: int) -> Table:
    table = Table(
        title=f"one row of {ROW_NBYTES:,} bytes each way; 16 MiB one way; 64 rows in flight; {rounds} rounds"
    )
    table.add_column("")
    for heading in (
        "row p50 µs",
        "p99 µs",
        "× raw",
        "× ours",
        "16 MiB GB/s",
        "p99 slowest",
        "of raw",
        "64: calls/s",
    ):
        table.add_column(heading, justify="right")
    for record in records:
        table.add_row(
            PEERS[record["peer"]].name,
            f"{record['row_p50_us']:.1f}",
            f"{record['row_p99_us']:.1f}",
            f"{record['row_times_raw']:.2f}" if "row_times_raw" in record else "",
            f"{record['row_times_ours']:.2f}" if "row_times_ours" in record else "",
            f"{record['bulk_p50_gb_s']:.2f}",
            f"{record['bulk_p99_gb_s']:.2f}",
            f"{record['bulk_share_of_raw']:.2f}" if "bulk_share_of_raw" in record else "",
            f"{record['in_flight_calls_s']:,.0f}",
        )
    return table


def congestion_control() -> str:
    """The system's own for TCP, empty where it does not say."""
    with socket.socket() as one:
        if not hasattr(socket, "TCP_CONGESTION"):
            return ""
        return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=16, help="rounds that count (default 16)")
    parser.add_argument("--quick", action="store_true", help="a fifth of the calls")
    parser.add_argument("--cores", choices=("apart", "any"), default="apart")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(PEERS)}")
    arguments = parser.parse_args()
    names = arguments.peers.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    console = Console(stderr=True)
    share, apart = 0.2 if arguments.quick else 1.0, arguments.cores == "apart"
    records = summarise(run(names, arguments.rounds, share, apart, console))
    Console(width=None if sys.stdout.isatty() else 132).print(table_of(records, arguments.rounds))
    machine = {"cores": os.cpu_count(), "used": arguments.cores}
    machine |= {"python": platform.python_version(), "system": platform.system()}
    machine |= {"congestion_control": congestion_control()}
    print(
        json.dumps({"bench": "transport", "machine": machine, "rounds": arguments.rounds, "peers": records})
    )


if __name__ == "__main__":
    main()
