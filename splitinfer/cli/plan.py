"""`splitinfer plan`: which cut of a model suits which machines, what each holds then, and how fast it is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitinfer.cli.console import busy, run
from splitinfer.cli.options import LINK, MODEL, QUANT, Json, takes
from splitinfer.cli.session import client_config, engine_settings, model_of, name_of
from splitinfer.config import Settings
from splitinfer.errors import UsageError

if TYPE_CHECKING:
    from splitinfer.engine_config import EngineConfig
    from splitinfer.model.footprint import Sizes
    from splitinfer.planning.cost import CallCost
    from splitinfer.planning.cuts import Cut, Machine
    from splitinfer.planning.hardware import Assumed
    from splitinfer.planning.weigh import Weighed

__all__ = ["EPILOG", "Option", "Planned", "command", "parse_node"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer plan gemma-4-26b-a4b --quant int4 --node a=16GiB --node b=32GiB
  splitinfer plan path/to/gemma --node box=64GiB@80GB/s --rtt 2ms --bandwidth 1gbit
  splitinfer plan path/to/gemma --nodes host:7077    as they are, measured
  splitinfer plan gemma-4-26b-a4b --quant int4 --json | jq ".ways[0].plain"

The model may be one that is not here yet: gemma-4-26b-a4b is known by name,
and a folder with config.json or a hub id is enough. No weights are loaded.
"""

_NODE = re.compile(r"([A-Za-z0-9_][\w.:-]*)=([^@=]+)(?:@([^@]+)/s)?")
_HERE = re.compile(r"([^@=]+)(?:@([^@]+)/s)?")
RTT = "0.5ms"  # of a local network
BANDWIDTH = "1gbit"
CALL = 0.0002  # seconds that a call to one node costs beside its round trip: see docs/network.md
PINGS = 20
_WITH = "The machines"


@dataclass(frozen=True)
class Option:
    """One way to cut, and what is predicted for it."""

    cut: Cut
    weighed: Weighed


@dataclass(frozen=True)
class Planned:
    """All that is printed: the ways that fit, the fastest first, and what the predictions take for
    granted."""

    model: str
    sizes: Sizes
    context: int
    int8_cache: bool
    machines: tuple[Machine, ...]
    options: tuple[Option, ...]
    assumed: Assumed
    measured: bool  # whether the nodes run, and were asked


@takes(*MODEL, *QUANT, "context", "kv_cache", *LINK)
def command(
    node: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZE[@RATE]",
            help="A machine that you have or may buy, instead of --nodes: a=16GiB, or with its memory's "
            "bandwidth, a=16GiB@40GB/s. May be repeated.",
            rich_help_panel=_WITH,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE[@RATE]", help="This machine: 24GiB. Default: what it has.", rich_help_panel=_WITH
        ),
    ] = None,
    rtt: Annotated[
        str | None,
        typer.Option(metavar="TIME", help=f"Round trip to --node. Default: {RTT}.", rich_help_panel=_WITH),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help=f"This machine's link. Default: {BANDWIDTH}.", rich_help_panel=_WITH
        ),
    ] = None,
    json_: Json = False,
    *,
    settings: Settings,
) -> None:
    """Say how a model is best cut over machines, before any weight is loaded.

    Prints what each machine would hold, tokens/s for plain, drafted and
    batched decoding with what binds them, and the commands to run.
    """
    from splitinfer.cli.plan_report import as_json, print_plan
    from splitinfer.planning.cuts import Machine
    from splitinfer.transport.link import parse_bandwidth, parse_duration

    machines = tuple(Machine(*parse_node(text)) for text in node or ())
    asking = bool(settings.nodes) and not machines
    if asking and (rtt or bandwidth):
        raise UsageError(
            "the round trip to nodes that run is measured, not given",
            remedy="Leave --rtt and --bandwidth out, emulate another link with --simulate-rtt, or describe "
            "machines with --node.",
        )
    here = _this_machine(memory)
    link = parse_duration(rtt or RTT), parse_bandwidth(bandwidth or BANDWIDTH) / 8
    planned = _plan(settings, here, machines, link, asking=asking)
    if json_:
        print(json.dumps(as_json(planned)))
    else:
        print_plan(planned, settings)


def parse_node(text: str) -> tuple[str, int, float]:
    """Name, bytes of memory and bytes/s (0: not said) from "a=16GiB" or "a=16GiB@40GB/s". Raises
    UsageError."""
    match = _NODE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--node {text!r} is not a machine",
            remedy="Write it like --node a=16GiB or --node a=16GiB@40GB/s.",
        )
    return match[1], *_memory(match[2], match[3], "--node")


def _memory(size: str, rate: str | None, flag: str) -> tuple[int, float]:
    from splitinfer.placement import parse_size

    return parse_size(size, flag), float(parse_size(rate, flag)) if rate else 0.0


def _this_machine(memory: str | None) -> Machine:
    import psutil

    from splitinfer.planning.cuts import Machine

    if memory is None:
        return Machine("here", psutil.virtual_memory().total)
    match = _HERE.fullmatch(memory.strip())
    if match is None:
        raise UsageError(f"--memory {memory!r} is not a size", remedy="Write it like --memory 24GiB.")
    return Machine("here", *_memory(match[1], match[2], "--memory"))


