"""The trace of a split run: every phase of every layer on the client's row, the arithmetic on the nodes'."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from splitinfer import AsyncEngine
from splitinfer.errors import UsageError
from splitinfer.timing import Span
from splitinfer.trace import check_trace, trace_events
from tests.checkpoints import write_checkpoint
from tests.test_split import addresses, running


def test_events_in_microseconds_from_the_first_on() -> None:
    spans = [
        Span("dense", 3, 10.5, 10.75),
        Span("head", -1, 10.0, 10.25),
        Span("experts", 3, 10.6, 10.7, "n:1"),
    ]
    made = trace_events(spans, ["m:1", "n:1"])
    names = {e["pid"]: e["args"]["name"] for e in made["traceEvents"] if e["name"] == "process_name"}
    assert names == {0: "client", 1: "node m:1", 2: "node n:1"}
    shown = [e for e in made["traceEvents"] if e["ph"] == "X"]
    assert [(e["name"], e["pid"], e["ts"], e["dur"]) for e in shown] == [
        ("head", 0, 0.0, 250_000.0), ("dense", 0, 500_000.0, 250_000.0), ("experts", 2, 600_000.0, 100_000.0),
    ]  # fmt: skip
    assert "args" not in shown[0]
    assert shown[1]["args"] == {"layer": 3}


def test_a_run_over_two_nodes(tmp_path: Path) -> None:
    model, file = write_checkpoint(tmp_path / "model"), tmp_path / "trace.json"

    async def run() -> list[str]:
        async with running(model, [(None, "0-1"), (None, "2-3")]) as nodes:
            async with AsyncEngine(model, addresses(nodes), trace=str(file), draft="off") as engine:
                await engine.generate([2, 3, 4], max_tokens=5, ignore_eos=True)
            return addresses(nodes)

    first, second = asyncio.run(run())
    events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    pids = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert set(pids) == {"client", f"node {first}", f"node {second}"}
    shown = [e for e in events if e["ph"] == "X"]
    phases = ("attention", "dispatch", "dense", "network", "experts", "combine")
    for phase in phases:
        layers = [e["args"]["layer"] for e in shown if e["pid"] == pids["client"] and e["name"] == phase]
        if phase == "network":  # what is waited for in vain, in the nodes' own loop, is in a span of its own
            layers = layers[:1] + [b for a, b in itertools.pairwise(layers) if a != b]
        per_layer = 2 if phase == "combine" else 1  # the nodes' answers, and these with the dense network's
        assert sorted(layers) == sorted([0, 1, 2, 3] * 5 * per_layer)
    assert sum(e["name"] == "head" for e in shown) == 5
    for node, layers in ((first, {0, 1}), (second, {2, 3})):
        theirs = [e for e in shown if e["pid"] == pids[f"node {node}"]]
        assert {e["args"]["layer"] for e in theirs} == layers
        assert len(theirs) == 10
    # One thing at a time on the client, from the first to the last, and the nodes' work between.
    row = sorted((e for e in shown if e["pid"] == pids["client"]), key=lambda e: e["ts"])
    assert all(a["ts"] + a["dur"] <= b["ts"] + 0.2 for a, b in itertools.pairwise(row))
    end = max(e["ts"] + e["dur"] for e in row)
    assert all(e["ts"] >= 0 and e["ts"] + e["dur"] <= end for e in shown)


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(write_checkpoint(tmp_path), trace=str(tmp_path / "no" / "trace.json")):
            raise AssertionError("opened")

    with pytest.raises(UsageError, match=r"--trace .*No such file"):
        asyncio.run(run())


def test_looking_leaves_no_file_behind(tmp_path: Path) -> None:
    check_trace(tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept.json").write_text("before")
    check_trace(tmp_path / "kept.json")
    assert (tmp_path / "kept.json").read_text() == "before"
