"""TLS 1.3 for a connection: contexts for both ends, certificates pinned by fingerprint, and making one.

Three ways to trust, none of them by default open:
- home: `make_certificate` on the server, its fingerprint on the client. Nobody else signs anything.
- company: `authorities` on both sides; the server then demands a client certificate (mutual TLS).
- public names: neither given; the client trusts the system's authorities and checks the host name.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from splitinfer.errors import AuthenticationError, ConnectError, TransportError, UsageError
from splitinfer.transport.security import refuse_readable_by_others

if TYPE_CHECKING:
    from cryptography import x509

__all__ = [
    "Certificate",
    "TLSConfig",
    "channel_binding",
    "check_peer",
    "client_context",
    "make_certificate",
    "map_tls_error",
    "parse_fingerprint",
    "server_binding",
    "server_context",
]

_PREFIX: Final = "sha256:"
_CLOCK_SKEW: Final = timedelta(hours=1)


@dataclass(frozen=True)
class TLSConfig:
    """Files are PEM. What each end needs:

    - server: `certificate` and `key`; with `authorities` it demands a client certificate that they signed.
    - client: `fingerprints` accepts exactly those server certificates; `authorities` what they signed, for
      the host name dialled or `server_name`; neither, the system's authorities. `certificate` and `key` where
      the server demands them.
    """

    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    authorities: str | os.PathLike[str] | None = None
    fingerprints: tuple[str, ...] = ()
    server_name: str | None = None


@dataclass(frozen=True)
class Certificate:
    """A certificate that `make_certificate` wrote. `fingerprint` is `sha256:` and 64 hex digits."""

    certificate: Path
    key: Path
    fingerprint: str
    names: tuple[str, ...]
    expires: datetime


def parse_fingerprint(text: str) -> bytes:
    """32 bytes from `sha256:ab12...`, with or without the prefix, colons, blanks or capitals."""
    digits = text.strip().lower().removeprefix(_PREFIX).replace(":", "").replace(" ", "")
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise UsageError(
            f"{text!r} is not the SHA-256 fingerprint of a certificate",
            remedy="Copy the line that `splitinfer cert` printed: sha256: and 64 hex digits.",
        )
    return raw


def server_context(tls: TLSConfig) -> ssl.SSLContext:
    """Raises UsageError for files that are missing, open to others, or no certificates."""
    if tls.certificate is None:
        raise UsageError("a TLS server needs a certificate", remedy="Make one with `splitinfer cert`.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Connections live for hours: a resumed session would save nothing, and its ticket is one more secret.
    context.num_tickets = 0
    _load_own(context, tls)
    if tls.authorities is not None:
        _load_authorities(context, tls.authorities)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(tls: TLSConfig) -> ssl.SSLContext:
    """Raises UsageError as `server_context` does.

    With `fingerprints` the context itself accepts any certificate: `check_peer` must follow before a byte is
    sent.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if tls.fingerprints:
        for fingerprint in tls.fingerprints:
            parse_fingerprint(fingerprint)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.authorities is not None:
        _load_authorities(context, tls.authorities)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if tls.certificate is not None:
        _load_own(context, tls)
    return context


def check_peer(certificate: bytes | None, tls: TLSConfig, peer: str) -> None:
    """On a client, right after the TLS handshake: raise AuthenticationError unless the pin fits.

    `certificate` is the server's, in DER (`SSLObject.getpeercert(True)`).
    """
    if not tls.fingerprints:
        return
    found = hashlib.sha256(certificate or b"").digest()
    pins = [parse_fingerprint(fingerprint) for fingerprint in tls.fingerprints]
    if not certificate or not any(hmac.compare_digest(found, pin) for pin in pins):
        raise AuthenticationError(
            f"{peer} shows another certificate than the one pinned: {_PREFIX}{found.hex()}",
            peer=peer,
            remedy="Compare with the fingerprint on the server itself; if they differ, do not connect.",
        )


def channel_binding(certificate: bytes | None) -> bytes:
    """What both ends of a TLS connection know: the SHA-256 of the server's certificate, given in DER."""
    return hashlib.sha256(certificate).digest() if certificate else b""


def server_binding(tls: TLSConfig | None) -> bytes:
    """`channel_binding` of a server's own certificate; empty without TLS."""
    if tls is None or tls.certificate is None:
        return b""
    return channel_binding(_first_certificate(Path(tls.certificate)))


