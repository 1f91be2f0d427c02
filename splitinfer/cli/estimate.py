"""What `--estimate` prints: the memory that a node or a client would take, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from splitinfer.cli.console import human_size
from splitinfer.cli.session import engine_settings, model_of
from splitinfer.config import Settings

if TYPE_CHECKING:
    from splitinfer.model.footprint import Sizes
    from splitinfer.model.weights import Checkpoint

__all__ = ["print_client", "print_node"]

_NAMES = {
    "experts": "experts",
    "attention": "attention",
    "dense": "dense MLP",
    "embeddings": "embeddings",
    "lm_head": "lm_head",
    "other": "norms and router",
    "cache": "keys and values",
    "working": "rows under way",
    "program": "program",
}


def print_node(settings: Settings) -> None:
    """The memory of `splitinfer node` with these settings. Raises as opening the model does."""
    from splitinfer.model.footprint import PROGRAM_NBYTES
    from splitinfer.model.quantize import QuantConfig
    from splitinfer.placement import format_ranges, parse_ranges, parse_slice

    checkpoint = _open(settings)
    checkpoint.check_experts()
    config = checkpoint.config
    experts, layers, columns = checkpoint.held_experts, checkpoint.held_layers, checkpoint.held_columns
    if settings.experts is not None:
        experts = parse_ranges(settings.experts, config.num_experts, "--experts")
    if settings.layers is not None:
        layers = parse_ranges(settings.layers, config.num_hidden_layers, "--layers")
    if settings.slice is not None:
        columns = parse_slice(settings.slice, config.moe_intermediate_size, "--slice")
    sizes = _sizes(checkpoint, QuantConfig.of(settings.quant))
    nbytes = sizes.experts(layers, len(experts), columns)
    _print_table(
        "a node",
        {"experts": nbytes, "program": PROGRAM_NBYTES},
        {
            "experts": f"{sizes.formats('experts', layers)}, experts {format_ranges(experts)} "
            f"of layers {format_ranges(layers)}, mapped or converted once all were used",
            "program": "Python and PyTorch",
        },
    )


def print_client(settings: Settings) -> None:
    """The memory of `splitinfer generate` or `chat` with these settings. Raises as opening the model does."""
    from dataclasses import asdict

    from splitinfer.engine_config import EngineConfig
    from splitinfer.mixed import chosen_layers
    from splitinfer.model.footprint import working_nbytes
    from splitinfer.placement import format_ranges

    checkpoint = _open(settings)
    config = checkpoint.config
    engine = EngineConfig(**engine_settings(settings))
    context, quant, dtype = engine.context_of(config), engine.quant_config(), engine.torch_dtype()
    sizes = _sizes(checkpoint, quant, dtype)
    every = tuple(range(config.num_hidden_layers if config.enable_moe_block else 0))
    kept = every
    if settings.nodes:
        kept = chosen_layers(checkpoint, settings.local_layers, settings.local_memory, dtype, quant.experts)
    held = sizes.client(context, kept, int8_cache=engine.int8_cache())
    found = asdict(held) | {"working": working_nbytes(config, context)}
    parts = {name: found[name] for name in _NAMES if found[name]}
    notes = {name: sizes.formats(name) for name in ("attention", "dense", "embeddings", "lm_head")}
    if "lm_head" not in parts:
        notes["embeddings"] += ", lm_head too"
    elif not notes["lm_head"]:
        notes["lm_head"] = f"{quant.lm_head}, the embeddings' tensor once more"
    if kept:
        notes["experts"] = f"{sizes.formats('experts', kept)}, layers {format_ranges(kept)}"
    kind = settings.kv_cache or str(sizes.dtype).removeprefix("torch.")
    notes["cache"] = f"one sequence of {context:,} tokens, {kind}"
    notes["working"] = "steps of a long prompt"
    notes["program"] = "Python and PyTorch"
    _print_table("this machine", parts, notes)
    away = [layer for layer in every if layer not in kept]
    if away and checkpoint.held_experts:
        nbytes = sizes.experts(away)
        print(
            f"the nodes hold {human_size(nbytes)} together: {sizes.formats('experts', away)}, "
            f"{config.num_experts} experts of layers {format_ranges(away)}"
        )


def _open(settings: Settings) -> Checkpoint:
    from splitinfer.model.hub import resolve_model
    from splitinfer.model.weights import Checkpoint

    return Checkpoint.open(resolve_model(model_of(settings)))


def _sizes(checkpoint: Checkpoint, quant: Any, dtype: Any = None) -> Sizes:
    from splitinfer.model.footprint import Sizes

    return Sizes.of(checkpoint, quant=quant, dtype=dtype)


def _print_table(title: str, parts: dict[str, int], notes: dict[str, str]) -> None:
    total = sum(parts.values())
    print(f"{title} takes {human_size(total)} ({total / 2**30:.2f} GiB) of memory")
    for line in _lines(parts, notes):
        print(line)


def _lines(parts: dict[str, int], notes: dict[str, str]) -> Iterable[str]:
    for name, nbytes in parts.items():
        yield f"  {_NAMES[name]:<18}{human_size(nbytes):>8}  {notes.get(name, '')}".rstrip()
