"""Another network than the one at hand: delay, jitter, bandwidth, stalls, resets. In user space, without
root.

`LinkSpec` says what the link is like, `EmulatedLink` is a TCP proxy with those manners in front of one
address. The proxy is a process of its own (`link_proxy.py`): a thread would wait for the interpreter lock of
the very program that is being measured. Measured accuracy: docs/transport.md.

What it does not imitate: lost packets (TCP hides them as delay: use jitter and stalls) and the congestion
window's slow start.
"""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from splitinfer.errors import CapacityError, UsageError
from splitinfer.transport import link_proxy
from splitinfer.transport.addresses import Address

__all__ = ["EmulatedLink", "LinkSpec", "parse_bandwidth", "parse_duration"]

_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(us|µs|ms|s)", re.IGNORECASE)
_SECONDS: Final = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_BANDWIDTH: Final = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmg]?)(bit|bps|bit/s)", re.IGNORECASE)
_MULTIPLE: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_START_SECONDS: Final = 10.0
_MAX_DURATION: Final = 60.0


def parse_duration(text: str) -> float:
    """Seconds from "20ms", "1.5s" or "200us". Raises UsageError."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2].lower()] if match else -1.0
    if not 0 <= seconds <= _MAX_DURATION:
        raise UsageError(
            f"{text!r} is not a duration up to a minute", remedy="Write it as 20ms, 0.2ms or 1s."
        )
    return seconds


def parse_bandwidth(text: str) -> float:
    """Bits per second from "100mbit", "1gbit" or "56kbit" (powers of ten). Raises UsageError."""
    match = _BANDWIDTH.fullmatch(text.strip())
    rate = float(match[1]) * _MULTIPLE[match[2].lower()] if match else 0.0
    if not 1e3 <= rate <= 1e12:
        raise UsageError(f"{text!r} is not a bandwidth", remedy="Write it as 100mbit, 1gbit or 56kbit.")
    return rate


@dataclass(frozen=True)
class LinkSpec:
    """The manners of a link. All of them hold in each direction on its own.

    `rtt` is in seconds, half of it each way. `jitter`, in seconds, is how far a round trip may deviate: each
    way draws uniformly within half of it, and nothing overtakes. `bandwidth` is in bits per second, 0 for
    any.

    Faults, for tests: after `stall_after` bytes nothing moves for `stall_for` seconds; after `reset_after`
    bytes the connection is reset at both ends; bytes arrive `slice_nbytes` at a time (0: as they come). -1
    means never.
    """

    rtt: float = 0.0
    jitter: float = 0.0
    bandwidth: float = 0.0
    stall_after: int = -1
    stall_for: float = 0.0
    slice_nbytes: int = 0
    reset_after: int = -1

    def __post_init__(self) -> None:
        if self.jitter > self.rtt:
            raise UsageError(
                "the jitter is larger than the round trip", remedy="Make it smaller, or the rtt larger."
            )

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """A link from words: "20ms", "100mbit", or "20ms 2ms 100mbit" (round trip, jitter, bandwidth)."""
        durations: list[float] = []
        rates: list[float] = []
        for word in text.replace(",", " ").split():
            if _BANDWIDTH.fullmatch(word):
                rates.append(parse_bandwidth(word))
            else:
                durations.append(parse_duration(word))
        if not durations + rates or len(durations) > 2 or len(rates) > 1:
            raise UsageError(f"{text!r} is not a link", remedy='Write it as "20ms", or "20ms 2ms 100mbit".')
        rtt, jitter = [*durations, 0.0, 0.0][:2]
        return cls(rtt, jitter, rates[0] if rates else 0.0)

    @classmethod
    def from_options(
        cls, *, rtt: str | None = None, jitter: str | None = None, bandwidth: str | None = None
    ) -> LinkSpec | None:
        """The link that `--simulate-rtt`, `-jitter` and `-bandwidth` ask for, or None."""
        if rtt is jitter is bandwidth is None:
            return None
        return cls(
            rtt=parse_duration(rtt) if rtt else 0.0,
            jitter=parse_duration(jitter) if jitter else 0.0,
            bandwidth=parse_bandwidth(bandwidth) if bandwidth else 0.0,
        )


class EmulatedLink:
    """A proxy to an address (`host:port` or `unix:/path`) with the manners of `spec`, as a context manager.

    Dial its own `address` instead; it is always TCP, on loopback.

    `start` and `close` block for some 50 ms; on an event loop call them through `asyncio.to_thread`. Every
    connection is shaped for itself; `close` resets those that are open. Any user of this machine can reach
    the proxy's port on loopback: what the target demands (token, TLS) it demands through it too.
    """

    def __init__(self, spec: LinkSpec, address: str) -> None:
        target = Address.parse(address)
        if target.scheme == "memory":
            raise UsageError(f"{address} has no link to emulate", remedy="Listen on host:port or unix:/path.")
        self.spec = spec
        self._plan = link_proxy.Plan(
            host=target.name,
            port=target.port,
            unix=target.scheme == "unix",
            delay=spec.rtt / 2,
            jitter=spec.jitter / 2,
            bandwidth=spec.bandwidth / 8,
            stall_after=spec.stall_after,
            stall_for=spec.stall_for,
            slice_nbytes=spec.slice_nbytes,
            reset_after=spec.reset_after,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """`127.0.0.1:port`, once started."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Raises CapacityError where the proxy does not come up."""
        script = str(Path(link_proxy.__file__))
        # -I and -S: nothing but the standard library is needed, and the start takes a third of the time.
        command = [sys.executable, "-I", "-S", script, json.dumps(asdict(self._plan))]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._process = process
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:  # not `select`, whose descriptors end at 1023
            selector.register(process.stdout, selectors.EVENT_READ)
            line = process.stdout.readline() if selector.select(_START_SECONDS) else b""
        if not line.strip().isdigit():
            reason = self._stop()
            raise CapacityError(f"the link emulator did not start: {reason or 'no answer'}")
        self.port = int(line)

    def close(self) -> None:
        """End the proxy and every connection through it. Harmless when closed already."""
        self._stop()

    def _stop(self) -> str:
        """End the process; the last line that it said about why, if any."""
        process, self._process = self._process, None
        if process is None:
            return ""
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        try:
            _, errors = process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
        return errors.decode(errors="replace").strip().rpartition("\n")[2]

    def __enter__(self) -> EmulatedLink:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
