"""`splitinfer bench --decode`: which nodes, links and cases, and what is printed of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from splitinfer import __version__
from splitinfer.cli.calibration import Effort
from splitinfer.cli.console import busy, screen
from splitinfer.cli.decode import Bench, Case, Decoded, Link, apart
from splitinfer.cli.decode_figures import as_json, calibration_lines, table_of
from splitinfer.cli.processes import node_arguments, node_process
from splitinfer.cli.session import engine_settings, model_of
from splitinfer.config import Settings
from splitinfer.errors import UsageError

if TYPE_CHECKING:
    from splitinfer.model.weights import Checkpoint

__all__ = ["EFFORT", "bench_decode", "node_sets"]

EFFORT = Effort()
LINKS = ("0.2ms", "2ms", "20ms")  # the shortest first: calls are calibrated over it
STREAMS = 8
DEPTH = 4


def bench_decode(settings: Settings, checkpoint: Checkpoint, *, json_: bool) -> None:
    """Predict and decode on the nodes that the settings name, or on some that are started for it."""
    if not checkpoint.config.enable_moe_block:
        raise UsageError(
            f"{checkpoint.path} is a dense model: it has no experts to put on nodes",
            remedy="Name a checkpoint with a mixture of experts.",
        )
    with ExitStack() as stack:
        if settings.nodes:
            bench, found = _on_these(settings, checkpoint)
        else:
            bench, found = _on_this_machine(settings, checkpoint, stack.enter_context(apart()))
    if json_:
        about = {"bench": "decode", "version": __version__, "model": settings.model or None}
        print(json.dumps({**about, "nodes": list(settings.nodes), **as_json(bench, found)}))
        return
    for line in calibration_lines(bench):
        screen().print(line, style="dim", markup=False, soft_wrap=True)
    screen(stderr=False).print(table_of(found))


def _on_these(settings: Settings, checkpoint: Checkpoint) -> tuple[Bench, list[Decoded]]:
    """Nodes that somebody runs: over the link to them, or over the one emulated on top."""
    bench = _bench(settings, checkpoint, [Link(settings.simulate_rtt or "this link", None)])
    name = "1 node" if len(settings.nodes) == 1 else f"{len(settings.nodes)} nodes"
    return bench, list(bench.measure(name, settings.nodes, _cases(bench, checkpoint, local=False)))


def _on_this_machine(
    settings: Settings, checkpoint: Checkpoint, settle: Callable[[], None]
) -> tuple[Bench, list[Decoded]]:
    """Nodes as processes here, behind emulated links. Each set is gone before the next is started."""
    from splitinfer.cli.session import client_config
    from splitinfer.transport.link import LinkSpec, parse_duration

    links = [Link(settings.simulate_rtt or "loopback", None)]
    if client_config(settings).link is None:
        links = [Link(name, LinkSpec(rtt=parse_duration(name))) for name in LINKS]
    bench = _bench(settings, checkpoint, links)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bench.config = replace(bench.config, threads=settings.threads or cores)
    bench.settle = settle
    found: list[Decoded] = []
    for name, holdings in node_sets(checkpoint.config.num_experts).items():
        threads = str(settings.threads or max(1, cores // len(holdings)))
        with ExitStack() as running:
            with busy(f"{name}: starting"):
                arguments = (node_arguments(checkpoint, settings, threads=threads, **own) for own in holdings)
                addresses = [running.enter_context(node_process(own)) for own in arguments]
            cases = _cases(bench, checkpoint, local=name == "1 node")
            found += bench.measure(name, addresses, cases)
    order = [link.name for link in links]
    return bench, sorted(found, key=lambda case: order.index(case.link))


def node_sets(num_experts: int) -> dict[str, tuple[dict[str, str], ...]]:
    """What nodes are started with, beside the whole model: sets of them by name."""
    middle = num_experts // 2
    return {
        "1 node": ({},),
        "2 nodes": ({"experts": f"0-{middle - 1}"}, {"experts": f"{middle}-{num_experts - 1}"}),
        "2 slices": ({"slice": "1/2"}, {"slice": "2/2"}),
    }


def _bench(settings: Settings, checkpoint: Checkpoint, links: list[Link]) -> Bench:
    from splitinfer.engine_config import EngineConfig

    return Bench(
        checkpoint.path,
        EngineConfig(**engine_settings(settings)),
        links,
        drafter=_drafter(settings),
        effort=EFFORT,
    )


def _drafter(settings: Settings) -> str | None:
    """A drafter that always has a guess: the model's own, or the one that the settings name. Prompt lookup
    has none for most of a text, so that its gain cannot be told from how often it is right."""
    if settings.draft in ("off", "lookup"):
        return None
    if settings.draft != "auto":
        return settings.draft
    model = Path(model_of(settings)).expanduser()
    companion = model.parent / "drafter" if model.name == "target" else model / "assistant"
    return str(companion) if (companion / "config.json").is_file() else None


def _cases(bench: Bench, checkpoint: Checkpoint, *, local: bool) -> list[Case]:
    cases = [Case("plain")]
    if local:
        cases.append(Case("a third local", local=tuple(range(checkpoint.config.num_hidden_layers // 3))))
    if bench.drafter is not None:
        cases.append(Case(f"{DEPTH} drafts", depth=DEPTH))
    return [*cases, Case(f"{STREAMS} streams", streams=STREAMS)]
