"""splitinfer: attention on your machine, experts on others, one Gemma between them.

    with splitinfer.load("path-or-hub-id", nodes=["host:7077", "host:7078"]) as engine:
        print(engine.generate("Once", max_tokens=64).text)

Importing it is quick: torch is loaded when an engine or a node is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitinfer.errors import SplitinferError

if TYPE_CHECKING:
    from splitinfer.blocking import Engine, load
    from splitinfer.engine import AsyncEngine, EngineConfig
    from splitinfer.generation import Completion, Piece
    from splitinfer.node import ExpertNode

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineConfig",
    "ExpertNode",
    "Piece",
    "SplitinferError",
    "__version__",
    "load",
]

__version__ = "0.1.0"

_HOMES = {
    "AsyncEngine": ("splitinfer.engine", "AsyncEngine"),
    "Completion": ("splitinfer.generation", "Completion"),
    "Engine": ("splitinfer.blocking", "Engine"),
    "EngineConfig": ("splitinfer.engine", "EngineConfig"),
    "ExpertNode": ("splitinfer.node", "ExpertNode"),
    "Piece": ("splitinfer.generation", "Piece"),
    "load": ("splitinfer.blocking", "load"),
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value
