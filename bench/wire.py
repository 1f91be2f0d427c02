"""What fewer bytes on the wire cost and save: lz4 with byte planes, and the narrow wire dtypes.

    python bench/wire.py                        rows drawn at random, plain and with outliers
    python bench/wire.py --model PATH           a model's own activations too, and what rounding does to it
    python bench/wire.py --link 100mbit,1gbit   whole calls over emulated links instead, by mode of lz4

Rows are as wide as Gemma 4 26B-A4B's (2,816). Error is the root mean square of the difference over that of
the rows; the second figure is the median relative error of single numbers, which outliers cannot hide. For a
model: bits per token of the text, experts in this process, rounded on their way there and back in every
layer. Over links: the same tensor there and back, client, link and server in three processes, the modes in
turns; speed is raw bytes, both ways together, over the median time of a call.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from splitinfer import transport
from splitinfer.model.experts import Where
from splitinfer.transport.compression import LZ4, LZ4_PLANES, compress, decompress
from splitinfer.transport.link import LinkSpec
from splitinfer.transport.wire_dtypes import WIRE_DTYPES, narrow, narrows, widen

COLUMNS: Final = 2816
ROWS: Final = 256
REPEATS: Final = 7
MODES: Final = ("off", "auto", "on")
OVER_LINKS: Final = ("noise, uint8", "normal, bfloat16", "three quarters padding, bfloat16")


def data_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def name_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def best_seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def through(tensor: torch.Tensor, wire: str) -> torch.Tensor:
    """What arrives of a tensor that travels as `wire`."""
    if not narrows(wire, name_of(tensor), tensor.shape):
        return tensor
    out = torch.empty_like(tensor)
    widen(
        narrow(data_of(tensor), wire, name_of(tensor), tensor.shape),
        data_of(out),
        wire,
        name_of(tensor),
        tensor.shape,
    )
    return out


def random_rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(ROWS, COLUMNS, generator=generator)
    skewed = plain * torch.exp(torch.randn(COLUMNS, generator=generator))
    padded = plain.clone()
    padded[ROWS // 4 :] = 0
    return {
        "normal, bfloat16": plain.bfloat16(),
        "normal, float32": plain,
        "outliers, bfloat16": skewed.bfloat16(),
        "outliers, float32": skewed,
        "three quarters padding, bfloat16": padded.bfloat16(),
        "noise, uint8": torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator),
    }


def measure_compression(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    data, itemsize = data_of(tensor), tensor.element_size()
    record: dict[str, Any] = {"rows": name, "nbytes": data.nbytes}
    for label, codec in (("plain", LZ4), ("planes", LZ4_PLANES)):
        if codec == LZ4_PLANES and itemsize == 1:
            continue
        encoded = compress(data, itemsize, codec, max_nbytes=2 * data.nbytes)
        assert encoded is not None
        wire, out = memoryview(b"".join(encoded.parts)), memoryview(bytearray(data.nbytes))
        record[f"{label}_ratio"] = data.nbytes / encoded.nbytes
        doing = best_seconds(partial(compress, data, itemsize, codec, max_nbytes=2 * data.nbytes))
        undoing = best_seconds(partial(decompress, wire, out, itemsize, codec))
        record[f"{label}_gb_s"] = data.nbytes / doing / 1e9
        record[f"{label}_undo_gb_s"] = data.nbytes / undoing / 1e9
    return record


def measure_rounding(name: str, tensor: torch.Tensor) -> list[dict[str, Any]]:
    records = []
    for wire in WIRE_DTYPES:
        if not narrows(wire, name_of(tensor), tensor.shape):
            continue
        got, want = through(tensor, wire).double(), tensor.double()
        nonzero = want != 0
        relative = ((got - want).abs() / want.abs())[nonzero]
        one = tensor[:1].contiguous()
        records.append(
            {
                "rows": name,
                "wire": wire,
                "rms": float((got - want).norm() / want.norm()),
                "median": float(relative.median()),
                "one_row_us": best_seconds(partial(through, one, wire)) * 1e6,
                "gb_s": tensor.nbytes / best_seconds(partial(through, tensor, wire)) / 1e9,
            }
        )
    return records


class RoundedExperts:
    """Experts whose rows are rounded on their way there and back; `wire` None only looks on."""

    def __init__(self, inner: Any, wire: str | None, seen: list[torch.Tensor]) -> None:
        self._inner, self._wire, self._seen = inner, wire, seen

    def where(self, layer: int) -> Where:
        where: Where = self._inner.where(layer)
        return where

    def dispatch(self, layer: int, x: torch.Tensor, *rest: Any, **more: Any) -> Awaitable[torch.Tensor]:
        if self._wire is None:
            self._seen.append(x.clone())
        return self._answer(layer, x, rest, more)

    async def _answer(self, layer: int, x: torch.Tensor, rest: Any, more: Any) -> torch.Tensor:
        rounded = x if self._wire is None else through(x, self._wire)
        answer: torch.Tensor = await self._inner.dispatch(layer, rounded, *rest, **more)
        return answer if self._wire is None else through(answer, self._wire)


def held_out_text() -> str:
    from training.corpus import read_corpus

    return read_corpus().held_out[0].text


def bits_per_token(model: str, text: str, tokens: int) -> tuple[dict[str, float], torch.Tensor]:
    """Bits per token by wire dtype ("" for none), and the rows that went to experts."""
    from splitinfer.model.cache import KVCache
    from splitinfer.model.experts import ExpertBank, LocalExperts
    from splitinfer.model.gemma import Gemma, Segment
    from splitinfer.model.hub import resolve_model
    from splitinfer.model.tokenizer import Tokenizer
    from splitinfer.model.weights import Checkpoint

    checkpoint = Checkpoint.open(resolve_model(model))
    tokenizer = Tokenizer.open(checkpoint.path)
    if tokenizer is None:
        raise SystemExit(f"error: {model} has no tokenizer")
    ids = torch.tensor(tokenizer.encode(text)[:tokens])
    config = checkpoint.config
    everything = dict.fromkeys(range(config.num_hidden_layers), range(config.num_experts))
    local = LocalExperts(ExpertBank(checkpoint, everything))
    seen: list[torch.Tensor] = []
    bits: dict[str, float] = {}
    for wire in (None, *WIRE_DTYPES):
        gemma = Gemma.load(checkpoint, RoundedExperts(local, wire, seen))
        cache = KVCache(config, "cpu", gemma.dtype)
        hidden = asyncio.run(gemma.forward([Segment(ids, cache)]))
        loss = torch.nn.functional.cross_entropy(gemma.logits(hidden)[:-1].double(), ids[1:])
        bits[wire or ""] = float(loss) / float(np.log(2))
    return bits, torch.cat(seen)


def echo_server(pipe: Any) -> None:
    """A process that answers with what it is sent, until it is ended."""

    async def work() -> None:
        async with await transport.serve(lambda call: transport.Reply(call.tensors), "127.0.0.1:0") as server:
            pipe.send(server.address)
            await asyncio.Event().wait()

    asyncio.run(work())


async def measure_link(address: str, link: str, rows: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    channels = {
        mode: await transport.connect(
            address,
            config=transport.ClientConfig(link=LinkSpec.parse(link), compression=mode),
        )
        for mode in MODES
    }
    records = []
    for name in OVER_LINKS:
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        wire: dict[str, int] = {}
        for turn in range(REPEATS + 1):
            for mode, channel in channels.items():
                before, start = channel.stats, perf_counter()
                await channel.call("echo", [rows[name]])
                seconds, after = perf_counter() - start, channel.stats
                if turn:
                    times[mode].append(seconds)
                wire[mode] = after.sent_nbytes + after.received_nbytes
                wire[mode] -= before.sent_nbytes + before.received_nbytes
        for mode in MODES:
            speed = 2 * rows[name].nbytes / median(times[mode])
            slow = median(times["off"]) / median(times[mode])
            records.append(
                {"link": link, "rows": name, "mode": mode, "mb_s": speed / 1e6, "times_off": slow}
                | {"wire_share": wire[mode] / (2 * rows[name].nbytes)}
            )
    for channel in channels.values():
        await channel.close()
    return records


def measure_links(links: list[str], rows: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=echo_server, args=(there,), daemon=True)
    server.start()
    try:
        address = here.recv()
        return [record for link in links for record in asyncio.run(measure_link(address, link, rows))]
    finally:
        server.terminate()
        server.join()


def print_links(records: list[dict[str, Any]]) -> None:
    table = Table(title="lz4 on whole calls over a link, there and back", title_justify="left")
    for heading in ("link", "rows", "lz4", "MB/s", "× off", "bytes on the wire"):
        table.add_column(heading, justify="left" if heading in ("link", "rows", "lz4") else "right")
    for record in records:
        figures = f"{record['mb_s']:.1f}", f"{record['times_off']:.3f}", f"{record['wire_share']:.3f}"
        table.add_row(record["link"], record["rows"], record["mode"], *figures)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_tables(
    compressed: list[dict[str, Any]], rounded: list[dict[str, Any]], bits: dict[str, float]
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        title="lz4: how much smaller, and how fast (GB/s of raw bytes, one thread)", title_justify="left"
    )
    for heading in ("rows", "plain", "GB/s", "undo", "planes", "GB/s", "undo"):
        table.add_column(heading, justify="left" if heading == "rows" else "right")
    for record in compressed:
        cells = [f"{record[key]:.3f}" if key in record else "" for key in ("plain_ratio",)]
        cells += [f"{record[key]:.2f}" for key in ("plain_gb_s", "plain_undo_gb_s")]
        cells += [f"{record['planes_ratio']:.3f}" if "planes_ratio" in record else ""]
        cells += [
            f"{record[key]:.2f}" if key in record else "" for key in ("planes_gb_s", "planes_undo_gb_s")
        ]
        table.add_row(record["rows"], *cells)
    console.print(table)
    table = Table(title="wire dtypes: error, and both ways' speed", title_justify="left")
    for heading in ("rows", "wire dtype", "rms error", "median error", "one row, µs", "GB/s"):
        table.add_column(heading, justify="left" if heading in ("rows", "wire dtype") else "right")
    for record in rounded:
        figures = f"{record['rms']:.2%}", f"{record['median']:.2%}", f"{record['one_row_us']:.0f}"
        table.add_row(record["rows"], record["wire"], *figures, f"{record['gb_s']:.2f}")
    console.print(table)
    for wire, value in bits.items():
        console.print(f"{wire or 'as it is':>14}: {value:.4f} bits per token ({value - bits['']:+.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a checkpoint with a tokenizer")
    parser.add_argument("--text", type=Path, help="what it reads (default: held out of the demo's training)")
    parser.add_argument("--tokens", type=int, default=512, help="how much of it (default 512)")
    parser.add_argument("--link", help="emulated links, such as 100mbit,1gbit, in place of the rest")
    arguments = parser.parse_args()
    if arguments.link:
        links = measure_links(arguments.link.split(","), random_rows())
        print_links(links)
        print(json.dumps({"bench": "wire", "links": links}))
        return
    torch.set_num_threads(1)
    rows, bits = random_rows(), dict[str, float]()
    if arguments.model:
        text = arguments.text.read_text() if arguments.text else held_out_text()
        bits, seen = bits_per_token(arguments.model, text, arguments.tokens)
        rows[f"the model's, {name_of(seen)}"] = seen
    compressed = [measure_compression(name, tensor) for name, tensor in rows.items()]
    rounded = [record for name, tensor in rows.items() for record in measure_rounding(name, tensor)]
    print_tables(compressed, rounded, bits)
    print(
        json.dumps({"bench": "wire", "compression": compressed, "rounding": rounded, "bits_per_token": bits})
    )


if __name__ == "__main__":
    main()
