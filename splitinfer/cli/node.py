"""`splitinfer node`: hold experts of a model and serve them until told to stop."""

from __future__ import annotations

from platform import node as node_name
from typing import TYPE_CHECKING

from splitinfer.cli.console import busy, human_size, run, screen
from splitinfer.cli.estimate import print_node
from splitinfer.cli.options import MODEL, SERVING, Estimate, takes
from splitinfer.cli.session import model_of, name_of, server_config
from splitinfer.config import Settings

if TYPE_CHECKING:
    from splitinfer.node import ExpertNode

__all__ = ["EPILOG", "announce", "client_command", "command"]

EPILOG = """
[bold]Examples[/bold]
  splitinfer node --experts 0-31                  half of the demo model
  splitinfer node path/to/gemma --experts 0-31,64-95
  splitinfer node path/to/gemma --layers 0-14     every expert of some layers
  splitinfer node path/to/gemma --slice 1/2       the first half of every expert
  splitinfer node path/to/gemma --experts 0-63 --quant int4 --estimate
  splitinfer node --experts 32-63 --port 0        any free port; prints which
"""


@takes(*MODEL, *SERVING)
def command(estimate: Estimate = False, *, settings: Settings) -> None:
    """Hold experts of a model and serve them until interrupted.

    Prints what it holds and where it listens. At SIGTERM or Ctrl-C the calls
    in flight may finish.
    """
    if estimate:
        print_node(settings)
        return
    run(_serve(settings))


async def _serve(settings: Settings) -> None:
    from asyncio import get_running_loop, sleep

    with busy(f"loading experts of {name_of(settings)}"):
        from splitinfer.node import ExpertNode

        node = ExpertNode(
            model_of(settings),
            experts=settings.experts,
            layers=settings.layers,
            slice=settings.slice,
            host=settings.host,
            port=settings.port,
            threads=settings.threads,
            quant=settings.quant,
            config=server_config(settings),
        )
        await node.start()
    serving = get_running_loop().create_task(node.serve_forever())
    await sleep(0)  # from here on it drains at SIGTERM: whoever reads the announcement may send one
    announce(node, settings)
    await serving


def announce(node: ExpertNode, settings: Settings) -> None:
    """Say what the node holds and where it listens: on a terminal with a command that uses it, else two plain
    lines."""
    holds = f"{node.holding}, {human_size(node.nbytes)}"
    console = screen(stderr=False)
    if not console.is_terminal:
        print(f"holding {holds}\nlistening on {node.address}", flush=True)
        return
    from rich.panel import Panel
    from rich.text import Text

    text = Text.assemble(
        ("holding    ", "dim"), holds, "\n", ("listening  ", "dim"), (node.address, "bold")
    )  # fmt: skip
    console.print(Panel.fit(text, title="splitinfer node", title_align="left", subtitle="Ctrl-C to stop"))
    # Outside the panel: a terminal may break the line, and it can still be copied whole.
    console.print(Text.assemble(("use it: ", "dim"), client_command(node.address, settings)), soft_wrap=True)


def client_command(address: str, settings: Settings) -> str:
    """What to type on a client of this node: with the model, and what the node asks of clients."""
    from splitinfer.transport.certificates import TLSConfig, server_binding

    host, _, port = address.rpartition(":")
    if host in ("0.0.0.0", "[::]"):
        host = node_name()  # nobody dials "every address of this machine"
    words = [
        "splitinfer generate",
        '"import os"' if not settings.model else f'"Once" --model {settings.model}',
    ]
    words.append(f"--nodes {host}:{port}")
    if settings.token_file:
        words.append(f"--token-file {settings.token_file}")
    if settings.tls_cert:
        binding = server_binding(TLSConfig(settings.tls_cert, settings.tls_key))
        words.append(f"--tls-fingerprint sha256:{binding.hex()}")
    return " ".join(words)
