"""`splitinfer plan`: nothing is loaded; numbers for people and programs; every refusal says what to write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from splitinfer.cli import machine, plan
from splitinfer.cli.calibration import Effort
from splitinfer.model.footprint import Sizes
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.model.weights import Checkpoint
from splitinfer.planning.hardware import Rate
from tests.cli.conftest import Cli, listening

MODEL = ("gemma-4-26b-a4b", "--quant", "int4", "--memory")
GEMMA = (*MODEL, "24GiB")
LAPTOP = (*MODEL, "8GiB")  # the experts do not fit beside the rest


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed figures for this machine: which way of cutting wins must not hang on how busy it is."""
    monkeypatch.setattr(machine, "EFFORT", Effort(steps=2, calls=4, pings=2, tokens=4))
    monkeypatch.setattr(machine, "measure_read", lambda: 35e9)
    monkeypatch.setattr(machine, "measure_rates", lambda formats: dict.fromkeys(formats, Rate(25e9, 0.3)))
    monkeypatch.setattr(machine, "measure_overheads", overheads)


async def overheads() -> machine.Overheads:
    """As they are with the demo model, which takes a second to measure."""
    return machine.Overheads(layer=0.0002, step=0.0006, token=0.0004)


def planned(cli: Cli, *arguments: str) -> dict[str, Any]:
    ran = cli("plan", *arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_a_model_that_is_not_here(cli: Cli) -> None:
    ran = cli(
        "plan", *LAPTOP, "--node", "a=16GiB", "--node", "b=32GiB", "--rtt", "2ms", "--bandwidth", "1gbit"
    )
    assert (ran.code, ran.err) == (0, "")
    for text in ("30 layers of 128 experts; experts int4", "by slices", "replicas", "KV cache", "bound by"):
        assert text in ran.out
    assert "a round trip of 2 ms, 1000 Mbit/s here" in ran.out
    assert re.search(r"on a: +splitinfer node path/to/gemma-4-26b-a4b .*--quant int4 --host 0.0.0.0", ran.out)
    assert re.search(
        r"here: +splitinfer chat path/to/gemma-4-26b-a4b --quant int4 --nodes a:7077,b:7077", ran.out
    )


def test_json(cli: Cli) -> None:
    found = planned(cli, *GEMMA, "--node", "a=16GiB@60GB/s", "--node", "b:9000=32GiB", "--rtt", "20ms")
    ways = {way["way"]: way for way in found["ways"]}
    assert set(ways) == {"by experts", "by layers", "by slices", "replicas", "everything here"}
    apart = ways["by experts"]
    assert [node["flags"] for node in apart["nodes"]] == ["--experts 0-41", "--experts 42-127"]
    assert apart["memory"]["b:9000"] == apart["nodes"][1]["nbytes"] + apart["client"]["program"]
    assert apart["plain"]["terms"]["round trip"] == pytest.approx(0.6)
    assert apart["plain"]["binds"] == "round trip"
    assert apart["depth"] >= 1
    rates = [way["drafted"]["tokens_per_second"] for way in found["ways"]]
    assert rates[0] >= 0.9 * max(rates)
    assert found["assumed"]["round_trip"] == 0.02


def test_folders_shards_and_configurations_alone(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    write_shard(plan_shard(checkpoint, experts=[1, 2]), tmp_path / "part")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny / "config.json").read_bytes())
    sizes = Sizes.of(checkpoint)
    for model in (tiny, tmp_path / "part", bare):
        (way,) = planned(cli, str(model))["ways"]
        assert way["client"]["experts"] == sizes.experts(range(4))
        assert way["client"]["cache"] == sizes.client(512).cache


def test_nodes_that_run_are_asked(cli: Cli, tiny: Path) -> None:
    with (
        listening(tiny, "--experts", "0-4") as (_, low, _),
        listening(tiny, "--experts", "5-10") as (_, high, _),
    ):
        found = planned(cli, str(tiny), "--nodes", f"{low},{high}", "--simulate-rtt", "5ms")
        assert cli("plan", str(tiny), "--nodes", low).err.startswith("error: ")
        ran = cli("plan", str(tiny), "--nodes", f"{low},{high}", "--memory", "4GiB")
    assert [way["local_layers"] for way in found["ways"]] == [3, 0]
    last = found["ways"][1]
    assert {node["node"]: node["experts"] for node in last["nodes"]} == {low: 5, high: 6}
    assert 0.02 < last["plain"]["terms"]["round trip"] < 0.04
    assert found["measured"]
    assert f"--nodes {low},{high} --local-layers 0-2" in ran.out
    assert "splitinfer cert" not in ran.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--node", "a"), 2, "--node 'a' is not a machine"),
        (("--node", "a=much"), 2, "--node 'much' is not a size"),
        (("--node", "a=1GiB@fast"), 2, "--node 'a=1GiB@fast' is not a machine"),
        (("--node", "a=1GiB", "--node", "a=2GiB"), 2, "two nodes have the same name"),
        (("--node", "a=1GiB", "--rtt", "soon"), 2, "'soon' is not a duration"),
        (("--node", "a=1GiB", "--bandwidth", "wide"), 2, "'wide' is not a bandwidth"),
        (("--memory", "all"), 2, "--memory 'all' is not a size"),
        (("--nodes", "localhost:1", "--rtt", "2ms"), 2, "is measured, not given"),
        (("--memory", "100MiB"), 1, "the client's half takes"),
        (("no-such-model",), 1, "no-such-model does not exist"),
        (("gemma-4-26b-a4b", "--memory", "8GiB", "--node", "a=16GiB"), 1, "GiB are missing"),
        (("--context", "5000"), 2, "a context of 5000 tokens is not possible"),
    ],
)
def test_what_cannot_be(cli: Cli, arguments: tuple[str, ...], code: int, message: str) -> None:
    ran = cli("plan", *arguments)
    assert ran.code == code
    assert message in ran.err
    assert len(ran.err.splitlines()) == 2  # the mistake, and what to do about it
    assert ran.out == ""


def test_names_of_machines() -> None:
    assert plan.parse_node("a.local:7078=16GiB") == ("a.local:7078", 16 << 30, 0.0)
    assert plan.parse_node("b=32 GB@40GB/s") == ("b", 32 * 10**9, 40e9)


def test_an_int8_cache_takes_half_the_memory_and_is_in_the_command(cli: Cli) -> None:
    whole, halved = (planned(cli, *GEMMA, *more) for more in ((), ("--kv-cache", "int8")))
    assert (whole["kv_cache"], halved["kv_cache"]) == (None, "int8")
    cache = [found["ways"][0]["client"]["cache"] for found in (whole, halved)]
    assert 0.5 < cache[1] / cache[0] < 0.51  # and a scale for every row and head
    assert halved["ways"][0]["plain"]["tokens_per_second"] > whole["ways"][0]["plain"]["tokens_per_second"]
    ran = cli("plan", *GEMMA, "--kv-cache", "int8")
    assert "--kv-cache int8" in ran.out
    assert "tokens in int8)" in ran.out
