"""A client and its nodes as separate processes on this machine: tokens/s, bytes per token, memory of each.

    python bench/make_checkpoint.py --layers 6 /path/to/model       # random weights, true shapes
    python bench/split.py /path/to/model --nodes 2
    python bench/random_shard.py --layers 6 /path/to/shard          # the same in int4
    python bench/split.py /path/to/shard --nodes 1

Rounds are short and alternate between the split run and the same model with its experts in this process,
before and after it: each gives a ratio of neighbours in time. Their median and quartiles count, as a
machine's speed moves by more within seconds than the two differ. What it leaves out: a real network; all
of it crosses loopback, on shared cores. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see splitinfer.cli.console

import psutil
from rich.console import Console
from rich.table import Table

import splitinfer
from splitinfer.cli.processes import node_process
from splitinfer.model.config import load_config
from splitinfer.placement import format_ranges


def resident(pid: int) -> float:
    """Resident memory of a process, GiB."""
    return psutil.Process(pid).memory_info().rss / 2**30


def measure(engine: splitinfer.Engine, tokens: int) -> splitinfer.Completion:
    return engine.generate([2, *range(1000, 1031)], max_tokens=tokens, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=12, help="of each round")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=None, help="of each process (default: chosen)")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("quartiles need at least 2 rounds")
    count = load_config(arguments.model).num_experts
    shares = [
        range(n * count // arguments.nodes, (n + 1) * count // arguments.nodes)
        for n in range(arguments.nodes)
    ]
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    with ExitStack() as stack:
        addresses = [
            stack.enter_context(
                node_process([str(arguments.model), "--experts", format_ranges(share), *threads])
            )
            for share in shares
        ]
        nodes = psutil.Process().children()
        split = stack.enter_context(
            splitinfer.load(arguments.model, nodes=addresses, threads=arguments.threads, draft="off")
        )
        measure(split, arguments.tokens)  # reads the weights once
        memory = {"client": resident(os.getpid())}
        memory |= {f"node {n}": resident(process.pid) for n, process in enumerate(nodes)}
        here = stack.enter_context(splitinfer.load(arguments.model, threads=arguments.threads, draft="off"))
        measure(here, arguments.tokens)
        runs, alone = [], [measure(here, arguments.tokens)]
        for _ in range(arguments.rounds):
            runs.append(measure(split, arguments.tokens))
            alone.append(measure(here, arguments.tokens))
    report(arguments, runs, alone, memory)


def report(
    arguments: argparse.Namespace,
    runs: list[splitinfer.Completion],
    alone: list[splitinfer.Completion],
    memory: dict[str, float],
) -> None:
    rates, beside = ([r.timings.decode_tokens_per_second for r in each] for each in (runs, alone))
    ratios = [rate / statistics.mean(around) for rate, around in zip(rates, pairwise(beside), strict=True)]
    steps = runs[0].usage.prompt_tokens + runs[0].usage.completion_tokens - 1
    figures = {
        "layers": load_config(arguments.model).num_hidden_layers,
        "nodes": arguments.nodes,
        "tokens_per_second_split": statistics.median(rates),
        "tokens_per_second_here": statistics.median(beside),
        "split_to_here_quartiles": [
            round(q, 3) for q in statistics.quantiles(ratios, n=4, method="inclusive")
        ],
        "bytes_sent_per_token": runs[0].usage.bytes_sent / steps,
        "bytes_received_per_token": runs[0].usage.bytes_received / steps,
        "same_tokens": sum(a == b for a, b in zip(runs[0].token_ids, alone[0].token_ids, strict=True)),
        "tokens": arguments.tokens,
        "resident_gib": {name: round(gib, 2) for name, gib in memory.items()},
    }
    table = Table("figure", "value", title=f"{arguments.model.name}: {figures['layers']} layers")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else str(value))
    Console(stderr=True).print(table)
    json.dump(figures, sys.stdout)
    print()


if __name__ == "__main__":
    main()
