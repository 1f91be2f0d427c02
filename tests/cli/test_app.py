"""The command line as a whole: help, exit codes, and how an error looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from splitinfer import __version__
from splitinfer.cli import app, main
from splitinfer.errors import ConnectError, UsageError
from tests.cli.conftest import Cli

COMMANDS = ("node", "generate", "chat", "shard", "verify", "bench", "cert", "demo")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `splitinfer bench` raise `error`."""

    def command() -> None:
        raise error

    monkeypatch.setattr(app.bench, "command", command)


def test_version(cli: Cli) -> None:
    assert cli("--version") == (ran := cli("--version"))
    assert (ran.code, ran.out) == (0, f"splitinfer {__version__}\n")


@pytest.mark.parametrize("argv", [(), *((name,) for name in COMMANDS)])
def test_every_help_text_has_examples(cli: Cli, argv: tuple[str, ...]) -> None:
    ran = cli(*argv, "--help")
    assert ran.code == 0
    assert "Examples" in ran.out
    assert "  splitinfer " in ran.out
    assert "[bold]" not in ran.out


def test_help_imports_nothing_heavy() -> None:
    check = (
        "import sys; from splitinfer.cli import main; code = main(['node', '--help']); "
        "heavy = {'torch', 'numpy', 'asyncio', 'msgpack'} & set(sys.modules); "
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_no_command_shows_the_help(cli: Cli) -> None:
    ran = cli()
    assert ran.code == 2
    assert "Usage: splitinfer" in ran.out
    assert ran.err == ""


@pytest.mark.parametrize(
    ("argv", "message", "remedy"),
    [
        (["nod"], "error: no such command 'nod'", "See `splitinfer --help`"),
        (["node", "--expert", "1"], "error: no such option: --expert", "See `splitinfer node --help`"),
        (["node", "--port", "x"], "error: invalid value for '--port'", "See `splitinfer node --help`"),
        (["node", "a", "b"], "error: got unexpected extra argument", "See `splitinfer node --help`"),
        (["generate", "--seed"], "error: option '--seed' requires", "See `splitinfer --help`"),
        (["generate", "--top-p", "2", "x"], "'--top-p'", "See `splitinfer generate --help`"),
        (["node", "--port", "70000"], "--port must be a whole number from 0 to 65535, not 70000", "Correct"),
        (["node", "--threads", "0"], "--threads must be a whole number from 1", "Correct"),
        (["generate", "x", "--timeout", "0"], "--timeout must be a number of seconds above 0", "Correct"),
        (["generate", "x", "--dtype", "fp8"], "--dtype must be one of float32, bfloat16", "Correct"),
        (["chat", "a", "--model", "b"], "two models are named: a and --model b", "Name one of them."),
        (["bench"], "there is nothing to measure", "splitinfer bench --rtt"),
    ],
)
def test_wrong_usage(cli: Cli, argv: list[str], message: str, remedy: str) -> None:
    ran = cli(*argv)
    first, second = ran.err.splitlines()
    assert ran.code == 2
    assert first.startswith("error: ")
    assert message in first
    assert remedy in second
    assert ran.out == ""


def test_an_error_is_two_lines(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ConnectError("nobody answers at [bold]a:7077[/bold]", remedy="start it " * 30))
    ran = cli("bench")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"error: nobody answers at [bold]a:7077[/bold]\n{'start it ' * 30}\n"
    fail_with(monkeypatch, UsageError("no"))
    assert cli("bench") == type(ran)(2, "", "error: no\n")


def test_an_unexpected_error_is_a_line_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))
    ran = cli("bench")
    assert ran.code == 1
    assert ran.err.startswith("error: ZeroDivisionError: division by zero\nThis is unexpected")
    assert "--debug" in ran.err


@pytest.mark.parametrize("argv", [("--debug", "bench"), ("bench", "--debug")])
def test_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    fail_with(monkeypatch, ConnectError("nobody answers"))
    ran = cli(*argv)
    assert ran.code == 1
    assert "Traceback (most recent call last)" in ran.err
    assert ran.err.endswith("error: nobody answers\n")


def test_debug_from_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ConnectError("nobody answers"))
    for value, shown in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("SPLITINFER_DEBUG", value)
        assert ("Traceback" in cli("bench").err) is shown


def test_debug_after_two_dashes_is_an_argument(cli: Cli) -> None:
    ran = cli("generate", "--file", "x", "--", "--debug")
    assert "given twice: PROMPT and --file" in ran.err


def test_an_interrupt_leaves_with_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    ran = cli("bench")
    assert (ran.code, ran.err) == (130, "\n")


def test_sigterm_unwinds(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            closed.append(True)

    monkeypatch.setattr(app.bench, "command", command)
    before = signal.getsignal(signal.SIGTERM)
    assert (cli("bench").code, closed) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reader_that_left_is_no_error() -> None:
    line = "import sys; from splitinfer.cli import main; sys.exit(main(['--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, "-c", line], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (1, b"")


def test_a_wrong_settings_file_is_named(cli: Cli) -> None:
    with open("splitinfer.toml", "w") as file:
        file.write("prot = 1\n")
    ran = cli("node")
    assert ran.code == 2
    assert "splitinfer.toml: there is no setting 'prot'" in ran.err
    assert "Did you mean 'port'?" in ran.err


def test_threads_wait_asleep_unless_the_user_says_otherwise(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_the_module_is_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "splitinfer", "nod"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no such command 'nod'")
    assert "Traceback" not in ran.stderr
