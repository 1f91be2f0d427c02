from __future__ import annotations

import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from splitinfer.errors import AuthenticationError, ConnectError, UsageError
from splitinfer.transport.certificates import (
    Certificate,
    TLSConfig,
    channel_binding,
    check_peer,
    client_context,
    make_certificate,
    map_tls_error,
    parse_fingerprint,
    server_binding,
    server_context,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), names=["node.example.org", "10.1.2.3"])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("other"))


def serving(made: Certificate, **extra: object) -> TLSConfig:
    return TLSConfig(certificate=made.certificate, key=made.key, **extra)  # type: ignore[arg-type]


def shake_hands(
    client: ssl.SSLContext, server: ssl.SSLContext, name: str = "localhost"
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a TLS connection through memory, with one byte across each way."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    a = client.wrap_bio(to_client, to_server, server_hostname=name)
    b = server.wrap_bio(to_server, to_client, server_side=True)
    for end in (a, b, a, b):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    a.write(b"?")
    assert b.read(1) == b"?"
    b.write(b"!")
    assert a.read(1) == b"!"
    return a, b


def test_a_made_certificate_speaks_tls_13_and_is_pinned(made: Certificate) -> None:
    tls = TLSConfig(fingerprints=(made.fingerprint,))
    client, server = shake_hands(client_context(tls), server_context(serving(made)), "whatever.example")
    assert client.version() == server.version() == "TLSv1.3"
    check_peer(client.getpeercert(True), tls, "node")
    assert channel_binding(client.getpeercert(True)) == server_binding(serving(made)) != b""
    assert server_binding(serving(made)).hex() == made.fingerprint.removeprefix("sha256:")


def test_another_certificate_than_the_pinned_one_is_refused(made: Certificate, other: Certificate) -> None:
    tls = TLSConfig(fingerprints=(other.fingerprint,))
    client, _ = shake_hands(client_context(tls), server_context(serving(made)))
    with pytest.raises(AuthenticationError, match=made.fingerprint):
        check_peer(client.getpeercert(True), tls, "node:7077")
    with pytest.raises(AuthenticationError):
        check_peer(None, tls, "node:7077")


def test_older_tls_is_refused(made: Certificate) -> None:
    old = client_context(TLSConfig(fingerprints=(made.fingerprint,)))
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError) as refusal:
        shake_hands(old, server_context(serving(made)))
    assert isinstance(map_tls_error(refusal.value, "node"), ConnectError)


def test_authorities_check_the_name(made: Certificate, other: Certificate) -> None:
    trusting = client_context(TLSConfig(authorities=made.certificate))
    shake_hands(trusting, server_context(serving(made)), "node.example.org")
    shake_hands(trusting, server_context(serving(made)), "10.1.2.3")
    for server, name in ((made, "elsewhere.example.org"), (other, "localhost")):
        with pytest.raises(ssl.SSLCertVerificationError) as refusal:
            shake_hands(trusting, server_context(serving(server)), name)
        error = map_tls_error(refusal.value, "node:7077")
        assert isinstance(error, AuthenticationError)
        assert error.peer == "node:7077"


def test_the_systems_authorities_do_not_know_a_made_certificate(made: Certificate) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client_context(TLSConfig()), server_context(serving(made)))


def test_mutual_tls(made: Certificate, other: Certificate) -> None:
    demanding = server_context(serving(made, authorities=other.certificate))
    pin = made.fingerprint
    known = TLSConfig(fingerprints=(pin,), certificate=other.certificate, key=other.key)
    shake_hands(client_context(known), demanding)
    for unknown in (
        TLSConfig(fingerprints=(pin,)),
        TLSConfig(fingerprints=(pin,), certificate=made.certificate, key=made.key),
    ):
        with pytest.raises(ssl.SSLError) as refusal:
            shake_hands(client_context(unknown), demanding)
        assert isinstance(map_tls_error(refusal.value, "client"), AuthenticationError)


def test_the_key_is_closed_and_nothing_is_overwritten(tmp_path: Path) -> None:
    first = make_certificate(tmp_path / "new" / "folder")
    if os.name == "posix":
        assert stat.S_IMODE(first.key.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists"):
        make_certificate(tmp_path / "new" / "folder")
    again = make_certificate(tmp_path / "new" / "folder", replace=True)
    assert again.fingerprint != first.fingerprint
    server_context(serving(again))


def test_what_is_in_it(made: Certificate) -> None:
    read = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    names = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"node.example.org", "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    assert {"10.1.2.3", "127.0.0.1", "::1"} <= {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    assert "sha256:" + read.fingerprint(hashes.SHA256()).hex() == made.fingerprint
    assert timedelta(days=729) < made.expires - datetime.now(UTC) < timedelta(days=731)
    with pytest.raises(UsageError, match="cannot be in a certificate"):
        make_certificate(made.certificate.parent / "x", names=["bücher.example"])


@pytest.mark.parametrize(
    "write", [str, str.upper, lambda f: f[7:], lambda f: ":".join(_pairs(f[7:])).upper()]
)
def test_fingerprints_are_read_as_people_write_them(made: Certificate, write: object) -> None:
    text = write(made.fingerprint)  # type: ignore[operator]
    assert parse_fingerprint(f" {text}\n").hex() == made.fingerprint[7:]


def _pairs(digits: str) -> list[str]:
    return [digits[i : i + 2] for i in range(0, len(digits), 2)]


@pytest.mark.parametrize("text", ["", "sha256:", "sha1:00", "ab" * 31, "ab" * 33, "zz" * 32])
def test_other_texts_are_no_fingerprints(text: str) -> None:
    with pytest.raises(UsageError, match="fingerprint"):
        client_context(TLSConfig(fingerprints=(text,)))


def test_files_that_cannot_serve(made: Certificate, other: Certificate, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a certificate"):
        server_context(TLSConfig())
    with pytest.raises(UsageError, match="cannot be read"):
        server_context(TLSConfig(certificate=tmp_path / "absent.pem"))
    with pytest.raises(UsageError, match="not a certificate and its key"):
        server_context(TLSConfig(certificate=made.certificate, key=other.key))
    with pytest.raises(UsageError, match="holds no key, and none was named"):
        server_context(TLSConfig(certificate=made.certificate))
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("nothing")
    garbage.chmod(0o600)
    with pytest.raises(UsageError, match="not a certificate and its key"):
        server_context(TLSConfig(certificate=garbage))
    with pytest.raises(UsageError, match="authorities"):
        client_context(TLSConfig(authorities=garbage))


def test_an_open_key_is_refused(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    made.key.chmod(0o644)
    with pytest.raises(UsageError, match="every user"):
        server_context(serving(made))


def test_an_encrypted_key_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    key = ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(b"password")
    made.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    )
    with pytest.raises(UsageError, match="encrypted"):
        server_context(serving(made))
