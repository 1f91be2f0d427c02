"""Predicted beside measured: every case has both. How near they are the bench says, on a quiet machine."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest

from splitinfer.cli import bench_decode, decode
from splitinfer.cli.calibration import Effort
from splitinfer.engine_config import EngineConfig
from splitinfer.planning.cost import ClientCost, Curve, Prediction
from tests.cli.conftest import Cli, listening

if TYPE_CHECKING:
    from splitinfer.engine import AsyncEngine

SHORT = Effort(steps=3, calls=5, pings=3, tokens=6, passes=1)
Tokens = AsyncGenerator[None, None]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "EFFORT", SHORT)
    monkeypatch.setattr(bench_decode, "STREAMS", 2)
    monkeypatch.setattr(decode, "AT_LEAST", 0.0)


def test_nodes_are_started_and_stopped(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "node_sets", lambda _: {"1 node": ({"slice": "1/1"},)})
    monkeypatch.setattr(bench_decode, "LINKS", ("0.2ms", "2ms"))
    before, cores = psutil.Process().children(recursive=True), os.sched_getaffinity(0)
    ran = cli("bench", str(tiny), "--decode", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    each = ["plain", "a third local", "2 streams"]
    assert [case["case"] for case in found["cases"]] == [*each, *each]
    assert [case["link"] for case in found["cases"]] == ["0.2ms"] * 3 + ["2ms"] * 3
    for case in found["cases"]:
        assert case["ratio"] == pytest.approx(case["predicted"]["tokens_per_second"] / case["measured"])
        streams = 2 if case["case"] == "2 streams" else 1
        rate = streams / case["predicted"]["step_seconds"]
        assert case["predicted"]["tokens_per_second"] == pytest.approx(rate)
    for case in found["cases"][3:]:
        assert case["round_trip"] >= 0.002
        layers = 3 if case["case"] == "a third local" else 4
        assert case["predicted"]["terms"]["round trip"] == pytest.approx(layers * case["round_trip"])
    assert set(found["calibration"]["calls"]) == {"1 node"}
    assert set(found["calibration"]["clients"]) == {"0.2ms", "2ms"}
    for client in found["calibration"]["clients"].values():
        assert client["attention"]["points"][0][0] == 1
    assert psutil.Process().children(recursive=True) == before
    assert os.sched_getaffinity(0) == cores


def test_what_others_take_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, taken = iter((10.0, 12.0)), iter((1.0, 2.5))
    monkeypatch.setattr(decode, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(decode, "_taken_by_others", lambda: next(taken))
    assert decode.beside_others(lambda: "found") == ("found", 0.75)


def test_sets_of_nodes() -> None:
    sets = bench_decode.node_sets(11)
    assert sets["1 node"] == ({},)
    assert sets["2 nodes"] == ({"experts": "0-4"}, {"experts": "5-10"})
    assert sets["2 slices"] == ({"slice": "1/2"}, {"slice": "2/2"})


def test_nodes_that_run_and_the_drafter_that_comes_with_the_model(cli: Cli) -> None:
    from splitinfer import demo

    with listening(demo.path()) as (_, address, _):
        ran = cli("bench", "--decode", "--nodes", address)
    assert ran.code == 0
    for text in ("tokens/s, predicted and measured", "this link", "4 drafts", "2 streams"):
        assert text in ran.out
    for text in ("a layer on this machine, ms: attention", "a call to 1 node, ms", "4 drafts a step give"):
        assert text in ran.err


def test_a_stream_that_begins_late_is_waited_for() -> None:
    late, given = asyncio.Event(), list[int]()

    class Uneven:
        tokenizer, config = None, SimpleNamespace(vocab_size=64)

        async def stream(self, prompt: list[int], max_tokens: int = 256, **sampling: Any) -> Tokens:
            if sampling["seed"]:
                await late.wait()
            for number in range(max_tokens):
                if number == min(2 * SHORT.tokens, max_tokens - 1):
                    late.set()
                given.append(sampling["seed"])
                yield
                await asyncio.sleep(0)

    bench = decode.Bench(Path("model"), EngineConfig(), [], effort=SHORT)
    assert asyncio.run(bench._together(cast("AsyncEngine", Uneven()), 2)) > 0
    assert given.count(1) == SHORT.tokens


def test_a_case_is_predicted_from_what_was_measured_over_its_link() -> None:
    links = [decode.Link(name, None) for name in ("0.2ms", "2ms", "20ms")]
    near, far = (ClientCost(*[Curve.constant(seconds)] * 4) for seconds in (0.1, 0.2))
    bench = decode.Bench(Path("model"), EngineConfig(), links, clients={"0.2ms": near, "2ms": far})
    assert [bench._client_over(link) for link in links] == [near, far, far]


def test_a_pass_that_was_disturbed_decides_nothing() -> None:
    def one(predicted: float, measured: float, others: float) -> decode.Decoded:
        prediction = Prediction(predicted, 1 / predicted)
        return decode.Decoded("2ms", "1 node", "plain", 0.002, prediction, measured, others)

    found = decode._middle([one(10, 11, 0.0), one(4, 3, 1.5), one(12, 10, 0.1)])
    assert (found.predicted.tokens_per_second, found.measured, found.others) == (12, 10, 0.1)
    assert found.ratio == 1.2


def test_fast_links_come_in_every_pass_and_slow_ones_in_few(monkeypatch: pytest.MonkeyPatch) -> None:
    trips = {"0.2ms": 0.0003, "2ms": 0.0021, "20ms": 0.0203}
    bench = decode.Bench(Path("model"), EngineConfig(), [decode.Link(name, None) for name in trips])
    passes: list[list[str]] = []

    def one_pass(
        nodes: str, addresses: list[str], links: list[decode.Link], cases: list[decode.Case]
    ) -> Iterator[decode.Decoded]:
        passes.append([link.name for link in links])
        for link in links:
            yield decode.Decoded(link.name, nodes, "plain", trips[link.name], Prediction(1, 1), 1, 0)

    monkeypatch.setattr(bench, "_pass", one_pass)
    assert [one.link for one in bench.measure("1 node", [], [])] == list(trips)
    assert passes[0] == list(trips)
    assert all(links[0] == "0.2ms" for links in passes)
    counts = [sum(name in links for links in passes) for name in trips]
    assert counts == [19, 10, 4]
    assert bench.effort.passes == 19  # an odd number has a middle one
