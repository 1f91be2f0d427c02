from __future__ import annotations

import random
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from splitinfer.errors import ConnectionLost
from splitinfer.transport.protocol import Connection
from tests.transport import fuzz
from tests.transport.fuzz import CORPUS, Finding, Role
from tests.transport.seeds import large_streams, small_streams

FILES = sorted(CORPUS.glob("*.bin"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_input_of_the_corpus(file: Path) -> None:
    for nbytes in (1, 64, 1 << 20):
        fuzz.execute(fuzz.role_of(file), file.read_bytes(), partial(int, nbytes))


def test_the_corpus_is_what_this_version_speaks() -> None:
    """Seeds of an older wire would all end at their first frame, and the fuzzer would test nothing."""
    for name, role, stream in small_streams():
        kept = (CORPUS / f"{name}.bin").read_bytes()
        assert len(fuzz.frames_of(kept)) == len(fuzz.frames_of(stream))
        connection = fuzz.connection_of(role)
        with pytest.raises(ConnectionLost, match=r"closed the connection$"):
            fuzz.feed_whole(connection, kept, lambda: 1 << 20)
        assert connection.open


def test_damaged_streams_raise_nothing_but_what_is_listed() -> None:
    fuzz.run(3_000, seed=20_261_121)


def test_damaged_streams_with_bodies_in_pieces() -> None:
    corpus = [(role, stream) for _, role, stream in large_streams()]
    fuzz.run(300, seed=7, corpus=corpus)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_damaged_streams() -> None:
    fuzz.run(1_000_000, seed=random.randrange(1 << 32))


def test_the_same_seed_gives_the_same_inputs() -> None:
    corpus = fuzz.load_corpus()
    one, two, other = (list(islice(fuzz.mutations(corpus, random.Random(seed)), 50)) for seed in (1, 1, 2))
    assert one == two != other
    assert {role for role, _ in one} == {"client", "server"}


@pytest.mark.parametrize("role", ["client", "server"])
def test_an_exception_that_is_not_listed_is_a_finding(role: Role, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Connection, nbytes: int) -> list[object]:
        raise IndexError("off by one")

    monkeypatch.setattr(Connection, "received", broken)
    with pytest.raises(Finding, match="IndexError: off by one") as finding:
        fuzz.execute(role, b"SI" + bytes(62), lambda: 64)
    assert finding.value.data == b"SI" + bytes(62)


def test_an_input_that_takes_too_long_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS_PER_INPUT", 0.0)
    with pytest.raises(Finding, match="took"):
        fuzz.execute("server", b"", lambda: 64)
