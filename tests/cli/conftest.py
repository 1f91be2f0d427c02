"""The command line in this process, away from the developer's own settings."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from splitinfer.cli import main
from tests.checkpoints import tiny_config, write_checkpoint

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Ran:
    """One run of the command line."""

    code: int
    out: str
    err: str


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


Cli = Callable[..., Ran]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("generate", "hi", stdin=b"...")` runs `main` in an empty folder with an empty home."""
    for name in list(os.environ):
        if name.startswith("SPLITINFER_"):
            monkeypatch.delenv(name)
    for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "PASSIVE" if name.startswith("OMP") else "0")  # put back after the test
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for commands that start a process of their own
    # The cache of compiled kernels stays where it is; everything else of home moves.
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, stdin: bytes = b"", terminal: bool = False) -> Ran:
        stream = _Terminal if terminal else io.TextIOWrapper
        monkeypatch.setattr(sys, "stdin", stream(io.BytesIO(stdin), encoding="utf-8"))
        code = main(argv)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 4 layers and 11 experts, without a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_config())


@contextmanager
def process(*argv: str) -> Iterator[subprocess.Popen[str]]:
    """The true command in a process of its own, killed at the end if it still runs."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SPLITINFER_")}
    started = subprocess.Popen(
        [sys.executable, "-m", "splitinfer", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.communicate(timeout=60)


@contextmanager
def listening(model: Path, *argv: str) -> Iterator[tuple[subprocess.Popen[str], str, Sequence[str]]]:
    """A true node, once it listens: the process, its address, the lines it printed."""
    with process("node", str(model), "--port", "0", "--threads", "1", *argv) as node:
        assert node.stdout is not None
        assert node.stderr is not None
        lines = []
        for line in node.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("listening on "):
                break
        else:
            raise AssertionError(node.stderr.read())
        yield node, lines[-1].removeprefix("listening on "), lines


@pytest.fixture(scope="session")
def whole_node(tiny: Path) -> Iterator[str]:
    """The address of a node that holds all of `tiny`, in another process."""
    with listening(tiny) as (_, address, _):
        yield address
