"""`splitinfer node`: what it prints, and that signals end it gently."""

from __future__ import annotations

import platform
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitinfer.cli.node import announce, client_command
from splitinfer.config import load_settings
from splitinfer.transport.certificates import make_certificate
from tests.cli.conftest import Cli, listening


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_says_what_it_holds_and_ends_at_a_signal(tiny: Path, number: signal.Signals, code: int) -> None:
    with listening(tiny, "--experts", "8-10,0-1", "--layers", "1-2") as (node, address, lines):
        assert lines[0].startswith("holding layers 1-2, experts 0-1,8-10 (float32), ")
        assert address.startswith("127.0.0.1:")
        assert int(address.rpartition(":")[2]) > 0
        node.send_signal(number)
        out, err = node.communicate(timeout=60)
    assert (node.returncode, out, err.strip()) == (code, "", "")


def test_the_model_comes_from_the_environment(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is argument, SPLITINFER_MODEL, splitinfer.toml; each is seen by what is wrong with it."""
    Path("splitinfer.toml").write_text('model = "from/the file"')
    assert "from/the file does not exist" in cli("node").err
    monkeypatch.setenv("SPLITINFER_MODEL", "from/the environment")
    assert "from/the environment does not exist" in cli("node").err
    assert "from/the line of mine does not exist" in cli("node", "from/the line of mine").err


def test_the_command_for_a_client_is_whole(tmp_path: Path) -> None:
    """A name that can be dialled, the model, and what this node asks of clients; it works as it stands."""
    made = make_certificate(tmp_path / "tls")
    given = {"model": "path/to/gemma", "host": "0.0.0.0", "token_file": "token"}
    trust = {"tls_cert": str(made.certificate), "tls_key": str(made.key)}
    settings = load_settings(given | trust, environ={}, directory=tmp_path)
    assert client_command("0.0.0.0:7078", settings) == (
        f'splitinfer generate "Once" --model path/to/gemma --nodes {platform.node()}:7078 '
        f"--token-file token --tls-fingerprint {made.fingerprint}"
    )


def test_a_terminal_gets_a_panel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    node: Any = SimpleNamespace(holding="experts 0-31 [all]", nbytes=5, address="127.0.0.1:7077")
    announce(node, load_settings({}, environ={}, directory=Path("/nonexistent")))
    out, err = capsys.readouterr()
    assert "experts 0-31 [all], 5 B" in out
    assert 'splitinfer generate "import os" --nodes 127.0.0.1:7077' in out
    assert "╭" in out
    assert err == ""
