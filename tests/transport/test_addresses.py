from __future__ import annotations

import pytest

from splitinfer.errors import UsageError
from splitinfer.transport import Address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("node.example:7077", Address("tcp", "node.example", 7077)),
        ("127.0.0.1:0", Address("tcp", "127.0.0.1", 0)),
        ("tcp://host:1", Address("tcp", "host", 1)),
        ("[::1]:7077", Address("tcp", "::1", 7077)),
        ("[fe80::1%eth0]:65535", Address("tcp", "fe80::1%eth0", 65535)),
        ("unix:/run/node.sock", Address("unix", "/run/node.sock")),
        ("memory:a:b", Address("memory", "a:b")),
    ],
)
def test_addresses_are_read_and_written(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":7077",
        "host:",
        "host:x",
        "host:70000",
        "host:-1",
        "::1:7077",
        "a:7077 b:7077",
        "unix:",
        "memory:",
        "host:١",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Address.parse(text)
    assert caught.value.remedy


def test_local_addresses() -> None:
    local = ["localhost:1", "127.0.0.1:1", "127.5.5.5:1", "[::1]:1", "unix:/a", "memory:a"]
    assert all(Address.parse(text).is_local for text in local)
    assert not any(Address.parse(text).is_local for text in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "host:1"))
