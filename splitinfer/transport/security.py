"""Who may talk: the shared token, its challenge in both directions, and the rule for open ports.

Token. Both ends hold the same secret, read from a file or the environment, never from the command line. It
does not travel: each end proves that it knows it by an HMAC-SHA256 (RFC 2104) over everything both have said
so far, their nonces first of all (challenge and response in both directions, as in ISO/IEC 9798-4). The role
is part of the message, so that a proof cannot be reflected, and so is the channel: under TLS the SHA-256 of
the server's certificate, so that a proof given to one server is worth nothing at another. (RFC 9266's
`tls-exporter` would bind to the very session; Python's ssl does not offer it.)

The client proves first: a server does nothing for a stranger but compare 32 bytes, in constant time, before
any tensor is parsed. Certificates and TLS are in `certificates.py`; the threat model is in docs/security.md.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from splitinfer.errors import ConfigError, UsageError

__all__ = [
    "MIN_TOKEN_NBYTES",
    "PROOF_NBYTES",
    "Role",
    "Token",
    "TokenAuthenticator",
    "check_exposure",
    "is_loopback",
    "load_token",
    "refuse_readable_by_others",
]

Role = Literal["client", "server"]

PROOF_NBYTES: Final = 32
# A server that only pretends sees one proof and can try tokens against it at leisure: 16 random bytes end
# that.
MIN_TOKEN_NBYTES: Final = 16
_MAX_TOKEN_NBYTES: Final = 4096
_CONTEXT: Final = b"splitinfer token proof 1\0"
_MAKE_ONE: Final = "Make one with `splitinfer cert`, or `openssl rand -hex 32 > token; chmod 600 token`."


class Token:
    """The shared secret. It shows itself in no repr, str or pickle, and compares in constant time."""

    __slots__ = ("_secret",)

    def __init__(self, secret: str | bytes) -> None:
        """White space around it does not count. Raises UsageError for one too short or too long."""
        raw = (secret.encode() if isinstance(secret, str) else bytes(secret)).strip()
        if not MIN_TOKEN_NBYTES <= len(raw) <= _MAX_TOKEN_NBYTES:
            raise UsageError(
                f"a token has {MIN_TOKEN_NBYTES} to {_MAX_TOKEN_NBYTES} bytes, this one has {len(raw)}",
                remedy=_MAKE_ONE,
            )
        self._secret = raw

    @classmethod
    def generate(cls) -> tuple[Token, str]:
        """A fresh token of 256 random bits, and the text to keep in a file."""
        text = secrets.token_hex(32)
        return cls(text), text

    def mac(self, message: bytes) -> bytes:
        """HMAC-SHA256 of `message` under this token."""
        return hmac.digest(self._secret, message, "sha256")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(hashlib.sha256(self._secret).digest())

    def __repr__(self) -> str:
        return "Token(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a token is not to be copied out of the process")


def load_token(
    path: str | os.PathLike[str] | None = None, *, environ: Mapping[str, str] | None = None
) -> Token | None:
    """The token from the file at `path`, else from `SPLITINFER_TOKEN`; None where neither is given.

    Raises UsageError for a file that is missing, too short, or readable by every user of this machine.
    """
    environ = os.environ if environ is None else environ
    if path is None:
        text = environ.get("SPLITINFER_TOKEN", "")
        if not text.strip():
            return None
        try:
            return Token(text)
        except UsageError as error:
            raise ConfigError(
                f"environment variable SPLITINFER_TOKEN: {error}", remedy=error.remedy
            ) from None
    file = Path(path)
    try:
        refuse_readable_by_others(file)
        with file.open("rb") as stream:
            raw = stream.read(_MAX_TOKEN_NBYTES + 1)
    except OSError as error:
        raise UsageError(f"token file {file} cannot be read: {error.strerror}", remedy=_MAKE_ONE) from error
    try:
        return Token(raw)
    except UsageError as error:
        raise UsageError(f"token file {file}: {error}", remedy=error.remedy) from None


def refuse_readable_by_others(file: Path) -> None:
    """Raise UsageError where a secret lies open to every user of this machine. A group may read it."""
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & stat.S_IRWXO:
        raise UsageError(
            f"{file} is open to every user of this machine", remedy=f"Close it with `chmod 600 {file}`."
        )


class TokenAuthenticator:
    """Proves and checks knowledge of one token: what the handshake asks for (`handshake.Authenticator`)."""

    __slots__ = ("_token",)

    def __init__(self, token: Token) -> None:
        self._token = token

    def prove(self, role: Role, transcript: bytes) -> bytes:
        """The proof, `PROOF_NBYTES` long, that the end in this role knows the token.

        `transcript` is what both ends have said so far, nonces included, and what identifies their channel
        (`certificates.channel_binding`).
        """
        # Fields of fixed length: no two different inputs make the same message.
        return self._token.mac(_CONTEXT + role.encode().ljust(8, b"\0") + hashlib.sha256(transcript).digest())

    def verify(self, role: Role, transcript: bytes, proof: bytes) -> bool:
        """True where `proof` is what the peer in `role` had to send; compared in constant time."""
        return hmac.compare_digest(proof, self.prove(role, transcript))


def is_loopback(host: str) -> bool:
    """True where `host` is this machine's alone. Names other than localhost are not looked up."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        # A scope ("%eth0") says nothing about reach; an IPv4 address in IPv6 clothes counts as what it is.
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def check_exposure(address: str, *, token: object | None, tls: object | None, insecure: bool = False) -> None:
    """Refuse to listen beyond this machine without a token and TLS, unless told to.

    `address` is as for `serve`: `host:port`, `[::1]:port`, `unix:/path` or `memory:name`. Raises UsageError
    that names what is missing and the remedy.
    """
    if insecure or address.startswith(("unix:", "memory:")) or is_loopback(address.rpartition(":")[0]):
        return
    missing = [name for name, given in (("token", token), ("TLS", tls)) if given is None]
    if missing:
        raise UsageError(
            f"{address} can be reached from other machines, and there is no {' and no '.join(missing)}",
            remedy="Run `splitinfer cert` and give its files with --token-file, --tls-cert and --tls-key; "
            "or listen on 127.0.0.1; or say --insecure on a network that you trust.",
        )
