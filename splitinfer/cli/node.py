"""`splitinfer node`: hold experts of a model and serve them until told to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from splitinfer.cli import options
from splitinfer.cli.console import busy, human_size, run, screen
from splitinfer.cli.link_options import TlsCa, TlsCert, TlsKey
from splitinfer.cli.session import model_of, name_of, server_config
from splitinfer.config import Settings, load_settings

if TYPE_CHECKING:
    from splitinfer.node import ExpertNode

__all__ = ["EPILOG", "announce", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer node --experts 0-31                  half of the demo model
  splitinfer node path/to/gemma --experts 0-31,64-95
  splitinfer node path/to/gemma --layers 0-14     every expert of some layers
  splitinfer node --experts 32-63 --port 0        any free port; prints which
"""

_WHAT = "What it holds"
_WHO = options.WHO_MAY


def command(
    model: options.ModelArgument = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES", help="Experts to hold: 0-31,64-95. Default: all.", rich_help_panel=_WHAT
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="RANGES", help="Layers to hold them of. Default: all.", rich_help_panel=_WHAT),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes any free one. Default: 7077.")
    ] = None,
    quant: options.Quant = None,
    threads: options.Threads = None,
    token_file: options.TokenFile = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Listen beyond this machine without token and TLS.", rich_help_panel=_WHO
        ),
    ] = False,
) -> None:
    """Hold experts of a model and serve them until interrupted.

    Prints what it holds and where it listens. At SIGTERM or Ctrl-C the calls
    in flight may finish.
    """
    settings = load_settings(
        {
            "model": model,
            "experts": experts,
            "layers": layers,
            "host": host,
            "port": port,
            "quant": quant,
            "threads": threads,
            "token_file": token_file,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "tls_ca": tls_ca,
        }
    )
    run(_serve(settings, insecure=insecure))


async def _serve(settings: Settings, *, insecure: bool) -> None:
    from asyncio import get_running_loop, sleep

    with busy(f"loading experts of {name_of(settings)}"):
        from splitinfer.node import ExpertNode

        node = ExpertNode(
            model_of(settings),
            experts=settings.experts,
            layers=settings.layers,
            host=settings.host,
            port=settings.port,
            threads=settings.threads,
            quant=settings.quant,
            config=server_config(settings, insecure=insecure),
        )
        await node.start()
    serving = get_running_loop().create_task(node.serve_forever())
    await sleep(0)  # from here on it drains at SIGTERM: whoever reads the announcement may send one
    announce(node)
    await serving


def announce(node: ExpertNode) -> None:
    """Say what the node holds and where it listens: a panel on a terminal, two plain lines elsewhere."""
    holds = f"{node.holding}, {human_size(node.nbytes)}"
    console = screen(stderr=False)
    if not console.is_terminal:
        print(f"holding {holds}\nlistening on {node.address}", flush=True)
        return
    from rich.panel import Panel
    from rich.text import Text

    text = Text.assemble(
        ("holding    ", "dim"), holds, "\n", ("listening  ", "dim"), (node.address, "bold"), "\n",
        ("use it     ", "dim"), f'splitinfer generate "Once" --nodes {node.address}',
    )  # fmt: skip
    console.print(Panel.fit(text, title="splitinfer node", title_align="left", subtitle="Ctrl-C to stop"))
