from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from splitinfer.cli.link_options import reaching_nodes
from splitinfer.cli.session import client_config, server_config
from splitinfer.config import load_settings
from splitinfer.errors import UsageError
from splitinfer.transport.certificates import TLSConfig
from splitinfer.transport.link import LinkSpec
from tests.cli.conftest import Cli, listening

PIN = "sha256:" + "ab" * 32


def run(*arguments: str) -> dict[str, Any]:
    """What a command decorated with `reaching_nodes` gets."""
    got: dict[str, Any] = {}

    @reaching_nodes
    def command(prompt: str, own: int = 3, *, link: dict[str, Any]) -> None:
        got.update(prompt=prompt, own=own, link=link)

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return got


def settings(**given: Any) -> Any:
    return load_settings(given, environ={}, directory=Path("/nonexistent"))


def test_a_command_gets_its_own_arguments_and_the_links() -> None:
    bare = run("Once")
    assert (bare["prompt"], bare["own"]) == ("Once", 3)
    assert not any(bare["link"].values())
    full = run(
        "Once", "--own", "4", "--tls-fingerprint", PIN, "--simulate-rtt", "20ms", "--compression", "off"
    )
    assert full["own"] == 4
    assert full["link"]["tls_fingerprint"] == [PIN]
    assert full["link"]["simulate_rtt"] == "20ms"
    assert full["link"]["compression"] == "off"


def test_nothing_given_is_a_bare_link() -> None:
    config = client_config(settings())
    assert (config.tls, config.token, config.wire_dtype, config.link) == (None, None, None, None)
    assert config.compression == "auto"


def test_the_emulated_link() -> None:
    config = client_config(settings(simulate_rtt="20ms", simulate_jitter="2ms", simulate_bandwidth="100mbit"))
    assert config.link == LinkSpec(rtt=0.02, jitter=0.002, bandwidth=100e6)
    with pytest.raises(UsageError, match="'20'"):
        client_config(settings(simulate_rtt="20"))


def test_trust_of_a_client() -> None:
    pinned = client_config(settings(tls_fingerprint=[f"{PIN},{PIN}"]))
    assert pinned.tls == TLSConfig(fingerprints=(PIN, PIN))
    assert client_config(settings(tls_ca="system")).tls == TLSConfig()
    mutual = client_config(settings(tls_ca="ca.pem", tls_cert="me.pem", tls_key="me.key"))
    assert mutual.tls == TLSConfig("me.pem", "me.key", authorities="ca.pem")


def test_a_certificate_of_a_server_alone_is_not_tls_on_a_client() -> None:
    """One splitinfer.toml may serve a node and a client of other nodes."""
    both = settings(tls_cert="cert.pem", tls_key="key.pem")
    assert client_config(both).tls is None
    assert server_config(both, insecure=False).tls == TLSConfig("cert.pem", "key.pem")


@pytest.mark.parametrize(("name", "value"), [("compression", "zip"), ("wire_dtype", "int4")])
def test_choices(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        settings(**{name: value})


def test_a_node_and_a_client_by_certificate_and_token(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    made = cli("cert", "-o", str(tmp_path / "tls"))
    pin = next(line.split()[1] for line in made.out.splitlines() if line.startswith("fingerprint"))
    certificate, key, token = (str(tmp_path / "tls" / name) for name in ("cert.pem", "key.pem", "token"))
    serving = ["--tls-cert", certificate, "--tls-key", key, "--token-file", token, "--host", "0.0.0.0"]
    asked = ["generate", "--token-ids", "2,5,7", "--model", str(tiny), "--max-tokens", "4", "--json"]
    local = cli(*asked)
    with listening(tiny, *serving) as (_, address, _):
        nodes = ["--nodes", address.replace("0.0.0.0", "127.0.0.1")]
        trusted = cli(
            *asked, *nodes, "--tls-fingerprint", pin, "--token-file", token, "--simulate-rtt", "1ms"
        )
        assert trusted.code == 0, trusted.err
        assert json.loads(trusted.out)["token_ids"] == json.loads(local.out)["token_ids"]
        stranger = cli(*asked, *nodes, "--tls-fingerprint", pin)
        assert (stranger.code, stranger.out) == (1, "")
        assert "asks for a token" in stranger.err
        fooled = cli(*asked, *nodes, "--tls-fingerprint", PIN, "--token-file", token)
        assert fooled.code == 1
        assert "another certificate" in fooled.err


def test_a_node_beyond_this_machine_is_refused_with_the_remedy(cli: Cli, tiny: Path) -> None:
    ran = cli("node", str(tiny), "--host", "0.0.0.0", "--port", "0")
    assert ran.code == 2
    assert "no token and no TLS" in ran.err
    assert "splitinfer cert" in ran.err
