"""The options that several commands share, declared once. Their values are checked by `splitinfer.config`."""

from __future__ import annotations

from typing import Annotated

import typer

from splitinfer.errors import UsageError

__all__ = [
    "WHO_MAY",
    "Context",
    "Device",
    "Dtype",
    "Json",
    "MaxTokens",
    "Model",
    "ModelArgument",
    "Nodes",
    "Quant",
    "QuantAttention",
    "QuantDense",
    "QuantEmbeddings",
    "QuantLmHead",
    "Seed",
    "Stop",
    "Temperature",
    "Threads",
    "Timeout",
    "TokenFile",
    "TopK",
    "TopP",
    "one_model",
]

_WHERE = "Where it runs"
_WEIGHTS = "Weight formats"
_HOW = "How it samples"
WHO_MAY = "Who may talk"

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Checkpoint: a folder or a hub id. Default: SPLITINFER_MODEL, splitinfer.toml, the demo model.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Checkpoint: a folder or a hub id. Default: SPLITINFER_MODEL, splitinfer.toml, the demo model.",
    ),
]
Nodes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST:PORT,...",
        help="Expert nodes, separated by commas; may be repeated. Default: experts on this machine.",
        rich_help_panel=_WHERE,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Device of the client's half: cpu, cuda, mps.", rich_help_panel=_WHERE)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE", help="float32 or bfloat16. Default: the checkpoint's.", rich_help_panel=_WHERE
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads for arithmetic.", rich_help_panel=_WHERE)]
Quant = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="Weights of the experts: float32, bfloat16, int8, int4. Default: as stored.",
        rich_help_panel=_WEIGHTS,
    ),
]
QuantAttention = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="Weights of attention. Default: int8 with --quant int8 or int4.",
        rich_help_panel=_WEIGHTS,
    ),
]
QuantDense = Annotated[
    str | None,
    typer.Option(metavar="FORMAT", help="Weights of the dense MLP, likewise.", rich_help_panel=_WEIGHTS),
]
QuantEmbeddings = Annotated[
    str | None,
    typer.Option(metavar="FORMAT", help="Weights of the embeddings, likewise.", rich_help_panel=_WEIGHTS),
]
QuantLmHead = Annotated[
    str | None,
    typer.Option(metavar="FORMAT", help="Weights of the lm_head, likewise.", rich_help_panel=_WEIGHTS),
]
Context = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", help="Longest prompt and answer together.", rich_help_panel=_WHERE),
]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Deadline of a call to a node.", rich_help_panel=_WHERE),
]
TokenFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="The token that nodes and clients share. Default: SPLITINFER_TOKEN, if set.",
        rich_help_panel=WHO_MAY,
    ),
]

MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Stop after N tokens. Default: 256, or what fits.", rich_help_panel=_HOW
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, max=100.0, help="0 takes the likeliest token.", rich_help_panel=_HOW)
]
TopP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens up to this sum.", rich_help_panel=_HOW),
]
TopK = Annotated[int, typer.Option(min=0, help="Keep the K likeliest tokens; 0: all.", rich_help_panel=_HOW)]
Seed = Annotated[int | None, typer.Option(min=0, help="Same seed, same tokens.", rich_help_panel=_HOW)]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Stop before this text; may be repeated.", rich_help_panel=_HOW),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for programs.")]


def one_model(argument: str | None, option: str | None) -> str | None:
    """The model named on the line, as argument or as option. Raises `UsageError` where both are given."""
    if argument is not None and option is not None:
        raise UsageError(f"two models are named: {argument} and --model {option}", remedy="name one of them")
    return argument if option is None else option
