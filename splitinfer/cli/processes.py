"""Nodes as processes of their own on this machine, for `demo` and `bench`."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING

from splitinfer.config import Settings
from splitinfer.errors import SplitinferError

if TYPE_CHECKING:
    from splitinfer.model.weights import Checkpoint

__all__ = ["node_arguments", "node_process"]

START_TIMEOUT = 60.0  # seconds a node gets to map its weights and listen
STOP_TIMEOUT = 15.0  # seconds it gets to drain before it is killed


def node_arguments(checkpoint: Checkpoint, settings: Settings, **other: str | None) -> list[str]:
    """The arguments of a node that holds the whole model and trusts as this side does, but for `other`.

    All are said, because settings from a file or the environment reach that process too.
    """
    config = checkpoint.config
    arguments = {
        "experts": f"0-{config.num_experts - 1}",
        "layers": f"0-{config.num_hidden_layers - 1}",
        "slice": settings.slice and "1/1",
        "host": "127.0.0.1",
        "quant": settings.quant,
        "compression": settings.compression,
        "token-file": settings.token_file,
        "tls-cert": settings.tls_cert,
        "tls-key": settings.tls_key,
        **other,
    }
    return [str(checkpoint.path), *(f"--{name}={value}" for name, value in arguments.items() if value)]


@contextmanager
def node_process(arguments: Sequence[str]) -> Iterator[str]:
    """Run `splitinfer node ARGUMENTS --port 0` as a process of its own; yields its address.

    The process is gone when the block ends, whatever happened in it. Raises `SplitinferError` with what the
    node said when it does not come up. For the main thread.
    """
    command = [sys.executable, "-m", "splitinfer", "node", *arguments, "--port", "0"]
    process = None
    # A SIGTERM while the process is being made waits until somebody knows it, to end it.
    early: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        signal.signal(signal.SIGTERM, before)
        if early:
            signal.raise_signal(signal.SIGTERM)
        yield _wait_for_address(process)
    finally:
        signal.signal(signal.SIGTERM, before)
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Ask it to end, then make it."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _wait_for_address(process: subprocess.Popen[str]) -> str:
    """Read the node's output until it says where it listens. Raises `SplitinferError` with its own words."""
    lines: Queue[str] = Queue(1000)
    stdout = process.stdout
    assert stdout is not None

    def read() -> None:
        # To the end, so that a full pipe never stops the node; what nobody waits for is dropped.
        for line in stdout:
            if not lines.full():
                lines.put(line)
        lines.put("")

    Thread(target=read, daemon=True).start()
    said: list[str] = []
    while True:
        try:
            line = lines.get(timeout=START_TIMEOUT)
        except Empty:
            raise SplitinferError(f"a node did not start within {START_TIMEOUT:.0f} s") from None
        if line.startswith("listening on "):
            return line.removeprefix("listening on ").strip()
        if not line:
            break
        said.append(line.strip())
    start = next((i for i, words in enumerate(said) if words.startswith("error: ")), 0)
    message, *remedy = [words.removeprefix("error: ") for words in said[start:]] or ["it said nothing"]
    raise SplitinferError(f"a node did not start: {message}", remedy=" ".join(remedy))
