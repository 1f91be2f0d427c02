"""The rooms and floors: imports go down only, and the ground floor stays light.

Each room may import what stands on the same line or below it:

    cli
    blocking  serve                 for people and programs
    engine
    engine_config
    dispatch  node  drafting        split execution: client, server; several tokens per step
    ready_requests  in_flight       a layer's expert calls, before they go and while they are under way
    batching                        many sequences per step
    mixed                           some layers here, the others on nodes
    planning                        which cut suits which machines; costs, without measuring
    placement  fanout  trace  exact_nodes  expert_call
    transport       model  demo     bytes and tensors | mathematics: neither knows the other
    config  errors  generation  timing  fixed_point
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "splitinfer"
GROUND = {"errors", "config", "generation", "timing"}
MAY_IMPORT = {
    "errors": set(),
    "timing": set(),
    "generation": {"errors"},
    "fixed_point": {"errors"},
    "config": {"errors", "demo"},
    "demo": {"errors"},
    "transport": {"errors", "transport"},
    "model": {"errors", "timing", "fixed_point", "model", "demo"},
    "placement": {"errors"},
    "planning": {"errors", "placement", "model"},
    "fanout": {"fixed_point", "transport", "model"},
    "in_flight": {"errors", "transport", "fanout"},
    "exact_nodes": {"errors", "placement"},
    "trace": {"errors", "timing"},
    "lost_nodes": {"errors", "placement"},
    "ready_requests": {"timing", "transport", "model", "expert_call", "fanout", "in_flight"},
    "dispatch": GROUND
    | {
        "transport",
        "model",
        "placement",
        "fanout",
        "in_flight",
        "ready_requests",
        "lost_nodes",
        "exact_nodes",
    },
    "expert_call": GROUND | {"transport", "placement", "model"},
    "node": GROUND | {"transport", "placement", "dispatch", "expert_call", "model"},
    "batching": {"timing", "model"},
    "draft_depth": {"errors", "model"},
    "drafting": {"errors", "timing", "batching", "draft_depth", "model"},
    "mixed": {"errors", "timing", "placement", "model"},
    "prompt": {"errors", "model"},
    "engine_config": {"errors", "fixed_point", "transport", "model"},
    "engine": GROUND
    | {
        "transport",
        "placement",
        "dispatch",
        "batching",
        "draft_depth",
        "drafting",
        "engine_config",
        "mixed",
        "trace",
    }
    | {"model", "prompt"},
    "blocking": GROUND | {"engine", "dispatch", "model"},
}
TOP = {"cli", "__init__", "__main__"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    """The rooms of splitinfer that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "splitinfer":
            names = [f"splitinfer.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("splitinfer.")}
    return found


def roots_imported(path: Path) -> set[str]:
    """The packages that a module imports when it is loaded itself."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    here = room(path)
    if here in TOP:
        return
    assert here in MAY_IMPORT, f"{here} is a new room: say in this file what it may import"
    assert rooms_imported(path) <= MAY_IMPORT[here] | {here}


@pytest.mark.parametrize("name", ["frames.py", "protocol.py"])
def test_the_protocol_does_no_io(name: str) -> None:
    assert not roots_imported(PACKAGE / "transport" / name) & {"asyncio", "socket", "ssl", "torch", "uvloop"}


def test_transport_does_not_need_torch() -> None:
    check = "import sys, splitinfer.transport; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_importing_splitinfer_is_light() -> None:
    """Counted in modules, as seconds depend on what else the machine does."""
    check = (
        "import sys; before = len(sys.modules); import splitinfer; "
        "sys.exit(1 if {'torch', 'numpy'} & set(sys.modules) else 2 if len(sys.modules) - before > 60 else 0)"
    )
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0


def test_no_pickle_anywhere() -> None:
    for path in MODULES:
        assert not roots_imported(path) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path
