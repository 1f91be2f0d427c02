"""A plan in words: the ways compared, the best one in full, its commands, and what was assumed."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from typing import TYPE_CHECKING, Any

from splitinfer import __version__
from splitinfer.cli.console import plain, screen
from splitinfer.config import Settings
from splitinfer.planning.presets import preset
from splitinfer.planning.weigh import ACCEPTANCE, STREAMS, Weighed

if TYPE_CHECKING:
    from rich.table import Table

    from splitinfer.cli.plan import Option, Planned
    from splitinfer.planning.cost import Prediction

__all__ = ["as_json", "commands", "print_plan"]

GIB = 2**30
PORT = 7077
SHOWN = ("experts", "attention", "dense", "other", "embeddings", "lm_head", "cache", "program")
SECURE = (
    "--token-file splitinfer-tls/token --tls-cert splitinfer-tls/cert.pem --tls-key splitinfer-tls/key.pem"
)
TRUST = "--token-file splitinfer-tls/token --tls-fingerprint FINGERPRINT"


def print_plan(planned: Planned, settings: Settings) -> None:
    """Everything for a person, on standard output."""
    from splitinfer.planning.hardware import formats_of

    console = screen(stderr=False)
    config, formats = planned.sizes.config, formats_of(planned.sizes)
    held = ", ".join(f"{part} {format}" for part, format in formats.items())
    console.print(
        f"{config.num_hidden_layers} layers of {config.num_experts} experts; {held}; "
        f"{planned.context} tokens of context\n",
        markup=False,
        soft_wrap=True,
    )
    console.print(_comparison(planned))
    best = planned.options[0]
    console.print(_memory(planned, best))
    for line in (*_terms(best.weighed), "", "Run it:", *commands(planned, best, settings)):
        console.print(line, markup=False, soft_wrap=True)
    console.print("\nTaken for granted:")
    for line in _assumptions(planned):
        console.print(f"- {line}", style="dim", markup=False, soft_wrap=True)


def _comparison(planned: Planned) -> Table:
    """The ways that fit, the fastest first."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    names = ", ".join(machine.name for machine in planned.machines)
    title = f"ways to cut it, and layers kept here: GiB ({names}), tokens/s"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("GiB", "plain", "drafted", f"{STREAMS} streams"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("binds plain", no_wrap=True)
    for option in planned.options:
        weighed = option.weighed
        table.add_row(
            option.cut.name,
            " ".join(
                f"{nbytes / GIB:.1f}" if nbytes else "-" for nbytes in _totals(planned, option).values()
            ),
            _rate(weighed.plain),
            f"{_rate(weighed.drafted)} ({weighed.depth})" if weighed.depth else "no gain",
            _rate(weighed.batched),
            weighed.plain.binds,
        )
    return table


def _rate(prediction: Prediction) -> str:
    return f"{prediction.tokens_per_second:.1f}"


def _totals(planned: Planned, option: Option) -> dict[str, int]:
    """Bytes of each machine's process, the client's first. 0: it takes no part."""
    program = option.cut.client.program
    held = {part.machine.name: part.nbytes + program for part in option.cut.parts}
    here, *nodes = (machine.name for machine in planned.machines)
    return {here: option.cut.client.total, **{name: held.get(name, 0) for name in nodes}}


def _memory(planned: Planned, option: Option) -> Table:
    """What each machine holds in the best way."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"GiB, {option.cut.name}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for machine in planned.machines:
        table.add_column(machine.name, justify="right")
    nodes = {part.machine.name: part for part in option.cut.parts}
    client = plain(option.cut.client)
    for name in SHOWN:
        cells = [client[name]]
        for machine in planned.machines[1:]:
            part = nodes.get(machine.name)
            cells.append({"experts": part.nbytes, "program": client["program"]}.get(name, 0) if part else 0)
        if any(cells):
            shown = [f"{cell / GIB:.2f}" if cell else "" for cell in cells]
            table.add_row({"cache": "KV cache"}.get(name, name), *shown, end_section=name == SHOWN[-1])
    totals = _totals(planned, option).values()
    table.add_row("together", *(f"{total / GIB:.2f}" for total in totals))
    if not planned.measured:
        table.add_row("of", *(f"{machine.memory / GIB:.2f}" for machine in planned.machines))
    return table


def _terms(weighed: Weighed) -> Iterator[str]:
    """Where a step's time goes, the largest part first."""
    kinds = {"plain": weighed.plain, f"{STREAMS} streams": weighed.batched}
    if weighed.depth:
        kinds[f"drafted, {weighed.depth} at a time"] = weighed.drafted
    for name, prediction in kinds.items():
        parts = sorted(prediction.terms.items(), key=lambda term: -term[1])
        spent = ", ".join(f"{term} {seconds * 1e3:.1f}" for term, seconds in parts if seconds >= 5e-5)
        yield f"{name}: {_rate(prediction)} tokens/s, bound by {prediction.binds} (ms of a step: {spent})"


def commands(planned: Planned, option: Option, settings: Settings) -> Iterator[str]:
    """What to type on each machine."""
    model = quote(planned.model if preset(planned.model) is None else f"path/to/{planned.model}")
    quant = f" --quant {settings.quant}" if settings.quant else ""
    addresses = [_address(part.machine.name) for part in option.cut.parts]
    if option.cut.parts and not planned.measured:
        yield "  splitinfer cert   # once; copy the folder that it writes to every machine"
        for part in option.cut.parts:
            held = f" {flags}" if (flags := part.flags(planned.sizes)) else ""
            port = _address(part.machine.name).rpartition(":")[2]
            yield (
                f"  on {part.machine.name}:  splitinfer node {model}{held}{quant} --host 0.0.0.0 "
                f"--port {port} {SECURE}"
            )
    chat = [f"splitinfer chat {model}{quant}"]
    for name in ("attention", "dense", "embeddings", "lm_head"):
        if format := getattr(settings, f"quant_{name}"):
            chat.append(f"--quant-{name.replace('_', '-')} {format}")
    if settings.context:
        chat.append(f"--context {settings.context}")
    if planned.int8_cache:
        chat.append("--kv-cache int8")
    if addresses:
        chat.append(f"--nodes {','.join(addresses)}")
        local = option.cut.local
        chat += [f"--local-layers {local[0]}-{local[-1]}"] if local else []
        chat += [] if planned.measured else [TRUST]
    if option.weighed.depth == 0:
        chat.append("--draft off")
    yield f"  here:  {' '.join(chat)}"


def _address(name: str) -> str:
    return name if ":" in name else f"{name}:{PORT}"


def _assumptions(planned: Planned) -> Iterator[str]:
    assumed = planned.assumed
    rates = ", ".join(
        f"{format} {rate.nbytes / 1e9:.0f} GB/s and {rate.row:.0%} of that time for each further row"
        for format, rate in assumed.rates.items()
    )
    how = "as given, kernels in proportion" if planned.machines[0].bandwidth else "measured now"
    yield f"this machine reads {assumed.read / 1e9:.0f} GB/s from memory; its kernels: {rates} ({how})"
    if planned.measured:
        yield "the nodes as they answered now, each layer like the others"
    else:
        given = [f"{m.name} {m.bandwidth / 1e9:.0f} GB/s" for m in planned.machines[1:] if m.bandwidth]
        others = f" but for {', '.join(given)}" if given else ""
        yield f"nodes like this machine{others}, doing nothing else; a tenth of every memory stays free"
        link = f"{assumed.bandwidth * 8 / 1e6:.0f} Mbit/s"
        yield (
            f"a round trip of {assumed.round_trip * 1e3:g} ms, {link} here, {assumed.call * 1e3:g} ms more "
            "for each call to a node"
        )
    yield (
        f"{assumed.layer * 1e3:.2f} ms a layer and {(assumed.step + assumed.token) * 1e3:.2f} ms a token "
        "whatever the model (measured now, with the demo model)"
    )
    kept = " in int8" if planned.int8_cache else ""
    yield f"a cache half full ({planned.context // 2} tokens{kept}), experts chosen evenly"
    if planned.options[0].weighed.depth:
        chances = "/".join(f"{chance:.2f}" for chance in ACCEPTANCE)
        yield f"drafts right as often as users report of Gemma 4's drafter: {chances}; 0.1 GB a guess"


def as_json(planned: Planned) -> dict[str, Any]:
    """The same for programs: bytes, seconds, tokens per second. `best` is the index of the fastest way."""
    from splitinfer.planning.hardware import formats_of

    options = []
    for option in planned.options:
        parts = [
            {
                "node": part.machine.name,
                "flags": part.flags(planned.sizes),
                "experts": len(part.experts),
                "layers": len(part.layers),
                "columns": part.columns,
                "nbytes": part.nbytes,
            }
            for part in option.cut.parts
        ]
        options.append(
            {
                "way": option.cut.name,
                "local_layers": len(option.cut.local),
                "memory": _totals(planned, option),
                "client": plain(option.cut.client),
                "nodes": parts,
                **plain(option.weighed),
            }
        )
    return {
        "plan": planned.model,
        "version": __version__,
        "context": planned.context,
        "kv_cache": "int8" if planned.int8_cache else None,
        "formats": formats_of(planned.sizes),
        "assumed": plain(planned.assumed),
        "measured": planned.measured,
        "best": 0,
        "ways": options,
    }
