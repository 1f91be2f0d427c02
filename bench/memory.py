"""Memory of a whole model at its true size: a client and two nodes with half of the experts each, int4.

    python bench/memory.py DIR             30 layers, 8,192 tokens: 17 GB under DIR, 24 GiB of memory
    python bench/memory.py DIR --layers 6 --context 2048

Shards with random weights are written under DIR once and left there. Then, every one a process of its own:

1. a node on a shard that is not in the page cache: seconds until it listens, seconds until every expert was
   used once, resident size then;
2. a second node on the same shard: what the two share (Pss counts shared pages once);
3. a client and both nodes, after a prompt and an answer that fill the context: resident size and its peak.

Beside each stands what `--estimate` says beforehand. Speeds are not measured here. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter

import psutil
import torch
from rich.console import Console
from rich.table import Table

import splitinfer
from splitinfer import transport
from splitinfer.cli.console import prepare_threads
from splitinfer.cli.processes import node_process
from splitinfer.model.footprint import PROGRAM_NBYTES, Sizes, working_nbytes
from splitinfer.model.weights import Checkpoint
from splitinfer.placement import Holding

HALVES = ("0-63", "64-127")
DECODED = 32  # tokens of the answer
TIMEOUT = 7200.0  # seconds for the client's long prompt
Figures = dict[str, float]


def shards(directory: Path, layers: int) -> tuple[Path, list[Path]]:
    """The client's shard and the nodes', written if they are not there."""
    from random_shard import write

    client = directory / f"{layers}-layers-client"
    halves = [directory / f"{layers}-layers-experts-{half}" for half in HALVES]
    write(client, layers, client=True)
    for path, half in zip(halves, HALVES, strict=True):
        write(path, layers, experts=half)
    return client, halves


def nbytes(shard: Path) -> int:
    return sum(file.stat().st_size for file in shard.glob("*.safetensors"))


def forget(shard: Path) -> None:
    """Drops the shard's pages from the page cache, as far as nobody maps them."""
    for file in shard.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(pid: int) -> Figures:
    """Resident bytes of a process, and its share of them where pages are others' too."""
    full = psutil.Process(pid).memory_full_info()
    return {"rss": full.rss, "pss": full.pss}


@contextmanager
def node(shard: Path) -> Iterator[tuple[str, int]]:
    """A node: its address and process id."""
    before = {child.pid for child in psutil.Process().children()}
    with node_process([str(shard)]) as address:
        (pid,) = {child.pid for child in psutil.Process().children()} - before
        yield address, pid


async def use_every_expert(address: str) -> None:
    """One row for every eight experts, layer by layer: all of the node's weights are read."""
    channel = await transport.connect(address, config=transport.ClientConfig(call_timeout=TIMEOUT))
    try:
        holding = Holding.from_info(channel.info, address)
        index = torch.tensor(holding.experts, dtype=torch.int16).view(-1, 8)
        x, weights = torch.zeros(len(index), 2816, dtype=torch.bfloat16), torch.ones(index.shape)
        for layer in holding.layers:
            await channel.call("experts", [x, index, weights], {"layer": layer, "out": "bfloat16"})
    finally:
        await channel.close()


def alone(shard: Path) -> Figures:
    """A node from a cold page cache."""
    forget(shard)
    start = perf_counter()
    with node(shard) as (address, pid):
        ready = perf_counter() - start
        asyncio.run(use_every_expert(address))
        return {"ready": ready, "pass": perf_counter() - start - ready, **memory(pid)}


def together(shard: Path) -> list[Figures]:
    """Two nodes on one shard."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(shard)) for _ in range(2)]
        for address, _ in nodes:
            asyncio.run(use_every_expert(address))
        return [memory(pid) for _, pid in nodes]


def whole(client: Path, halves: list[Path], context: int) -> tuple[Figures, list[Figures]]:
    """The client and both nodes after a full context."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(node(half)) for half in halves]
        command = [sys.executable, __file__, str(client), "--context", str(context)]
        command += ["--nodes", ",".join(address for address, _ in nodes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT)
        return json.loads(done.stdout.splitlines()[-1]), [memory(pid) for _, pid in nodes]


def run_client(arguments: argparse.Namespace) -> Figures:
    """In a process of its own: fills the context, by a prompt for the most part."""
    with splitinfer.load(
        arguments.directory,
        nodes=arguments.nodes.split(","),
        context=arguments.context,
        draft="off",
        timeout=TIMEOUT,
    ) as engine:
        prompt = [2 + (7 * i) % 1000 for i in range(arguments.context - DECODED)]
        engine.generate(prompt, max_tokens=DECODED, ignore_eos=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {**memory(os.getpid()), "peak": peak}


def report(arguments: argparse.Namespace, records: dict[str, Figures]) -> None:
    table = Table("process", "resident", "share (Pss)", "peak", "estimate", "shard")
    table.title = f"{arguments.layers} layers, {arguments.context} tokens of context, GiB"
    for name, record in records.items():
        columns = (record.get(key) for key in ("rss", "pss", "peak", "estimate", "shard"))
        table.add_row(name, *("" if value is None else f"{value / 2**30:.2f}" for value in columns))
    Console(stderr=True).print(table)
    lone = records["node, alone"]
    print(f"ready after {lone['ready']:.1f} s, all read after {lone['pass']:.1f} s more", file=sys.stderr)
    json.dump({"layers": arguments.layers, "context": arguments.context, "processes": records}, sys.stdout)
    print()


def main() -> None:
    prepare_threads()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--nodes", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.nodes:
        print(json.dumps(run_client(arguments)))
        return
    client, halves = shards(arguments.directory, arguments.layers)
    lone = alone(halves[0])
    pair = together(halves[0])
    here, nodes = whole(client, halves, arguments.context)
    half = PROGRAM_NBYTES + Sizes.of(Checkpoint.open(halves[0])).experts(range(arguments.layers), 64)
    model = Checkpoint.open(client)
    total = Sizes.of(model).client(arguments.context).total
    total += working_nbytes(model.config, arguments.context)
    sized = {"shard": nbytes(halves[0]), "estimate": half}
    records = {"node, alone": lone | sized}
    records |= {f"one of two on a shard, {i}": figures | sized for i, figures in enumerate(pair)}
    records |= {f"node, experts {name}": f | sized for name, f in zip(HALVES, nodes, strict=True)}
    records["client"] = here | {"shard": nbytes(client), "estimate": total}
    report(arguments, records)


if __name__ == "__main__":
    main()
