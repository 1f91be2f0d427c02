from __future__ import annotations

import stat
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from splitinfer.cli import cert
from splitinfer.errors import UsageError
from splitinfer.transport.certificates import TLSConfig, client_context, parse_fingerprint, server_context
from splitinfer.transport.security import load_token


def run(*arguments: str) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command(epilog=cert.EPILOG)(cert.command)
    return CliRunner().invoke(app, arguments)


def printed(result: Result, label: str) -> str:
    return next(line for line in result.stdout.splitlines() if line.startswith(label)).split()[1]


def test_what_it_writes_serves_and_is_pinned(tmp_path: Path) -> None:
    result = run("-o", str(tmp_path / "tls"), "--name", "node1.example.org", "--days", "30")
    assert result.exit_code == 0, result.output
    files = {name: tmp_path / "tls" / name for name in ("cert.pem", "key.pem", "token")}
    server_context(TLSConfig(certificate=files["cert.pem"], key=files["key.pem"]))
    client_context(TLSConfig(fingerprints=(printed(result, "fingerprint"),)))
    parse_fingerprint(printed(result, "fingerprint"))
    assert "node1.example.org" in result.stdout
    assert load_token(files["token"]) is not None
    assert [stat.S_IMODE(files[name].stat().st_mode) for name in ("key.pem", "token")] == [0o600, 0o600]
    secret = files["token"].read_text().strip()
    assert secret not in result.output


def test_a_second_run_refuses_and_replace_keeps_the_token(tmp_path: Path) -> None:
    first = run("-o", str(tmp_path))
    token = (tmp_path / "token").read_text()
    refused = run("-o", str(tmp_path))
    assert isinstance(refused.exception, UsageError)
    assert "--replace" in refused.exception.remedy
    again = run("-o", str(tmp_path), "--replace")
    assert again.exit_code == 0
    assert printed(again, "fingerprint") != printed(first, "fingerprint")
    assert (tmp_path / "token").read_text() == token


def test_a_bad_token_that_exists_is_named(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short")
    (tmp_path / "token").chmod(0o600)
    result = run("-o", str(tmp_path))
    assert isinstance(result.exception, UsageError)
    assert "token" in str(result.exception)


@pytest.mark.parametrize("arguments", [("--days", "0"), ("--name",), ("--bits", "512")])
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_its_help_keeps_lines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples stand as they are to be typed, right under their heading."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    lines = [line.strip() for line in run("--help").output.splitlines()]
    at = lines.index("Examples")
    assert lines[at + 1].startswith("splitinfer cert ")
    assert "splitinfer cert -o tls --name node1 --name 192.168.1.20" in lines
