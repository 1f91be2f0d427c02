"""The throughput of a connection's link, as the kernel has seen it."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress
from typing import Final

__all__ = ["delivery_rate"]

# Offsets in Linux's struct tcp_info (linux/tcp.h).
_APP_LIMITED_AT: Final = 7
_DELIVERY_RATE_AT: Final = 160
_NBYTES: Final = 168


def delivery_rate(sock: socket.socket) -> float | None:
    """Bytes/s of the last measurement; None where the kernel cannot tell.

    A rate that was limited by the sender, not by the link, is marked as such and says nothing.
    """
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    with suppress(OSError):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _NBYTES)
        if len(info) == _NBYTES and not info[_APP_LIMITED_AT] & 1:
            return float(int.from_bytes(info[_DELIVERY_RATE_AT:], sys.byteorder)) or None
    return None
