"""Decoding with the experts in this process, true shapes, random weights: tokens/s and the memory's ceiling.

    python bench/decode.py                                  6 layers, int4 with int8 attention, dense and head
    python bench/decode.py --layers 6 12 30 --rows 1 2 4 8 16
    python bench/decode.py --quant int4 --quant-attention int4 --quant-dense int4 --quant-lm-head int4

The ceiling is the bytes of weights that a token reads over what the leanest product gets from memory, with
the same threads: as much as a plain reading loop of four streams. For several rows (a verify window) it
counts the experts that they touched. Layers beyond --distinct share weights with earlier ones: the same speed
in less memory. What it leaves out: tokenizer, sampling, the network. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch

import torch
from random_model import active_nbytes, load
from rich.console import Console
from rich.table import Table

from splitinfer.model.experts import ExpertBank
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.linear import Linear
from splitinfer.model.quantize import QuantConfig, pack_int8
from splitinfer.timing import Timeline

PHASES = ("attention", "dense", "experts", "combine", "head")


def read_bandwidth() -> float:
    """Bytes per second of the leanest product, int8 times one row, of a matrix far larger than the caches."""
    values = torch.ones(131_072, 2816, dtype=torch.int8)
    product = Linear(pack_int8(values, torch.ones(len(values), 1)))
    x = torch.ones(1, 2816)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        product(x)
        best = max(best, product.nbytes / (time.perf_counter() - start))
    return best


async def measure(model: Gemma, rows: int, steps: int, context: int) -> tuple[float, float, dict[str, float]]:
    """Median and fastest seconds of a step, and the phases' seconds in an average step."""
    generator = torch.Generator().manual_seed(1)
    cache = model.new_cache()
    await model.forward([Segment(torch.randint(0, 1000, (context,), generator=generator), cache)])
    timeline, seconds = Timeline(), []
    for step in range(steps + 3):
        ids = torch.randint(0, 1000, (rows,), generator=generator)
        if step == 3:
            timeline = Timeline()
        start = time.perf_counter()
        hidden = await model.forward([Segment(ids, cache)], timeline=timeline)
        model.logits(hidden, timeline=timeline)
        seconds.append(time.perf_counter() - start)
        cache.truncate(context)
    seconds = seconds[3:]
    totals = timeline.by_phase()
    phases = {phase: totals.get(phase, 0.0) / steps for phase in PHASES}
    return statistics.median(seconds), min(seconds), phases


def touched_nbytes(model: Gemma, bank: ExpertBank, rows: int) -> float:
    """Bytes a step of so many rows reads, if routing is uniform."""
    config = model.config
    one = bank.nbytes / config.num_experts
    distinct = config.num_experts * (1 - (1 - config.top_k_experts / config.num_experts) ** rows)
    return active_nbytes(model, bank) + one * (distinct - config.top_k_experts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[6])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--distinct", type=int, default=6, help="layers with weights of their own")
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--quant", default="int4")
    for part in ("attention", "dense", "embeddings", "lm-head"):
        parser.add_argument(f"--quant-{part}", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quant = QuantConfig.of(
        arguments.quant,
        attention=arguments.quant_attention,
        dense=arguments.quant_dense,
        embeddings=arguments.quant_embeddings,
        lm_head=arguments.quant_lm_head,
    )
    bandwidth = read_bandwidth()
    table = Table("layers", "rows", "ms/step", "tokens/s", "ceiling", "share", *(f"{p} ms" for p in PHASES))
    table.title = f"{arguments.threads} threads, {quant}, memory {bandwidth / 1e9:.1f} GB/s"
    records = []
    for layers in arguments.layers:
        model, bank = load(layers, quant, arguments.distinct, arguments.vocab)
        for rows in arguments.rows:
            rounds = [
                asyncio.run(measure(model, rows, arguments.steps, arguments.context))
                for _ in range(arguments.rounds)
            ]
            seconds, _, phases = sorted(rounds, key=lambda r: r[0])[len(rounds) // 2]
            ceiling = bandwidth * rows / touched_nbytes(model, bank, rows)
            record = {
                "layers": layers,
                "rows": rows,
                "seconds_per_step": seconds,
                "tokens_per_second": rows / seconds,
                "ceiling_tokens_per_second": ceiling,
                "phases": phases,
            }
            records.append(record)
            table.add_row(
                str(layers), str(rows), f"{seconds * 1e3:.1f}", f"{rows / seconds:.1f}", f"{ceiling:.1f}",
                f"{rows / seconds / ceiling:.0%}", *(f"{phases[p] * 1e3:.2f}" for p in PHASES),
            )  # fmt: skip
        del model, bank
    Console(stderr=True).print(table)
    json.dump({"bandwidth": bandwidth, "quant": str(quant), "records": records}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
