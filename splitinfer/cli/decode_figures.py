"""Predicted beside measured, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from splitinfer.cli.console import plain

if TYPE_CHECKING:
    from rich.table import Table

    from splitinfer.cli.decode import Bench, Decoded
    from splitinfer.planning.cost import Curve

__all__ = ["CLOSE", "as_json", "calibration_lines", "table_of"]

CLOSE = 0.15  # how far a prediction may be off before the table says so


def table_of(found: Sequence[Decoded]) -> Table:
    """One line for each case, by link."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "tokens/s, predicted and measured"
    if any(case.disturbed for case in found):
        title += "; * other programs took a part of the cores"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("link", "nodes", "case"):
        table.add_column(name, no_wrap=True)
    for name in ("predicted", "measured", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what binds", no_wrap=True)
    for number, case in enumerate(found):
        last = number + 1 == len(found) or found[number + 1].link != case.link
        off = abs(case.ratio - 1) > CLOSE
        table.add_row(
            case.link,
            case.nodes,
            case.case,
            f"{case.predicted.tokens_per_second:.3g}",
            f"{case.measured:.3g}",
            f"[bold red]{case.ratio:.2f}[/]" if off else f"{case.ratio:.2f}",
            case.predicted.binds + (" *" if case.disturbed else ""),
            end_section=last,
        )
    return table


def calibration_lines(bench: Bench) -> list[str]:
    """What the predictions were made from, in milliseconds for 1 to 8 rows."""
    lines = []
    for link, client in bench.clients.items():
        layer = {"attention": client.attention, "dense": client.dense, "experts here": client.experts}
        over = f"over {link}: " if len(bench.clients) > 1 else ""
        lines.append(f"{over}a layer on this machine, ms: {_curves(layer)}")
        lines.append(
            f"{over}a step beside its layers, ms: {_curves({'lm_head': client.head, 'rest': client.step})}; "
            f"a token {client.token.at(1) * 1e3:.2f}, a guess {client.draft * 1e3:.2f}"
        )
    for nodes, call in bench.calls.items():
        parts = {"experts": call.experts, "handling": call.handling, "send": call.send, "add": call.combine}
        trip = f"{call.round_trip * 1e3:.2f} ({call.message * 1e3:.2f} of processor time here)"
        lines.append(f"a call to {nodes}, ms beside its round trip of {trip}: {_curves(parts)}")
        if call.alone is not None:
            alone = {"handling": call.alone.handling, "send": call.alone.send, "add": call.alone.combine}
            lines.append(f"one that the kernels send and wait for, the same: {_curves(alone)}")
    for depth, tokens in sorted(bench.yields.items()):
        lines.append(f"{depth} drafts a step give {tokens:.2f} tokens")
    return lines


def _curves(curves: dict[str, Curve]) -> str:
    return ", ".join(
        f"{name} " + "/".join(f"{seconds * 1e3:.2f}" for _, seconds in curve.points)
        for name, curve in curves.items()
    )


def as_json(bench: Bench, found: Sequence[Decoded]) -> dict[str, Any]:
    """Cases and calibration; seconds and tokens per second."""
    return {
        "calibration": {
            "clients": plain(bench.clients),
            "calls": plain(bench.calls),
            "tokens_per_step": {str(depth): tokens for depth, tokens in bench.yields.items()},
        },
        "cases": [{**plain(case), "ratio": case.ratio} for case in found],
    }
