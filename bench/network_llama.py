"""llama.cpp's RPC backend and this library over the same emulated link, on one GGUF file of true shapes.

llama.cpp keeps attention here and puts the experts on the RPC device (`-ot exps=RPC0[...]`); its threads are
told to sleep soon, without which its two processes stall each other on two cores (GOMP_SPINCOUNT). Weights
are random, so drafts are left out: nothing would be accepted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

import network
import network_cells as cells

from splitinfer.cli.console import run as run_loop
from splitinfer.cli.processes import node_process
from splitinfer.errors import CapacityError, SplitinferError
from splitinfer.transport.link import EmulatedLink, LinkSpec, parse_duration

__all__ = ["compare"]

TOKENS = 24
WAYS = ("plain", "third local")
START_SECONDS = 60.0


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of both, by round trip: medians over the rounds, in which they alternate."""
    file = arguments.gguf or Path("true-shapes.gguf")
    if not file.exists():
        import random_gguf

        random_gguf.write(file, 6)
    arguments.model, arguments.plain_tokens, arguments.tokens = file, TOKENS, TOKENS
    layers = cells.config_of(file).num_hidden_layers
    ways = [way for way in network.ways(layers, None) if way.name in WAYS]
    sampling: dict[str, Any] = {"temperature": 0.0}
    local = run_loop(cells.in_process(file, 1, TOKENS, sampling, prefill=False))
    rows: dict[str, dict[str, float]] = {}
    with node_process([str(file), "--threads", "1"]) as address:
        for rtt in arguments.rtt.split(","):
            seconds = parse_duration(rtt)
            found: dict[str, list[float]] = {}
            for _ in range(arguments.rounds):
                rate = llama_rate(arguments.llama_cpp, file, seconds)
                found.setdefault("llama.cpp RPC", []).append(rate)
                for way in ways:
                    figures, _ = run_loop(
                        network.measure(arguments, [address], way, seconds, local, sampling)
                    )
                    found.setdefault(way.name, []).append(figures.tokens_per_second)
                    found.setdefault(f"{way.name}, of bound", []).append(figures.of_bound)
            rows[rtt] = {name: median(rates) for name, rates in found.items()}
    return {"model": f"{layers} layers of Gemma 4 26B-A4B's shapes, Q4_0", "rows": rows}


def llama_rate(folder: Path, file: Path, rtt: float) -> float:
    """Tokens/s of llama-bench over an emulated link of that round trip."""
    environment = {**os.environ, "GOMP_SPINCOUNT": "1000"}
    environment.pop("OMP_WAIT_POLICY", None)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    threads = str(os.cpu_count() or 1)
    command = [str(folder / "ggml-rpc-server"), "-t", threads, "-p", str(port)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        with EmulatedLink(LinkSpec(rtt=rtt), f"127.0.0.1:{port}") as link:
            command = [str(folder / "llama-bench"), "-m", str(file), "--rpc", link.address, "-ngl", "0"]
            command += ["-ot", f"exps=RPC0[{link.address}]", "-p", "0", "-n", str(TOKENS), "-t", threads]
            command += ["-r", "2", "-o", "json"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            if done.returncode:
                raise SplitinferError(f"llama-bench left with {done.returncode}: {done.stderr[-500:]}")
    finally:
        server.terminate()
        server.wait()
    return float(json.loads(done.stdout)[0]["avg_ts"])


def _wait_for(port: int) -> None:
    """Until somebody listens there."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise CapacityError("ggml-rpc-server did not start")
