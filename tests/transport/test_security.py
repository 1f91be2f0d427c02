from __future__ import annotations

import hashlib
import hmac
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitinfer.errors import ConfigError, UsageError
from splitinfer.transport.security import (
    PROOF_NBYTES,
    Role,
    Token,
    TokenAuthenticator,
    check_exposure,
    is_loopback,
    load_token,
)

SECRET = "correct horse battery staple"
TOKEN = Token(SECRET)
OURS = TokenAuthenticator(TOKEN)
TRANSCRIPT = b"what both ends said"


def test_a_proof_is_the_documented_hmac() -> None:
    message = b"splitinfer token proof 1\0client\0\0" + hashlib.sha256(TRANSCRIPT).digest()
    assert OURS.prove("client", TRANSCRIPT) == hmac.new(SECRET.encode(), message, "sha256").digest()


@pytest.mark.parametrize("role", ["client", "server"])
def test_both_ends_accept_each_other(role: Role) -> None:
    proof = OURS.prove(role, TRANSCRIPT)
    assert len(proof) == PROOF_NBYTES
    assert TokenAuthenticator(Token(SECRET + "\n")).verify(role, TRANSCRIPT, proof)


def test_a_proof_for_anything_else_is_refused() -> None:
    proof = OURS.prove("client", TRANSCRIPT)
    assert not TokenAuthenticator(Token(SECRET + "r")).verify("client", TRANSCRIPT, proof)
    assert not OURS.verify("server", TRANSCRIPT, proof)  # reflected
    assert not OURS.verify("client", TRANSCRIPT + b"x", proof)  # replayed, or relayed over another channel
    assert not OURS.verify("client", b"", proof)


@pytest.mark.parametrize("proof", [b"", b"\0" * 31, b"\0" * 32, b"\0" * 33, b"\xff" * 4096])
def test_proofs_of_any_length_are_refused_alike(proof: bytes) -> None:
    assert not OURS.verify("client", TRANSCRIPT, proof)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_transcripts_cannot_be_confused(one: bytes, other: bytes) -> None:
    assert OURS.verify("client", one, OURS.prove("client", other)) == (one == other)


def test_a_token_shows_itself_nowhere() -> None:
    assert SECRET not in repr(TOKEN) + str(TOKEN) + f"{TOKEN!r:>40}"
    with pytest.raises(TypeError):
        pickle.dumps(TOKEN)
    assert Token(SECRET) == TOKEN != Token(SECRET + "r")
    assert len({TOKEN, Token(SECRET)}) == 1


def test_short_tokens_are_refused_without_being_shown() -> None:
    with pytest.raises(UsageError, match="this one has 7") as refusal:
        Token("hunter2\n")
    assert "hunter2" not in str(refusal.value)
    with pytest.raises(UsageError):
        Token("x" * 5000)


def test_generated_tokens_differ_and_load_back(tmp_path: Path) -> None:
    (token, text), (other, _) = Token.generate(), Token.generate()
    assert token != other
    file = tmp_path / "token"
    file.write_text(text + "\n")
    file.chmod(0o600)
    assert load_token(file, environ={}) == token


def test_where_a_token_comes_from(tmp_path: Path) -> None:
    assert load_token(environ={}) is None
    assert load_token(environ={"SPLITINFER_TOKEN": "  "}) is None
    assert load_token(environ={"SPLITINFER_TOKEN": SECRET}) == TOKEN
    with pytest.raises(ConfigError, match="SPLITINFER_TOKEN"):
        load_token(environ={"SPLITINFER_TOKEN": "short"})
    file = tmp_path / "token"
    file.write_text("another secret, long enough")
    file.chmod(0o640)
    assert load_token(file, environ={"SPLITINFER_TOKEN": SECRET}) == Token("another secret, long enough")


def test_token_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_token(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be read"):
        load_token(tmp_path)
    file = tmp_path / "token"
    file.write_text("short")
    file.chmod(0o600)
    with pytest.raises(UsageError, match=r"token.*this one has 5"):
        load_token(file)
    file.write_bytes(b"x" * 100_000)
    with pytest.raises(UsageError):
        load_token(file)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o666, 0o602])
def test_a_token_file_open_to_everybody_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    file.chmod(mode)
    with pytest.raises(UsageError, match="every user") as refusal:
        load_token(file)
    assert "chmod 600" in refusal.value.remedy


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.9.10", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("LOCALHOST.", True), ("::ffff:127.0.0.1", True), ("::1%lo", True),
        ("0.0.0.0", False), ("::", False), ("", False), ("192.168.1.5", False), ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False), ("example.org", False), ("localhost.example.org", False),
        ("127.1", False),
    ],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


SAFE = ["127.0.0.1:7077", "[::1]:7077", "localhost:0", "unix:/run/node.sock", "memory:pair"]
EXPOSED = ["0.0.0.0:7077", "[::]:7077", ":7077", "192.168.1.5:7077", "node.example.org:7077"]


@pytest.mark.parametrize("address", SAFE)
def test_on_this_machine_nothing_is_demanded(address: str) -> None:
    check_exposure(address, token=None, tls=None)


@pytest.mark.parametrize("address", EXPOSED)
def test_beyond_it_token_and_tls_are_demanded(address: str) -> None:
    encrypted = object()
    check_exposure(address, token=TOKEN, tls=encrypted)
    check_exposure(address, token=None, tls=None, insecure=True)
    cases = [(None, encrypted, "no token"), (TOKEN, None, "no TLS"), (None, None, "no token and no TLS")]
    for token, tls, missing in cases:
        with pytest.raises(UsageError, match=missing) as refusal:
            check_exposure(address, token=token, tls=tls)
        assert refusal.value.exit_code == 2
        for way_out in ("splitinfer cert", "127.0.0.1", "--insecure"):
            assert way_out in refusal.value.remedy
