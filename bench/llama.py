"""llama.cpp and this library on one Q4_0 file: decoding and prefill, true shapes, random weights.

    pip install '.[gguf]'
    CMAKE_ARGS="-DGGML_NATIVE=on" pip install --no-binary llama-cpp-python llama-cpp-python
    python bench/llama.py DIR                       6 layers; 13 GB under DIR
    python bench/llama.py DIR --layers 6 12 30      30 layers: 31 GB, 24 GiB of memory

Rounds alternate between three contestants, each in a process of its own, so that no threads wait beside
another's, each after a pass that reads its weights once:

    llama.cpp    the file itself
    same bits    shards made from it: every Q4_0 weight as it is
    default      the file's experts, all other parts in int8, as `--quant int4` has them

Decoding is --tokens tokens after 64 of context, without sampling; prefill ends with the logits of the last
token. Figures are medians of the rounds. What it leaves out: loading, tokenizer, sampling, the network.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from splitinfer.cli.console import prepare_threads

CONTEXT = 64
WARM = 128  # tokens of the pass that reads the weights: nearly every expert is somebody's
WORDS = range(1000, 2000)  # token ids that prompts are made of
TIMEOUT = 1800.0  # seconds for one contestant's turn
CONTESTANTS = ("llama.cpp", "same bits", "default")

Times = dict[str, float]


def gguf_path(directory: Path, layers: int, head: str) -> Path:
    return directory / f"{layers}-layers-{head}.gguf"


def prepare(directory: Path, layers: int, head: str) -> None:
    """The GGUF file and the shards made from it, whatever of them is not there yet."""
    from random_gguf import write

    from splitinfer.model.quantize import QuantConfig
    from splitinfer.model.sharding import plan_shard, write_shard
    from splitinfer.model.weights import Checkpoint

    directory.mkdir(parents=True, exist_ok=True)
    file = gguf_path(directory, layers, head)
    if not file.exists():
        write(file, layers, head)
    checkpoint = Checkpoint.open(file)
    experts = checkpoint.held_experts
    write_shard(plan_shard(checkpoint, experts=experts), file.with_suffix(".experts"))
    for name, quant in (("same bits", None), ("default", QuantConfig.of("int4"))):
        write_shard(plan_shard(checkpoint, client=True, quant=quant), file.with_suffix(f".{name}"))


def prompt(tokens: int) -> list[int]:
    return [WORDS[(7 * i) % len(WORDS)] for i in range(tokens)]


def llama_cpp(arguments: argparse.Namespace, file: Path) -> Callable[[list[int], bool], None]:
    """A function that feeds tokens and computes the last one's logits, into an empty context if told so."""
    import ctypes

    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"error: llama.cpp cannot load {file}")
    settings = llama.llama_context_default_params()
    settings.n_ctx = 2048
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = arguments.threads
    context = llama.llama_init_from_model(model, settings)
    kept: list[Any] = [quiet]

    def feed(tokens: list[int], anew: bool) -> None:
        if anew:
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        kept[1:] = [array]
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("error: llama.cpp cannot decode")
        llama.llama_synchronize(context)

    return feed


def splitinfer(arguments: argparse.Namespace, file: Path) -> Callable[[list[int], bool], None]:
    """The same by this library, with the experts in this process and the command line's own thread policy."""
    prepare_threads()
    import torch

    from splitinfer.model.experts import ExpertBank, LocalExperts
    from splitinfer.model.gemma import Gemma, Segment
    from splitinfer.model.weights import Checkpoint

    torch.set_num_threads(arguments.threads)
    shard = Checkpoint.open(file.with_suffix(".experts"))
    bank = ExpertBank(shard, dict.fromkeys(shard.held_layers, shard.held_experts))
    model = Gemma.load(Checkpoint.open(file.with_suffix(f".{arguments.contestant}")), LocalExperts(bank))
    cache = model.new_cache()
    loop = asyncio.new_event_loop()

    def feed(tokens: list[int], anew: bool) -> None:
        nonlocal cache
        if anew:
            cache = model.new_cache()
        hidden = loop.run_until_complete(model.forward([Segment(torch.tensor(tokens), cache)]))
        model.logits(hidden[-1:])

    return feed


def take_turn(arguments: argparse.Namespace) -> Times:
    """One contestant, measured in this process: tokens/s, and the seconds until it could begin."""
    file = gguf_path(arguments.directory, arguments.layers[0], arguments.head)
    start = perf_counter()
    feed = (llama_cpp if arguments.contestant == "llama.cpp" else splitinfer)(arguments, file)
    times = {"loaded": perf_counter() - start}
    feed(prompt(WARM), True)
    feed(prompt(CONTEXT), True)
    for token in prompt(8):
        feed([token], False)
    start = perf_counter()
    for token in prompt(arguments.tokens):
        feed([token], False)
    times["decode"] = arguments.tokens / (perf_counter() - start)
    for length in arguments.prompts:
        start = perf_counter()
        feed(prompt(length), True)
        times[f"prefill {length}"] = length / (perf_counter() - start)
    return times


def run_turn(arguments: argparse.Namespace, layers: int, contestant: str) -> Times:
    """`take_turn` in a process of its own."""
    command = [sys.executable, __file__, str(arguments.directory), "--contestant", contestant]
    command += ["--layers", str(layers), "--head", arguments.head, "--tokens", str(arguments.tokens)]
    command += ["--threads", str(arguments.threads), "--prompts", *map(str, arguments.prompts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT)
    times: Times = json.loads(done.stdout.splitlines()[-1])
    print(f"{layers} layers, {contestant}: " + json.dumps(times), file=sys.stderr)
    return times


def compare(arguments: argparse.Namespace, layers: int) -> dict[str, Any]:
    """The rounds of one number of layers: every run and the medians, by contestant."""
    prepare(arguments.directory, layers, arguments.head)
    runs: dict[str, list[Times]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.rounds):
        for name in CONTESTANTS:
            runs[name].append(run_turn(arguments, layers, name))
    medians = {
        name: {key: statistics.median(run[key] for run in turns) for key in turns[0]}
        for name, turns in runs.items()
    }
    if not arguments.keep:
        for path in arguments.directory.glob(f"{layers}-layers-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {"layers": layers, "medians": medians, "runs": runs}


def report(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "figure", *CONTESTANTS, "same bits ×", "default ×")
    table.title = f"tokens/s, {arguments.threads} threads, embedding and lm_head of the file {arguments.head}"
    for record in records:
        medians = record["medians"]
        for key in ("decode", *(f"prefill {n}" for n in arguments.prompts)):
            values = [medians[name][key] for name in CONTESTANTS]
            ratios = (f"{value / values[0]:.2f}" for value in values[1:])
            table.add_row(str(record["layers"]), key, *(f"{value:.1f}" for value in values), *ratios)
    Console(stderr=True).print(table)
    json.dump({"threads": arguments.threads, "head": arguments.head, "records": records}, sys.stdout)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where files are made and removed")
    parser.add_argument("--layers", type=int, nargs="+", default=[6])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="decoded in a turn")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--head", choices=("Q4_0", "Q6_K"), default="Q4_0", help="of the file")
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(take_turn(arguments)))
    else:
        report(arguments, [compare(arguments, layers) for layers in arguments.layers])


if __name__ == "__main__":
    main()
