"""From settings to the transport's configuration: tokens, trust, the link."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from splitinfer.cli.session import client_config, server_config
from splitinfer.config import load_settings
from splitinfer.errors import UsageError
from splitinfer.transport.certificates import TLSConfig
from splitinfer.transport.link import LinkSpec

PIN = "sha256:" + "ab" * 32


def settings(**given: Any) -> Any:
    return load_settings(given, environ={}, directory=Path("/nonexistent"))


def test_nothing_given_is_a_bare_link() -> None:
    config = client_config(settings())
    assert (config.tls, config.token, config.wire_dtype, config.link) == (None, None, None, None)
    assert config.compression == "auto"


def test_the_emulated_link() -> None:
    config = client_config(settings(simulate_rtt="20ms", simulate_jitter="2ms", simulate_bandwidth="100mbit"))
    assert config.link == LinkSpec(rtt=0.02, jitter=0.002, bandwidth=100e6)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rtt", "20", "'20' is not a duration"),
        ("jitter", "soon", "'soon' is not a duration"),
        ("jitter", "2ms", "the jitter is larger than the round trip"),
        ("bandwidth", "100", "'100' is not a bandwidth"),
    ],
)
def test_a_link_that_is_none_names_its_flag(name: str, value: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"^--simulate-{name}: {says}"):
        client_config(settings(**{f"simulate_{name}": value}))


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
    assert server_config(both).tls == TLSConfig("cert.pem", "key.pem")


@pytest.mark.parametrize(("name", "value"), [("compression", "zip"), ("wire_dtype", "int4")])
def test_choices(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        settings(**{name: value})
