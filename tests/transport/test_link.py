from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from splitinfer.errors import CapacityError, UsageError
from splitinfer.transport.link import EmulatedLink, LinkSpec, parse_bandwidth, parse_duration
from tests.patience import at_its_best

ROW = 5632


class EchoServer:
    """Echoes every connection on threads of its own; counts what it saw."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.endings: list[str] = []
        self._closing = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._closing:
                connection.close()
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            try:
                while data := connection.recv(1 << 18):
                    connection.sendall(data)
                self.endings.append("closed")
            except ConnectionResetError:
                self.endings.append("reset")

    def close(self) -> None:
        """A thread left in `accept` might take a connection of the next socket with this one's number."""
        self._closing = True
        dial(self.port).close()
        self._accepting.join()
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with closing(EchoServer()) as server:
        yield server


def dial(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (piece := connection.recv(count - len(data))):
        data += piece
    return bytes(data)


def read_until_reset(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(4096):
            data += piece
    except ConnectionResetError:
        return data
    pytest.fail("the stream ended without a reset")


def round_trip(connection: socket.socket, nbytes: int = ROW) -> float:
    start = time.perf_counter()
    connection.sendall(b"x" * nbytes)
    assert len(read_exactly(connection, nbytes)) == nbytes
    return time.perf_counter() - start


def median_round_trip(port: int, count: int, pause: float = 0.0) -> float:
    with dial(port) as connection:
        round_trip(connection)
        times = []
        for _ in range(count):
            time.sleep(pause)
            times.append(round_trip(connection))
    return sorted(times)[count // 2]


@pytest.mark.slow
@pytest.mark.parametrize("rtt", [0.0, 0.0002, 0.002, 0.02])
def test_the_median_delay_is_right_within_a_fifth_of_a_millisecond(echo: EchoServer, rtt: float) -> None:
    """On a machine with nothing else to do; test_link_proxy.py holds it on a clock of its own."""
    count = 30 if rtt >= 0.02 else 100
    tries = []
    with EmulatedLink(LinkSpec(rtt=rtt), echo.address) as link:
        for _ in range(6):  # what else the machine does comes and goes; a wrong delay stays
            # The ends themselves take longer to wake after a rest: what a round trip costs without the link,
            # so paced.
            own = median_round_trip(echo.port, 20, pause=rtt)
            excess = median_round_trip(link.port, count) - rtt
            if -0.0002 < excess < own + 0.0002:
                return
            tries.append((excess, own))
    pytest.fail(f"beyond the round trip, and that of the ends alone, in seconds: {tries}")


@pytest.mark.parametrize("spec", [LinkSpec(), LinkSpec(rtt=0.002), LinkSpec(0.02), LinkSpec(0.02, 0.02)])
def test_round_trips_are_delayed(echo: EchoServer, spec: LinkSpec) -> None:
    """Never too little; and, of many, one by hardly more, whatever else the machine does."""
    least = max(spec.rtt - spec.jitter - 0.0002, 0.0)
    with EmulatedLink(spec, echo.address) as link, dial(link.port) as connection:
        round_trip(connection)
        assert least <= at_its_best(lambda: round_trip(connection), spec.rtt + 0.002) < spec.rtt + 0.02


def test_bandwidth_holds_each_way(echo: EchoServer) -> None:
    nbytes = 1_000_000

    def transfer() -> float:
        start = time.perf_counter()
        sender = threading.Thread(target=connection.sendall, args=(bytes(nbytes),))
        sender.start()
        assert len(read_exactly(connection, nbytes)) == nbytes
        sender.join()
        return time.perf_counter() - start

    link = EmulatedLink(LinkSpec(bandwidth=100e6), echo.address)
    with link, dial(link.port) as connection:
        # The ways overlap: the echo follows piece by piece, and one after the other would take 0.16 s.
        assert 0.08 < at_its_best(transfer, 0.11, tries=20) < 0.15
        least = 2 * ROW / 12.5e6
        assert least < at_its_best(lambda: round_trip(connection), least + 0.0005) < least + 0.01


def test_connecting_costs_a_round_trip_as_well(echo: EchoServer) -> None:
    def connect_and_call() -> float:
        start = time.perf_counter()
        with dial(link.port) as connection:
            round_trip(connection)
        return time.perf_counter() - start

    with EmulatedLink(LinkSpec(rtt=0.03), echo.address) as link:
        assert 0.0595 < at_its_best(connect_and_call, 0.065, tries=20) < 0.085


def test_much_data_passes_whole_and_fast(echo: EchoServer) -> None:
    data = bytes(range(256)) * (1 << 16)
    with EmulatedLink(LinkSpec(rtt=0.001), echo.address) as link, dial(link.port) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        assert read_exactly(connection, len(data)) == data
        sender.join()


def test_slices_arrive_whole() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        EmulatedLink(LinkSpec(slice_nbytes=1), f"127.0.0.1:{listener.getsockname()[1]}") as link,
        dial(link.port) as connection,
    ):
        accepted, _ = listener.accept()
        accepted.settimeout(10)
        with accepted:
            connection.sendall(b"0123456789" * 10)
            pieces = []
            while sum(map(len, pieces)) < 100:
                pieces.append(accepted.recv(4096))
    assert b"".join(pieces) == b"0123456789" * 10


def test_a_reset_comes_after_exactly_that_many_bytes(echo: EchoServer) -> None:
    with (
        EmulatedLink(LinkSpec(reset_after=1000), echo.address) as link,
        dial(link.port) as connection,
    ):
        connection.sendall(b"x" * 600)
        assert len(read_exactly(connection, 600)) == 600
        connection.sendall(b"x" * 600)
        assert len(read_until_reset(connection)) <= 400
        with dial(link.port) as again:
            round_trip(again, 100)


def test_a_stall_holds_everything_once(echo: EchoServer) -> None:
    with (
        EmulatedLink(LinkSpec(stall_after=1000, stall_for=0.2), echo.address) as link,
        dial(link.port) as connection,
    ):
        round_trip(connection, 900)
        assert round_trip(connection, 900) >= 0.4  # both ways stall
        assert at_its_best(lambda: round_trip(connection, 900), 0.01) < 0.1


def test_the_end_of_a_stream_passes_after_the_data(echo: EchoServer) -> None:
    with EmulatedLink(LinkSpec(rtt=0.01), echo.address) as link, dial(link.port) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert read_exactly(connection, 10) == b"last words"
        assert connection.recv(1) == b""
    assert echo.endings == ["closed"]


def test_nobody_behind_the_link_is_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    # The reset may come while `dial` is still at work, or after it.
    with (
        EmulatedLink(LinkSpec(), f"127.0.0.1:{port}") as link,
        pytest.raises(ConnectionResetError),
        dial(link.port) as connection,
    ):
        connection.recv(1)


def test_close_resets_what_is_open_and_ends_the_process(echo: EchoServer) -> None:
    link = EmulatedLink(LinkSpec(), echo.address)
    link.start()
    with dial(link.port) as connection:
        round_trip(connection)
        link.close()
        link.close()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        dial(link.port)


def test_a_target_that_cannot_be_is_said_at_once() -> None:
    with pytest.raises(CapacityError, match="did not start"):
        EmulatedLink(LinkSpec(), "no.such.host.invalid:1").start()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20ms", 0.02), ("0.2ms", 0.0002), ("200us", 0.0002), ("1s", 1.0), (" 2 MS ", 0.002)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "20", "ms", "-1ms", "20 minutes", "61s", "1e3ms", "nan ms"])
def test_texts_that_are_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100mbit", 1e8), ("1gbit", 1e9), ("56kbit", 56e3), ("2.5 Gbps", 2.5e9), ("9600bit", 9600)],
)
def test_bandwidths(text: str, rate: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "100", "mbit", "-1mbit", "100mb", "0mbit", "9999999gbit"])
def test_texts_that_are_no_bandwidth(text: str) -> None:
    with pytest.raises(UsageError, match="bandwidth"):
        parse_bandwidth(text)


def test_specs_from_words_and_options() -> None:
    assert LinkSpec.parse("20ms") == LinkSpec(rtt=0.02)
    assert LinkSpec.parse("100mbit") == LinkSpec(bandwidth=1e8)
    assert LinkSpec.parse("20ms, 2ms, 100mbit") == LinkSpec(rtt=0.02, jitter=0.002, bandwidth=1e8)
    assert LinkSpec.from_options() is None
    assert LinkSpec.from_options(bandwidth="1gbit") == LinkSpec(bandwidth=1e9)
    assert LinkSpec.from_options(rtt="20ms", jitter="2ms") == LinkSpec(rtt=0.02, jitter=0.002)
    for text in ("", "1ms 2ms 3ms", "1mbit 2mbit", "fast"):
        with pytest.raises(UsageError):
            LinkSpec.parse(text)
    with pytest.raises(UsageError, match="jitter"):
        LinkSpec(rtt=0.001, jitter=0.002)
