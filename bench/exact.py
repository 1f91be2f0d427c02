"""What `--exact` costs: the experts of one layer, true shapes, random weights, plain and in fixed point.

    python bench/exact.py
    python bench/exact.py --formats int4 --rows 1 8 64 --threads 1

Calls alternate, so that both see the same machine; medians. "Bytes" are those that a node sends back for a
row of one layer: to a client that asks one node only, to one that asks several, and in fixed point. It leaves
out the network. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from time import perf_counter

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch

import torch
from random_model import RandomCheckpoint
from rich.console import Console
from rich.table import Table

from splitinfer.fixed_point import DTYPE as FIXED
from splitinfer.model.experts import ExpertBank

OUT = {"plain": torch.float32, "exact": FIXED}


def measure(bank: ExpertBank, hidden: int, rows: int, seconds: float) -> dict[str, float]:
    """Median seconds of a call, plain and exact."""
    generator = torch.Generator().manual_seed(rows)
    times: dict[str, list[float]] = {name: [] for name in OUT}
    x = torch.randn(rows, hidden, generator=generator).bfloat16()
    end = perf_counter() + seconds
    while perf_counter() < end or len(times["exact"]) < 3:
        index = torch.rand(rows, 128, generator=generator).topk(8).indices
        weights = torch.rand(rows, 8, generator=generator)
        for name, dtype in OUT.items():
            start = perf_counter()
            bank.forward(0, x, index, weights, dtype)
            times[name].append(perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "int8", "int4"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 128])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("format", "rows", "plain ms", "exact ms", "ratio", title=f"{arguments.threads} threads")
    records = []
    for format in arguments.formats:
        checkpoint = RandomCheckpoint(1)
        hidden = checkpoint.config.hidden_size
        bank = ExpertBank(checkpoint, {0: range(128)}, format=format)  # type: ignore[arg-type]
        for rows in arguments.rows:
            found = measure(bank, hidden, rows, arguments.seconds)
            records.append({"format": format, "rows": rows, **found})
            plain, exact = found["plain"], found["exact"]
            table.add_row(
                format, str(rows), f"{plain * 1e3:.2f}", f"{exact * 1e3:.2f}", f"{exact / plain:.2f}"
            )
    nbytes = {"one node, bfloat16": 2 * hidden, "several, float32": 4 * hidden, "exact": 8 * hidden}
    console = Console(stderr=True)
    console.print(table)
    console.print("bytes of an answer's row: " + ", ".join(f"{name} {n}" for name, n in nbytes.items()))
    json.dump({"threads": arguments.threads, "row_nbytes": nbytes, "records": records}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
