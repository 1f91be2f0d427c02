"""`splitinfer bench`: real calls to a real node, as a table and as JSON; no process left behind."""

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
    monkeypatch.setitem(bench.LOAD, "seconds", 0.0)


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
    assert json.loads(ran.out)["decode"]["network_ms"]["p50"] >= 10


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
        deadline = monotonic() + 60
        while not (nodes := started.children()):
            assert monotonic() < deadline
            sleep(0.02)
        measuring.send_signal(signal.SIGTERM)
        out, err = measuring.communicate(timeout=60)
    assert (measuring.returncode, out, err) == (143, "", "")
    assert not any(node.is_running() for node in nodes)


def test_transport_as_json(cli: Cli, tiny: Path, whole_node: str) -> None:
    ran = cli("bench", str(tiny), "--transport", "--json", "--nodes", whole_node, "--simulate-rtt", "2ms")
    assert (ran.code, ran.err) == (0, "")
    made = json.loads(ran.out)
    assert (made["bench"], [link["node"] for link in made["links"]]) == ("transport", [whole_node])
    loads = {load["load"]: load for load in made["links"][0]["loads"]}
    assert loads["one row"]["nbytes"] == 5632
    assert loads["16 MiB"]["nbytes"] == 16 << 20
    assert loads["64 rows at a time"]["in_flight"] == 64
    assert all(load["round_trip_ms"]["p50"] >= 2 for load in loads.values())


def test_transport_as_a_table(cli: Cli, tiny: Path, whole_node: str) -> None:
    ran = cli("bench", str(tiny), "--transport", "--nodes", whole_node)
    assert (ran.code, ran.err) == (0, "")
    for text in (f"the link to {whole_node}", "ping", "one row", "16 MiB", "64 rows at a time", "/s"):
        assert text in ran.out


@pytest.mark.parametrize("flags", [(), ("--rtt", "--transport")])
def test_one_thing_at_a_time(cli: Cli, tiny: Path, flags: tuple[str, ...]) -> None:
    ran = cli("bench", str(tiny), *flags)
    assert ran.code == 2
    assert "--transport" in ran.err
