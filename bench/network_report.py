"""Tables and pictures of what bench/network.py has measured."""

from __future__ import annotations

import math
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

__all__ = ["plot", "show", "show_llama", "show_windows"]

WIDTH = 110
BOUNDED = ("plain", "third local")  # columns that have a bound


def show(table: dict[str, Any]) -> None:
    """The figures, the prompts, and the speeds as bars, on standard error."""
    console = Console(stderr=True, width=WIDTH, highlight=False)
    shown = Table(
        "round trip", "", "tokens/s", "× plain", "of bound", "acceptance", "kB/token", "calls/token", "tokens"
    )
    for rtt, row in table.items():
        plain = row["cells"].get("plain", {}).get("tokens_per_second", math.nan)
        for name, cell in row["cells"].items():
            shown.add_row(
                rtt,
                name,
                f"{cell['tokens_per_second']:.1f}",
                f"{cell['tokens_per_second'] / plain:.2f}",
                f"{cell['of_bound']:.2f}" if name in BOUNDED else "",
                f"{cell['acceptance']:.2f}" if cell["acceptance"] else "",
                f"{cell['bytes_per_token'] / 1e3:.1f}",
                f"{cell['calls_per_token']:.2f}",
                "same" if cell["same_tokens"] else "OTHER",
            )
        shown.add_section()
    console.print(shown)
    console.print(_bounds(table))
    prompts = Table(
        "round trip", "of a call, ms", "512 tokens, s", "bound, s", "long, s", "pause, ms", "beside, ms"
    )
    for rtt, row in table.items():
        found = row.get("prompts")
        if found is None:
            continue
        prompts.add_row(
            rtt,
            f"{found['round_trip'] * 1e3:.2f}",
            f"{found['prefill_seconds']:.3f}",
            f"{found['prefill_bound']:.3f}",
            f"{found['long_prompt_seconds']:.2f}",
            f"{found['usual_pause'] * 1e3:.0f}",
            f"{found['longest_pause'] * 1e3:.0f}",
        )
    if prompts.rows:
        console.print(prompts)
    show_bars(table, console)


def _bounds(table: dict[str, Any]) -> Table:
    """What the bounds are made of, ms."""
    shown = Table("round trip", "", "a call", "a call's experts", "a token's local time", "bound", "measured")
    for rtt, row in table.items():
        for name in BOUNDED:
            if (cell := row["cells"].get(name)) is None:
                continue
            token = 1 / cell["tokens_per_second"]
            parts = (cell["round_trip"], cell["experts"], cell["local"], token * cell["of_bound"], token)
            shown.add_row(rtt, name, *(f"{seconds * 1e3:.3f}" for seconds in parts))
    return shown


def show_bars(table: dict[str, Any], console: Console) -> None:
    """One bar for each cell, on a logarithmic scale that all of them share."""
    rates = [cell["tokens_per_second"] for row in table.values() for cell in row["cells"].values()]
    low, high = math.log(min(rates) / 2), math.log(max(rates))
    bars = Table.grid(padding=(0, 1))
    for rtt, row in table.items():
        bars.add_row(f"{rtt} round trip", "", "")
        for name, cell in row["cells"].items():
            rate = cell["tokens_per_second"]
            bars.add_row(f"  {name}", Bar(high - low, 0, math.log(rate) - low, width=60), f"{rate:.0f}")
    console.print(bars)


def show_llama(figures: dict[str, Any]) -> None:
    """llama.cpp beside this library, one row for each round trip."""
    names = list(dict.fromkeys(name for row in figures["rows"].values() for name in row))
    shown = Table("round trip", *names, title="tokens/s, " + figures["model"])
    for rtt, row in figures["rows"].items():
        shown.add_row(rtt, *(f"{row[name]:.2f}" for name in names))
    Console(stderr=True, width=WIDTH, highlight=False).print(shown)


def show_windows(figures: dict[str, Any]) -> None:
    """One window of drafts and several, one row for each round trip, drafter and temperature."""
    title = f"tokens/s over {figures['tokens']} tokens, median of {figures['rounds']}"
    shown = Table("round trip", "", "temperature", "one window", "several", "×", "acceptance", title=title)
    for row in figures["rows"]:
        rates = (row["one"], row["several"], row["several"] / row["one"], row["acceptance"])
        shown.add_row(row["rtt"], row["drafter"], f"{row['temperature']:g}", *(f"{r:.2f}" for r in rates))
    Console(stderr=True, width=WIDTH, highlight=False).print(shown)


def plot(table: dict[str, Any], file: str) -> None:
    """Tokens/s grouped by round trip, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    names = list(next(iter(table.values()))["cells"])
    width = 0.84 / len(names)
    colours = pyplot.get_cmap("viridis")
    for place, name in enumerate(names):
        rates = [row["cells"][name]["tokens_per_second"] for row in table.values()]
        at = [group + place * width for group in range(len(table))]
        bars = axes.bar(at, rates, width * 0.9, label=name, color=colours(place / (len(names) - 0.5)))
        axes.bar_label(bars, [f"{rate:.0f}" for rate in rates], fontsize=7)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    marks = [mark for power in range(6) for mark in (10**power, 3 * 10**power) if low <= mark <= high]
    axes.yaxis.set_major_locator(FixedLocator(marks))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    middle = (len(names) - 1) * width / 2
    axes.set_xticks([group + middle for group in range(len(table))], [f"{rtt} round trip" for rtt in table])
    axes.set_ylabel("tokens/s")
    axes.set_ylim(low, high * 1.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    figure.savefig(file, dpi=150)
