"""When the proxy of an emulated link lets bytes go, on a clock of the test's own: exact on any machine.

The sockets are true ones, Unix sockets: what is sent is there at once. Where the proxy would sleep, the clock
jumps to the end of it.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from splitinfer.transport import link_proxy
from splitinfer.transport.link_proxy import Plan, Proxy

ROW = 5632
EXACT = 0.0002
TURN_SECONDS = 1e-6  # what a turn of the proxy takes


class World:
    """A client, a server that the test plays, and the proxy between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **plan: Any) -> None:
        self.now = 1000.0
        monkeypatch.setattr(link_proxy, "_STAMP", 0)  # the kernel's clock is not ours
        monkeypatch.setattr(link_proxy, "perf_counter", lambda: self.now)
        monkeypatch.setattr(link_proxy, "select", SimpleNamespace(select=self._select))
        self.directory = TemporaryDirectory()  # a name short enough for a socket
        self.target, listener = (socket.socket(socket.AF_UNIX) for _ in range(2))
        for name, one in (("target", self.target), ("proxy", listener)):
            one.bind(f"{self.directory.name}/{name}")
            one.listen()
        self.proxy = Proxy(Plan(self.target.getsockname(), 0, unix=True, **plan), listener)
        self.proxy._random = Random(0)
        self.parent, self._parents = socket.socketpair()
        self.client = socket.socket(socket.AF_UNIX)
        self.client.connect(listener.getsockname())
        while not self.proxy._connections or self.proxy._connections[0].connecting:
            self._step()
        self.server, _ = self.target.accept()

    def _select(self, readers: Any, writers: Any, _: Any, timeout: float | None) -> tuple[Any, Any, Any]:
        """What is ready now; where nothing is, the sleep is over at once and the clock says so."""
        found = select.select(readers, writers, [], 0)
        self.now += TURN_SECONDS
        if not found[0] and not found[1]:
            assert timeout is not None, "the proxy waits for what never comes"
            self.now += timeout
        return found

    def _step(self) -> None:
        assert self.proxy.step(self.parent.fileno())

    def reaches(self, end: socket.socket, nbytes: int) -> bytes:
        """Run the link until so many bytes have come."""
        end.settimeout(0.0)
        data = bytearray()
        while len(data) < nbytes:
            self._step()
            while select.select([end], [], [], 0)[0] and (piece := end.recv(nbytes - len(data))):
                data += piece
                if len(data) == nbytes:
                    break
        return bytes(data)

    def next_piece(self) -> bytes:
        """What the server finds when it looks after every turn of the link."""
        while not select.select([self.server], [], [], 0)[0]:
            self._step()
        return self.server.recv(100)

    def round_trip(self, nbytes: int = ROW) -> float:
        start = self.now
        self.client.sendall(b"x" * nbytes)
        self.server.sendall(self.reaches(self.server, nbytes))
        assert self.reaches(self.client, nbytes) == b"x" * nbytes
        return self.now - start

    def close(self) -> None:
        self.proxy.close()
        for one in (self.parent, self._parents, self.client, self.server, self.target):
            one.close()
        self.directory.cleanup()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    with ExitStack() as worlds:

        def make(**plan: Any) -> World:
            world = World(monkeypatch, **plan)
            worlds.callback(world.close)
            return world

        yield make


@pytest.mark.parametrize("delay", [0.0001, 0.001, 0.01])
def test_the_delay_is_that_of_both_ways(world: Callable[..., World], delay: float) -> None:
    link = world(delay=delay)
    link.round_trip()
    for _ in range(5):
        assert link.round_trip() == pytest.approx(2 * delay, abs=EXACT)


def test_connecting_costs_a_round_trip_as_well(world: Callable[..., World]) -> None:
    start = (link := world(delay=0.015)).now
    link.round_trip()
    assert link.now - start == pytest.approx(0.06, abs=EXACT)


def test_jitter_spreads_evenly_around_the_delay(world: Callable[..., World]) -> None:
    link = world(delay=0.002, jitter=0.001)
    link.round_trip()
    times = sorted(link.round_trip(100) for _ in range(100))
    assert 0.002 - EXACT < times[0] < 0.0026
    assert times[50] == pytest.approx(0.004, abs=0.0004)
    assert 0.0054 < times[-1] < 0.006 + EXACT


def test_bandwidth_holds_each_way(world: Callable[..., World]) -> None:
    link = world(bandwidth=12.5e6)
    assert link.round_trip() == pytest.approx(2 * ROW / 12.5e6, abs=EXACT)
    start = link.now
    nbytes = 20 * ROW
    link.client.sendall(bytes(nbytes))
    link.reaches(link.server, nbytes)
    assert link.now - start == pytest.approx(nbytes / 12.5e6, rel=0.02)


def test_slices_go_one_by_one(world: Callable[..., World]) -> None:
    link = world(slice_nbytes=3)
    link.client.sendall(b"0123456789")
    pieces = [link.next_piece() for _ in range(4)]
    assert pieces == [b"012", b"345", b"678", b"9"]


def test_a_stall_holds_everything_once_each_way(world: Callable[..., World]) -> None:
    link = world(stall_after=1000, stall_for=0.2)
    assert link.round_trip(900) < EXACT
    assert link.round_trip(900) == pytest.approx(0.4, abs=EXACT)
    assert link.round_trip(900) < EXACT
