from __future__ import annotations

import socket
import sys
import threading

import pytest

from splitinfer.transport.link_rate import delivery_rate

linux = pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO's rate is Linux's")


def transfer(sender: socket.socket, receiver: socket.socket, nbytes: int) -> None:
    def drain() -> None:
        left = nbytes
        while left:
            left -= len(receiver.recv(1 << 20))

    reader = threading.Thread(target=drain)
    reader.start()
    sender.sendall(bytes(nbytes))
    reader.join()


@linux
def test_a_busy_connection_has_a_rate_and_a_silent_one_has_none() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), timeout=10) as sender,
    ):
        receiver, _ = listener.accept()
        with receiver:
            receiver.settimeout(10)
            assert delivery_rate(sender) is None
            seen = []
            for _ in range(20):  # the end of a transfer may be limited by the sender, and then says nothing
                transfer(sender, receiver, 8 << 20)
                seen.append(delivery_rate(sender))
            rates = [rate for rate in seen if rate is not None]
            assert all(1e3 < rate < 1e12 for rate in rates)


def test_a_socket_pair_has_none() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.send(b"x")
        assert delivery_rate(one) is None


@linux
def test_a_closed_socket_has_none() -> None:
    sock = socket.socket()
    sock.close()
    assert delivery_rate(sock) is None
