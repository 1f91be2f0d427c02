from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from splitinfer.errors import CapacityError, ConnectError, UsageError
from splitinfer.transport import Address
from splitinfer.transport.endpoints import dial, listen, tune


def test_a_port_is_chosen_and_told() -> None:
    sock, address = listen(Address("tcp", "127.0.0.1", 0))
    with sock:
        assert address.port == sock.getsockname()[1] > 0
        assert not sock.getblocking()


def test_a_port_in_use() -> None:
    sock, address = listen(Address("tcp", "127.0.0.1", 0))
    with sock, pytest.raises(CapacityError, match=str(address.port)) as caught:
        listen(address)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        listen(Address("tcp", name, 0))


def test_a_socket_file_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    sock, _ = listen(Address("unix", str(path)))
    with sock:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_socket_file_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first, _ = listen(Address("unix", str(path)))
    first.close()
    assert path.exists()
    second, _ = listen(Address("unix", str(path)))
    second.close()


def test_a_socket_file_in_use_and_any_other_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first, _ = listen(Address("unix", str(path)))
    with first, pytest.raises(CapacityError):
        listen(Address("unix", str(path)))
    other = tmp_path / "notes.txt"
    other.write_text("keep me")
    with pytest.raises(CapacityError):
        listen(Address("unix", str(other)))
    assert other.read_text() == "keep me"
    with pytest.raises(UsageError):
        listen(Address("unix", str(tmp_path / "absent" / "socket")))


@pytest.mark.parametrize(
    "address", ["127.0.0.1:9", "unix:/nowhere/socket", "no-such-host.invalid:1", "memory:absent"]
)
def test_nobody_there(address: str) -> None:
    with pytest.raises(ConnectError) as caught:
        asyncio.run(dial(Address.parse(address)))
    assert caught.value.peer == address
    assert caught.value.remedy


def test_connections_answer_at_once_and_notice_death() -> None:
    async def work() -> None:
        listener, address = listen(Address("tcp", "127.0.0.1", 0))
        sock = await dial(address)
        with listener, sock:
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if sys.platform == "linux":
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 5000
                idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                count = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
                every = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
                assert idle + count * every <= 5

    asyncio.run(work())


@pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="the system has one congestion control")
def test_nothing_paces_packets_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def congestion_control(sock: socket.socket) -> bytes:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")

    with (
        socket.socket() as fresh,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sock,
    ):
        monkeypatch.setattr("splitinfer.transport.endpoints.is_loopback", lambda host: False)
        tune(sock)
        assert congestion_control(sock) == congestion_control(fresh)
        monkeypatch.undo()
        tune(sock)
        assert congestion_control(sock) == b"reno"


def test_options_that_a_system_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has neither TCP_USER_TIMEOUT nor TCP_KEEPIDLE."""
    for name in ("TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_NOTSENT_LOWAT"):
        monkeypatch.delattr(socket, name, raising=False)
    monkeypatch.setattr("splitinfer.transport.endpoints.sys.platform", "darwin")
    with socket.socket() as sock:
        tune(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_giving_up_leaves_no_socket_open() -> None:
    async def work() -> None:
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            task = asyncio.create_task(dial(Address("tcp", "10.255.255.1", 9)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert len(os.listdir("/dev/fd")) == before

    asyncio.run(work())