def _plan(
    settings: Settings,
    here: Machine,
    machines: tuple[Machine, ...],
    link: tuple[float, float],
    *,
    asking: bool,
) -> Planned:
    """`link` is a round trip in seconds and a bandwidth in bytes/s. What cannot be is refused before anything
    is measured."""
    from splitinfer.planning.cost import Setup
    from splitinfer.planning.cuts import ways_to_cut
    from splitinfer.planning.hardware import setup_of
    from splitinfer.planning.weigh import ACCEPTANCE, weigh

    with busy(f"reading what {name_of(settings)} is made of"):
        config, sizes, fingerprint = _sizes(settings)
    context, int8, call = config.context_of(sizes.config), config.int8_cache(), None
    if asking:
        cuts, call = run(_ask(settings, sizes, fingerprint, here, context, int8))
        machines = tuple(part.machine for part in cuts[0].parts)
    else:
        cuts = ways_to_cut(sizes, here.memory, machines, context, int8_cache=int8)
    assumed = _assume(sizes, here, *link)
    options = []
    for cut in cuts:
        if call is None:
            setup = setup_of(cut, sizes, assumed, tokens=context // 2, int8_cache=int8)
        else:
            here_only = setup_of(replace(cut, parts=()), sizes, assumed, tokens=context // 2, int8_cache=int8)
            local, layers = len(cut.local), sizes.config.num_hidden_layers
            setup = Setup(here_only.client, ((local, None), (layers - local, call)))
        acceptance = () if settings.draft == "off" else ACCEPTANCE
        options.append(Option(cut, weigh(setup, acceptance=acceptance)))
    options.sort(key=_best_first)
    everyone = (here, *machines)
    return Planned(model_of(settings), sizes, context, int8, everyone, tuple(options), assumed, asking)


def _best_first(option: Option) -> tuple[float, int]:
    """The fastest first, and of those that are as good as equal the one with the least memory."""
    rate = option.weighed.drafted.tokens_per_second
    return -float(f"{rate:.2g}"), sum(part.nbytes for part in option.cut.parts) + option.cut.client.total


def _sizes(settings: Settings) -> tuple[EngineConfig, Sizes, str]:
    """The settings as the engine takes them, bytes of the model's parts, and its fingerprint ("" where its
    weights are not here)."""
    from splitinfer.engine_config import EngineConfig
    from splitinfer.model.config import load_config
    from splitinfer.model.footprint import Sizes
    from splitinfer.model.hub import resolve_model
    from splitinfer.model.shard import ShardCheckpoint
    from splitinfer.model.weights import Checkpoint, has_weights
    from splitinfer.planning.presets import preset

    config = EngineConfig(**engine_settings(settings))
    quant, dtype = config.quant_config(), config.torch_dtype()
    known = preset(settings.model)
    if known is not None and not Path(settings.model).exists():
        return config, Sizes.of_config(known, quant=quant, dtype=dtype), ""
    path = resolve_model(model_of(settings), weights=False)
    if path.is_dir() and not has_weights(path):
        return config, Sizes.of_config(load_config(path), quant=quant, dtype=dtype), ""
    checkpoint = Checkpoint.open(path)
    if isinstance(checkpoint, ShardCheckpoint):
        # It may hold a part only, but says of all parts how they are held.
        sizes = Sizes.of_config(checkpoint.config, quant=checkpoint.manifest.quant)
    else:
        sizes = Sizes.of(checkpoint, quant=quant, dtype=dtype)
    return config, sizes, checkpoint.fingerprint


def _assume(sizes: Sizes, here: Machine, round_trip: float, bandwidth: float) -> Assumed:
    """This machine by a short measurement, slowed down or sped up to what --memory says of it."""
    from splitinfer.cli.machine import measure_overheads, measure_rates, measure_read
    from splitinfer.planning.hardware import Assumed, formats_of

    with busy("measuring this machine"):
        read = measure_read()
        rates = measure_rates("+".join(formats_of(sizes).values()).split("+"))
        over = run(measure_overheads())
    if here.bandwidth:
        rates = {format: rate.scaled(here.bandwidth / read) for format, rate in rates.items()}
        read = here.bandwidth
    return Assumed(
        read, rates, over.layer, over.step, over.token, call=CALL, round_trip=round_trip, bandwidth=bandwidth
    )


async def _ask(
    settings: Settings, sizes: Sizes, fingerprint: str, here: Machine, context: int, int8: bool
) -> tuple[list[Cut], CallCost]:
    """What nodes that run hold, with none and with as many layers here as fit, and what calls to them
    cost."""
    from splitinfer.cli.calibration import calibrate_calls, measure_message, measure_work
    from splitinfer.cli.machine import EFFORT
    from splitinfer.dispatch import RemoteExperts
    from splitinfer.placement import Holding
    from splitinfer.planning.cuts import cuts_of_holdings
    from splitinfer.transport import connect

    link, config = client_config(settings), sizes.config
    with busy("asking the nodes"):
        if not fingerprint:
            async with await connect(settings.nodes[0], config=link) as channel:
                fingerprint = Holding.from_info(channel.info, settings.nodes[0]).fingerprint
        trips = [(await measure_message(node, link, PINGS), node) for node in settings.nodes]
        round_trip, farthest = max(trips)
        work = await measure_work(farthest, link, PINGS)
        experts = await RemoteExperts.connect(
            settings.nodes,
            layers=range(config.num_hidden_layers),
            num_experts=config.num_experts,
            columns=config.moe_intermediate_size,
            fingerprint=fingerprint,
            timeout=settings.timeout,
            config=link,
        )
        try:
            call = await calibrate_calls(experts, config, sizes.dtype, round_trip, work, EFFORT)
        finally:
            await experts.close()
    holdings = [(node.address, node.holding) for node in experts.nodes]
    return cuts_of_holdings(sizes, here.memory, holdings, context, int8_cache=int8), call
