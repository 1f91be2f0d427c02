"""`splitinfer demo`: the whole of it on one machine, in a minute. Two nodes, one client, the same tokens."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from splitinfer.cli.console import busy, human_size, screen
from splitinfer.cli.processes import node_process
from splitinfer.errors import SplitinferError

if TYPE_CHECKING:
    from rich.table import Table

    from splitinfer.generation import Completion

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer demo                        two nodes on loopback, the built-in model
  splitinfer demo --prompt "class "      another beginning
"""

PHASES = ("attention", "router", "dense", "network", "experts")
COLORS = {"attention": "cyan", "router": "blue", "dense": "magenta", "network": "yellow", "experts": "green"}


def command(
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")] = "def read(self, size=-1):\n",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 96,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", show_default=False, help="Default: the built-in model.")
    ] = None,
) -> None:
    """Generate through two expert nodes on this machine, show the cost, and check against a local run."""
    import splitinfer
    from splitinfer import demo
    from splitinfer.model.config import load_config
    from splitinfer.model.hub import resolve_model

    path = resolve_model(model or demo.path())
    count = load_config(path).num_experts
    half = count // 2
    with ExitStack() as stack:
        with busy("starting two expert nodes"):
            addresses = [
                stack.enter_context(node_process([str(path), "--experts", experts, "--threads", "1"]))
                for experts in (f"0-{half - 1}", f"{half}-{count - 1}")
            ]
        console = screen()
        for address, held in zip(addresses, (f"0-{half - 1}", f"{half}-{count - 1}"), strict=True):
            console.print(f"node {address} holds experts {held}", style="dim", highlight=False)
        with busy("loading attention, router and embeddings"):
            engine = stack.enter_context(splitinfer.load(path, nodes=addresses, threads=1))
        split = _generate(engine, prompt, max_tokens)
    console.print(_table(split))
    console.print(_summary(split))
    with busy("the same with the experts here"), splitinfer.load(path, threads=1) as engine:
        local = engine.generate(prompt, max_tokens=max_tokens)
    same = sum(a == b for a, b in zip(split.token_ids, local.token_ids, strict=False))
    speeds = f"{split.timings.decode_tokens_per_second:.1f} tokens/s split, "
    speeds += f"{local.timings.decode_tokens_per_second:.1f} with the experts here"
    if split.token_ids != local.token_ids:
        raise SplitinferError(f"the tokens differ: {same} of {len(local.token_ids)} agree ({speeds})")
    console.print(f"[bold green]same tokens[/]: {same} of {len(local.token_ids)}; {speeds}")


def _generate(engine: object, prompt: str, max_tokens: int) -> Completion:
    """Stream the text to standard output as it comes."""
    from splitinfer.blocking import Engine

    assert isinstance(engine, Engine)
    sys.stdout.write(prompt)
    completion = None
    for piece in engine.stream(prompt, max_tokens=max_tokens):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        completion = piece.completion
    assert completion is not None
    sys.stdout.write("\n\n")
    sys.stdout.flush()
    return completion


def _table(completion: Completion) -> Table:
    """Time per layer for one token, as figures and as a bar."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="one token, layer by layer (µs)", title_justify="left", box=None, padding=(0, 1))
    table.add_column("layer", justify="right")
    for phase in PHASES:
        table.add_column(phase, justify="right", style=COLORS[phase])
    table.add_column("")
    longest = max(sum(layer.values()) for layer in completion.timings.layers)
    for number, layer in enumerate(completion.timings.layers):
        bar = Text()
        for phase in PHASES:
            bar.append("█" * round(40 * layer.get(phase, 0.0) / longest), style=COLORS[phase])
        table.add_row(str(number), *(f"{layer.get(phase, 0.0) * 1e6:.0f}" for phase in PHASES), bar)
    return table


def _summary(completion: Completion) -> str:
    usage, timings = completion.usage, completion.timings
    tokens = usage.prompt_tokens + usage.completion_tokens - 1
    return (
        f"{timings.decode_tokens_per_second:.1f} tokens/s, first token after {timings.ttft * 1000:.0f} ms; "
        f"per token {human_size(usage.bytes_sent / tokens)} sent and "
        f"{human_size(usage.bytes_received / tokens)} received; {usage.calls} calls"
    )
