"""The options that several commands share, declared once, and the decorator that hands them over as settings.

A command that `takes("nodes", "timeout")` has `--nodes` and `--timeout` on its line and gets one argument
`settings`, merged from all four places; `splitinfer.config` checks the values. With `sampling=True` it has
the sampling options and gets them as `request`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

from splitinfer.cli.session import Request
from splitinfer.config import load_settings
from splitinfer.errors import UsageError

__all__ = ["ENGINE", "LINK", "MODEL", "QUANT", "SERVING", "Estimate", "Json", "takes"]

_WHAT = "What it holds"
_WHERE = "Where it runs"
_WEIGHTS = "Weight formats"
_LINK = "The link to the nodes"
_SIMULATED = "Another link than this one"
_HOW = "How it samples"
_WHO = "Who may talk"

# What kinds of commands take: names of settings, for `takes`.
MODEL = ("model_argument", "model")
QUANT = ("quant", "quant_attention", "quant_dense", "quant_embeddings", "quant_lm_head")
SERVING = (
    "experts", "layers", "slice", "host", "port", "quant", "threads", "compression", "token_file", "tls_cert",
    "tls_key", "tls_ca", "insecure",
)  # fmt: skip
LINK = (
    "nodes", "timeout", "compression", "wire_dtype", "simulate_rtt", "simulate_jitter", "simulate_bandwidth",
    "token_file", "tls_fingerprint", "tls_ca", "tls_cert", "tls_key",
)  # fmt: skip
ENGINE = (
    "device", "dtype", "threads", "context", "draft", "draft_depth", "local_layers", "local_memory",
    "kv_cache", "exact", "trace", *QUANT, *LINK,
)  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for programs.")]
Estimate = Annotated[
    bool, typer.Option("--estimate", help="Print the memory this would take; load and connect to nothing.")
]


def _text(metavar: str, text: str, panel: str) -> Any:
    return Annotated[str | None, typer.Option(metavar=metavar, help=text, rich_help_panel=panel)]


def _number(kind: Any, metavar: str, text: str, panel: str) -> Any:
    return Annotated[kind, typer.Option(metavar=metavar, help=text, rich_help_panel=panel)]


_MODEL_HELP = "Folder, GGUF file or hub id. Default: SPLITINFER_MODEL, splitinfer.toml, the demo model."

_SETTINGS: dict[str, Any] = {
    "model_argument": Annotated[
        str | None, typer.Argument(metavar="MODEL", show_default=False, help=_MODEL_HELP)
    ],
    "model": Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL_HELP)],
    "experts": _text("RANGES", "Experts to hold: 0-31,64-95. Default: all.", _WHAT),
    "layers": _text("RANGES", "Layers to hold them of. Default: all.", _WHAT),
    "slice": _text("PART", "Part of every expert to hold: 1/2, or 0.3:0.7. Default: whole.", _WHAT),
    "host": _text("HOST", "Address to listen on. Default: 127.0.0.1.", _WHERE),
    "port": _number(int | None, "PORT", "Port; 0 takes any free one. Default: 7077.", _WHERE),
    "device": _text("DEVICE", "Device of the client's half: cpu, cuda, cuda:N, mps.", _WHERE),
    "dtype": _text("DTYPE", "float32 or bfloat16. Default: the checkpoint's.", _WHERE),
    "threads": _number(int | None, "N", "Threads for arithmetic.", _WHERE),
    "context": _number(int | None, "TOKENS", "Longest prompt and answer together.", _WHERE),
    "draft": _text("HOW", "Guess ahead: auto, off, lookup, or a drafter's folder. Same tokens.", _WHERE),
    "draft_depth": _text("N", "Tokens guessed at a time: auto, or 1 to 15.", _WHERE),
    "quant": _text("FORMAT", "Experts: float32, bfloat16, int8, int4. Default: as stored.", _WEIGHTS),
    "quant_attention": _text("FORMAT", "Attention. Default: int8 with --quant int8 or int4.", _WEIGHTS),
    "quant_dense": _text("FORMAT", "Dense MLP, likewise.", _WEIGHTS),
    "quant_embeddings": _text("FORMAT", "Embeddings, likewise.", _WEIGHTS),
    "quant_lm_head": _text("FORMAT", "lm_head, likewise.", _WEIGHTS),
    "local_layers": _text("RANGES", "Keep the experts of these layers here: 0-9.", _WHERE),
    "local_memory": _text("SIZE", "Or those of as many layers as fit: 6GiB.", _WHERE),
    "kv_cache": _text("FORMAT", "Keys and values as int8: half the memory. Lossy.", _WHERE),
    "exact": Annotated[
        bool | None,
        typer.Option(
            "--exact",
            help="The same bits whatever nodes hold what: more bytes come back.",
            rich_help_panel=_WHERE,
        ),
    ],
    "trace": _text("FILE", "Write a time line, for chrome://tracing or ui.perfetto.dev.", _WHERE),
    "nodes": Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST:PORT,...",
            help="Expert nodes, separated by commas; may be repeated. Default: experts on this machine.",
            rich_help_panel=_LINK,
        ),
    ],
    "timeout": _number(float | None, "SECONDS", "Deadline of a call to a node. Default: 60.", _LINK),
    "compression": _text("MODE", "lz4 on the wire: auto (where it helps), on, off.", _LINK),
    "wire_dtype": _text("DTYPE", "Round rows: bfloat16, float8_e4m3fn or int8. Lossy.", _LINK),
    "simulate_rtt": _text("TIME", "Emulate a round trip: 20ms.", _SIMULATED),
    "simulate_jitter": _text("TIME", "How far it varies: 2ms.", _SIMULATED),
    "simulate_bandwidth": _text("RATE", "Emulate a bandwidth: 100mbit.", _SIMULATED),
    "token_file": _text("FILE", "The token that nodes and clients share. Default: SPLITINFER_TOKEN.", _WHO),
    "tls_fingerprint": Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHA256,...",
            help="Use TLS and accept exactly these nodes' certificates; may be repeated.",
            rich_help_panel=_WHO,
        ),
    ],
    "tls_ca": _text("FILE", "Accept what these authorities signed (PEM); on a client also: system.", _WHO),
    "tls_cert": _text("FILE", "This side's certificate (PEM); `splitinfer cert` makes one.", _WHO),
    "tls_key": _text("FILE", "The key of this side's certificate (PEM).", _WHO),
    "insecure": Annotated[
        bool | None,
        typer.Option(
            "--insecure", help="Listen beyond this machine without token and TLS.", rich_help_panel=_WHO
        ),
    ],
}

# Annotation and default of each field of `Request`.
_SAMPLING: dict[str, tuple[Any, Any]] = {
    "max_tokens": (
        Annotated[
            int | None,
            typer.Option(
                min=1,
                metavar="N",
                help="Stop after N tokens. Default: 256, or what fits.",
                rich_help_panel=_HOW,
            ),
        ],
        None,
    ),
    "temperature": (
        Annotated[
            float, typer.Option(min=0.0, max=100.0, help="0 takes the likeliest token.", rich_help_panel=_HOW)
        ],
        0.0,
    ),
    "top_p": (
        Annotated[
            float,
            typer.Option(min=0.0, max=1.0, help="Keep the likeliest, up to this sum.", rich_help_panel=_HOW),
        ],
        1.0,
    ),
    "top_k": (
        Annotated[int, typer.Option(min=0, help="Keep the K likeliest; 0: all.", rich_help_panel=_HOW)],
        0,
    ),
    "seed": (
        Annotated[int | None, typer.Option(min=0, help="Same seed, same tokens.", rich_help_panel=_HOW)],
        None,
    ),
    "stop": (
        Annotated[
            list[str] | None,
            typer.Option(
                metavar="TEXT", help="Stop before this text; may be repeated.", rich_help_panel=_HOW
            ),
        ],
        None,
    ),
}

Command = Callable[..., None]


def takes(*names: str, sampling: bool = False) -> Callable[[Command], Command]:
    """Give a command the options of these settings, and those of sampling if asked for.

    The command itself is called with its own parameters, `settings`, and `request` if `sampling`.
    """

    def decorate(command: Command) -> Command:
        declared = signature(command, eval_str=True)
        own = [p for name, p in declared.parameters.items() if name not in ("settings", "request")]
        shared = [(name, *pair) for name, pair in _SAMPLING.items()] if sampling else []
        shared += [(name, _SETTINGS[name], None) for name in names]
        added = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, annotation, default in shared
        ]

        @wraps(command)
        def wrapped(**given: Any) -> None:
            if sampling:
                asked = {name: given.pop(name) for name in _SAMPLING}
                given["request"] = Request(**{**asked, "stop": tuple(asked["stop"] or ())})
            mine = {name: given.pop(name) for name in names}
            mine["model"] = _one_model(mine.pop("model_argument", None), mine.get("model"))
            command(settings=load_settings(mine), **given)

        parameters = sorted([*own, *added], key=lambda parameter: parameter.kind)
        vars(wrapped)["__signature__"] = declared.replace(parameters=parameters)
        return wrapped

    return decorate


def _one_model(argument: str | None, option: str | None) -> str | None:
    """The model named on the line, as argument or as option. Raises `UsageError` where both are given."""
    if argument is not None and option is not None:
        raise UsageError(f"two models are named: {argument} and --model {option}", remedy="Name one of them.")
    return argument if option is None else option
