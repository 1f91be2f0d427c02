"""`splitinfer demo`: the whole of it on one machine, in a minute. Two nodes, one client, the same tokens."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitinfer.cli.console import busy, human_size, screen
from splitinfer.cli.processes import node_process
from splitinfer.cli.session import client_config, model_of
from splitinfer.config import Settings, load_settings
from splitinfer.errors import SplitinferError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console, RenderableType

    from splitinfer.blocking import Engine
    from splitinfer.generation import Completion

__all__ = ["EPILOG", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer demo                      two nodes on loopback, the built-in model
  splitinfer demo --prompt "class "    another beginning
"""

PROMPT = "import os\n\ndef copy_file("
# Columns of the table: a colour, and the phases of `splitinfer.timing` that they add up.
COLUMNS = {
    "attention": ("cyan", ("attention",)),
    "dense": ("magenta", ("dense",)),
    "dispatch": ("white", ("dispatch", "combine")),
    "network": ("yellow", ("network",)),
    "experts": ("green", ("experts",)),
}
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 1}
HERE = ["--host", "127.0.0.1", "--threads", "1"]
# Plain decoding in float32: nodes add their sums in another order, and here that must not show.
EXACT: dict[str, Any] = {"dtype": "float32", "threads": 1, "draft": "off"}
BAR_WIDTH = 14  # characters of the slowest layer's bar


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", show_default=False, help="Default: the built-in model.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the model goes on from.", show_default=False)] = PROMPT,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 96,
) -> None:
    """Generate through two expert nodes on this machine, show what it costs, compare with a local run.

    The nodes are processes of their own on loopback; they are gone when the command ends.
    """
    from splitinfer.model.hub import resolve_model

    path = resolve_model(model_of(Settings(model=model or "")))
    halves = _halves(path, prompt, max_tokens)
    console = screen(stderr=False)
    split = _split_run(console, path, halves, prompt, max_tokens)
    console.print(_costs(split))
    with busy("the same with the experts here"):
        import splitinfer

        with splitinfer.load(path, **EXACT) as engine:
            local = engine.generate(prompt, max_tokens=max_tokens, **SAMPLING)
    if split.token_ids != local.token_ids:
        same = sum(a == b for a, b in zip(split.token_ids, local.token_ids, strict=False))
        raise SplitinferError(f"the tokens differ: {same} of {len(local.token_ids)} agree")
    console.print(
        f"[bold green]same tokens[/] with the experts here: {len(local.token_ids)} of {len(split.token_ids)} "
        f"(at {local.timings.decode_tokens_per_second:.0f} tokens/s)",
        soft_wrap=True,
    )


def _halves(path: Path, prompt: str, max_tokens: int) -> tuple[str, str]:
    """What each node holds. Raises UsageError, before any is started, for what cannot be shown."""
    from splitinfer.engine_config import EngineConfig
    from splitinfer.model.tokenizer import Tokenizer
    from splitinfer.model.weights import Checkpoint
    from splitinfer.prompt import check_room, encode

    checkpoint = Checkpoint.open(path)
    count = checkpoint.config.num_experts
    if count < 2:
        raise UsageError(
            f"{path} is a dense model: it has no experts for two nodes",
            remedy="Name a model with a mixture of experts, or none: the built-in one.",
        )
    context = EngineConfig(**EXACT).context_of(checkpoint.config)
    check_room(len(encode(prompt, checkpoint, Tokenizer.open(path), context)), max_tokens, context)
    return f"0-{count // 2 - 1}", f"{count // 2}-{count - 1}"


def _split_run(
    console: Console, path: Path, halves: tuple[str, str], prompt: str, max_tokens: int
) -> Completion:
    """Start the nodes, generate through them, stop them."""
    import splitinfer

    trust = client_config(load_settings())  # the nodes read the same settings
    with ExitStack() as stack:
        with busy("starting two expert nodes"):
            addresses = [
                stack.enter_context(node_process([str(path), "--experts", half, *HERE])) for half in halves
            ]
        for address, half in zip(addresses, halves, strict=True):
            console.print(f"node {address} holds experts {half}", style="dim", highlight=False)
        with busy("loading attention, router and embeddings"):
            engine = stack.enter_context(splitinfer.load(path, addresses, transport=trust, **EXACT))
        return _show(console, engine, prompt, max_tokens)


def _show(console: Console, engine: Engine, prompt: str, max_tokens: int) -> Completion:
    """Generate with a live display on a terminal; elsewhere the text as it comes."""
    completion: Completion | None = None
    if not console.is_terminal:
        sys.stdout.write(prompt)
        for piece in engine.stream(prompt, max_tokens=max_tokens, **SAMPLING):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            completion = piece.completion
        sys.stdout.write("\n\n")
    else:
        from rich.live import Live

        text, tokens, start = "", 0, perf_counter()
        with Live(console=console, refresh_per_second=12) as live:
            for piece in engine.stream(prompt, max_tokens=max_tokens, **SAMPLING):
                text, tokens = text + piece.text, tokens + len(piece.token_ids)
                live.update(_frame(prompt, text, tokens / (perf_counter() - start)))
                completion = piece.completion
    assert completion is not None  # a stream ends with its completion
    return completion


def _frame(prompt: str, text: str, speed: float) -> RenderableType:
    """The text so far, prompt dimmed, under its speed."""
    from rich.panel import Panel
    from rich.text import Text

    body = Text.assemble((prompt, "dim"), text)
    return Panel(body, title=f"{speed:.0f} tokens/s", title_align="left", border_style="dim")


def _costs(completion: Completion) -> RenderableType:
    """Time of one token by layer, as figures and as a bar, and the bytes it took."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    layers = [
        {name: sum(layer.get(phase, 0.0) for phase in phases) for name, (_, phases) in COLUMNS.items()}
        for layer in completion.timings.layers
    ]
    table = Table(title="one token, µs by layer", title_justify="left", box=None, padding=(0, 1))
    table.add_column("layer", justify="right", style="dim")
    for name, (color, _) in COLUMNS.items():
        table.add_column(name, justify="right", style=color)
    table.add_column("")
    longest = max(sum(layer.values()) for layer in layers)
    for number, layer in enumerate(layers):
        bar = Text()
        for name, (color, _) in COLUMNS.items():
            bar.append("█" * round(BAR_WIDTH * layer[name] / longest), style=color)
        table.add_row(str(number), *(f"{seconds * 1e6:.0f}" for seconds in layer.values()), bar)
    usage, timings = completion.usage, completion.timings
    rows = usage.prompt_tokens + usage.completion_tokens - 1
    summary = Text(
        f"{timings.decode_tokens_per_second:.1f} tokens/s, the first after {timings.ttft * 1e3:.0f} ms; "
        f"{human_size(usage.bytes_sent / rows)} sent and {human_size(usage.bytes_received / rows)} received "
        f"per token, in {usage.calls} calls\n"
    )
    return Group(table, "", summary)
