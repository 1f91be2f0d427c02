"""`splitinfer bench --rtt`: real calls to a real node, as a table and as JSON; no process left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

from splitinfer.cli import bench
from tests.cli.conftest import Cli, process


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in (bench.DECODE, bench.PREFILL):
        monkeypatch.setitem(limits, "at_least", 8)
        monkeypatch.setitem(limits, "seconds", 0.0)


def test_json(cli: Cli, tiny: Path, whole_node: str) -> None:
    ran = cli("bench", str(tiny), "--rtt", "--json", "--nodes", whole_node)
    assert (ran.code, ran.err) == (0, "")
    made = json.loads(ran.out)
    assert (made["bench"], made["layers"], made["nodes"]) == ("rtt", 4, [whole_node])
    decode, prefill = made["decode"], made["prefill"]
    assert (decode["rows"], prefill["rows"]) == (1, 512)
    assert decode["calls"] == 8
    hidden = 48 * 4  # bytes of a float32 row
    assert hidden < decode["bytes_received"] < 2 * hidden
    assert 512 * hidden < prefill["bytes_received"] < 1.1 * 512 * hidden
    for calls in (decode, prefill):
        assert 0 < calls["network_ms"]["p50"] < calls["round_trip_ms"]["p50"] <= calls["round_trip_ms"]["p99"]
    assert decode["network_ceiling_tokens_per_second"] == pytest.approx(
        1000 / (4 * decode["network_ms"]["p50"])
    )


def test_a_simulated_link_is_in_the_figures(cli: Cli, tiny: Path, whole_node: str) -> None:
    ran = cli("bench", str(tiny), "--rtt", "--json", "--nodes", whole_node, "--simulate-rtt", "10ms")
    assert 10 <= json.loads(ran.out)["decode"]["network_ms"]["p50"] < 30


def test_without_nodes_one_is_started_and_stopped(cli: Cli, tiny: Path) -> None:
    before = psutil.Process().children(recursive=True)
    ran = cli("bench", str(tiny), "--rtt")
    assert (ran.code, ran.err) == (0, "")
    assert "expert calls to one node on loopback" in ran.out
    assert "network alone, p99 ms" in ran.out
    assert "network-only ceiling: " in ran.out
    assert "(4 layers × " in ran.out
    assert psutil.Process().children(recursive=True) == before


def test_sigterm_leaves_no_process(tiny: Path) -> None:
    """The bench runs for seconds; it is ended as soon as its node is there."""
    with process("bench", str(tiny), "--rtt") as measuring:
        started = psutil.Process(measuring.pid)
        deadline = monotonic() + 30
        while not (nodes := started.children()):
            assert monotonic() < deadline
            sleep(0.02)
        measuring.send_signal(signal.SIGTERM)
        out, err = measuring.communicate(timeout=20)
    assert (measuring.returncode, out, err) == (143, "", "")
    assert not any(node.is_running() for node in nodes)