def map_tls_error(error: ssl.SSLError, peer: str) -> TransportError:
    """The error of splitinfer's tree for one that ssl raised while a connection was made."""
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationError(
            f"the certificate of {peer} is not trusted: {error.verify_message}",
            peer=peer,
            remedy="Pin it by its fingerprint, or name the authority that signed it.",
        )
    if "alert" in reason and any(word in reason for word in ("certificate", "unknown ca", "access denied")):
        return AuthenticationError(
            f"{peer} does not accept our certificate: {reason}",
            peer=peer,
            remedy="Give a client certificate that its authority signed.",
        )
    if "did not return a certificate" in reason:
        return AuthenticationError(f"{peer} shows no certificate", peer=peer)
    return ConnectError(
        f"no TLS 1.3 with {peer}: {reason}", peer=peer, remedy="Use TLS on both ends, or on neither."
    )


def make_certificate(
    directory: str | os.PathLike[str], *, names: Sequence[str] = (), days: int = 730, replace: bool = False
) -> Certificate:
    """Write `cert.pem` and `key.pem` (readable by the owner only): self-signed, ECDSA P-256, for both roles.

    `names` are the host names and addresses that clients dial, beside this machine's name and loopback; a
    client that pins the fingerprint does not look at them. Raises UsageError where files exist and `replace`
    is false.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder = Path(directory)
    files = folder / "cert.pem", folder / "key.pem"
    for file in files:
        if file.exists() and not replace:
            raise UsageError(f"{file} exists", remedy="Choose another folder, or replace it with --replace.")
    named = tuple(dict.fromkeys([*names, socket.gethostname(), "localhost", "127.0.0.1", "::1"]))
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, named[0][:64])])
    now = datetime.now(UTC)
    expires = now + timedelta(days=days)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in named]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        # Tells it apart from other nodes' certificates of the same name, where a client trusts several.
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(files[0], made.public_bytes(serialization.Encoding.PEM), 0o644)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(files[1], secret, 0o600)
    return Certificate(*files, _PREFIX + made.fingerprint(hashes.SHA256()).hex(), named, expires)


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise UsageError(
            f"{name!r} cannot be in a certificate", remedy="Give a host name or an address."
        ) from None


def _load_own(context: ssl.SSLContext, tls: TLSConfig) -> None:
    certificate, key = Path(tls.certificate or ""), Path(tls.key or tls.certificate or "")
    try:
        held = certificate.read_bytes() if tls.key is None else b""
        if b"BEGIN CERTIFICATE" in held and b"PRIVATE KEY" not in held:
            raise UsageError(
                f"{certificate} holds no key, and none was named",
                remedy="Name the key's file too (--tls-key).",
            )
        refuse_readable_by_others(key)
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except ssl.SSLError as error:
        raise UsageError(
            f"{certificate} and {key} are not a certificate and its key: {error.reason or error}",
            remedy="Make a pair with `splitinfer cert`.",
        ) from error
    except OSError as error:
        raise UsageError(
            f"{error.filename or certificate} cannot be read: {error.strerror}",
            remedy="Make a certificate with `splitinfer cert`.",
        ) from error


def _refuse_password() -> str:
    # Without this OpenSSL would ask on the terminal, and a server without one would hang.
    raise UsageError(
        "the key is encrypted", remedy="Decrypt it with `openssl pkey`, and close the file to others."
    )


def _load_authorities(context: ssl.SSLContext, authorities: str | os.PathLike[str]) -> None:
    try:
        context.load_verify_locations(cafile=authorities)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(
            f"{os.fspath(authorities)} holds no certificates of authorities",
            remedy="Name a PEM file with the certificate of the authority that signed the peer's.",
        ) from error


def _first_certificate(file: Path) -> bytes:
    pem = file.read_text(encoding="ascii", errors="replace")
    end = "-----END CERTIFICATE-----"
    start = pem.find("-----BEGIN CERTIFICATE-----")
    return ssl.PEM_cert_to_DER_cert(pem[start : pem.index(end, start) + len(end)])


def _write(file: Path, content: bytes, mode: int) -> None:
    """Never open to others, not even for the moment between writing and closing the permissions."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)
