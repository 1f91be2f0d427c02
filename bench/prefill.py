"""Prefill with the experts in this process, true shapes, random weights: tokens/s and GFLOP/s.

    python bench/prefill.py                                  6 layers, 512 tokens, int4
    python bench/prefill.py --layers 6 12 30 --tokens 128 512

The ceiling is what PyTorch's float32 product of two large matrices reaches with the same threads; products
here sum in float32 too. Only the last token's logits are computed. Layers beyond --distinct share weights
with earlier ones. Ends with one JSON line.
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
from random_model import active_weights, load
from rich.console import Console
from rich.table import Table

from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.quantize import QuantConfig


def product_rate() -> float:
    """Multiplications and additions per second of a float32 product."""
    x, w = torch.randn(512, 2816), torch.randn(2816, 2816)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x, w)
        best = max(best, 2 * 512 * 2816 * 2816 / (time.perf_counter() - start))
    return best


async def measure(model: Gemma, tokens: int) -> float:
    ids = torch.randint(0, 1000, (tokens,), generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    hidden = await model.forward([Segment(ids, model.new_cache())])
    model.logits(hidden[-1:])
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[6])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--distinct", type=int, default=6, help="layers with weights of their own")
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--quant", default="int4", help="of every part")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rate = product_rate()
    table = Table("layers", "tokens", "seconds", "tokens/s", "GFLOP/s", "of the ceiling")
    table.title = f"{arguments.threads} threads, {arguments.quant}, float32 product {rate / 1e9:.0f} GFLOP/s"
    records = []
    for layers in arguments.layers:
        model, _ = load(layers, QuantConfig(*[arguments.quant] * 5), arguments.distinct, arguments.vocab)
        for tokens in arguments.tokens:
            asyncio.run(measure(model, 16))
            seconds = statistics.median(asyncio.run(measure(model, tokens)) for _ in range(arguments.rounds))
            reached = 2 * active_weights(model) * tokens / seconds
            records.append({"layers": layers, "tokens": tokens, "tokens_per_second": tokens / seconds})
            table.add_row(
                str(layers), str(tokens), f"{seconds:.2f}", f"{tokens / seconds:.1f}", f"{reached / 1e9:.0f}",
                f"{reached / rate:.0%}",
            )  # fmt: skip
        del model
    Console(stderr=True).print(table)
    json.dump({"float32_product": rate, "quant": arguments.quant, "records": records}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
