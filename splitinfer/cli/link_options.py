"""The options of a client command that say how its nodes are reached, declared once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Final

import typer

from splitinfer.cli.options import WHO_MAY

__all__ = ["TlsCa", "TlsCert", "TlsKey", "reaching_nodes"]

_LINK = "The link"

TlsCert = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Own certificate (PEM).", rich_help_panel=WHO_MAY),
]
TlsKey = Annotated[str | None, typer.Option(metavar="FILE", help="Its key (PEM).", rich_help_panel=WHO_MAY)]
TlsCa = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Authorities whose certificates are accepted (PEM).", rich_help_panel=WHO_MAY
    ),
]
_OPTIONS: Final[dict[str, Any]] = {
    "tls_fingerprint": Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHA256,...",
            help="Use TLS and accept exactly these nodes' certificates; may be repeated.",
            rich_help_panel=WHO_MAY,
        ),
    ],
    "tls_ca": Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Use TLS and accept what these authorities signed (PEM), or: system.",
            rich_help_panel=WHO_MAY,
        ),
    ],
    "tls_cert": TlsCert,
    "tls_key": TlsKey,
    "compression": Annotated[
        str | None,
        typer.Option(metavar="MODE", help="lz4 on the wire: auto, on or off.", rich_help_panel=_LINK),
    ],
    "wire_dtype": Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Round rows on the wire: bfloat16, float8_e4m3fn or int8. Lossy.",
            rich_help_panel=_LINK,
        ),
    ],
    "simulate_rtt": Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Emulate a round trip: 20ms.", rich_help_panel=_LINK),
    ],
    "simulate_jitter": Annotated[
        str | None, typer.Option(metavar="TIME", help="How far it varies: 2ms.", rich_help_panel=_LINK)
    ],
    "simulate_bandwidth": Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Emulate a bandwidth: 100mbit.", rich_help_panel=_LINK),
    ],
}


def reaching_nodes(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options. It gets their values, by the settings' names, as the map `link`."""

    @wraps(command)
    def wrapped(**values: Any) -> None:
        link = {name: values.pop(name) for name in _OPTIONS}
        command(**values, link=link)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "link"]
    kind = inspect.Parameter.KEYWORD_ONLY
    ours = [inspect.Parameter(name, kind, default=None, annotation=hint) for name, hint in _OPTIONS.items()]
    wrapped.__signature__ = signature.replace(parameters=[*own, *ours])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in own} | _OPTIONS
    return wrapped
