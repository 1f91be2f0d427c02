"""Training state on disk: parameters and optimizer state as safetensors, counters as JSON. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["load_state", "save_state"]


def save_state(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], counters: dict[str, float]
) -> None:
    """Write the state beside the old one, then put it in its place: an interrupt leaves a whole state."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model|{name}": tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}|{name}"] = value.detach().contiguous()
    partial = folder / "state.partial"
    save_file(tensors, partial, metadata={"counters": json.dumps(counters)})
    os.replace(partial, folder / "state.safetensors")


def load_state(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, float] | None:
    """Restore what `save_state` wrote; None when there is nothing to resume."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    tensors = load_file(path)
    prefix = "model|"
    model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        found: dict[str, Tensor] = {
            key.removesuffix(f"|{name}"): tensor
            for key, tensor in tensors.items()
            if key.endswith(f"|{name}") and not key.startswith(prefix)
        }
        owner = owners.get(id(parameter))
        if found and owner is not None:
            # AdamW's step count stays a CPU tensor, everything else lives with its parameter.
            owner.state[parameter] = {
                key: tensor if key == "step" else tensor.to(parameter.device) for key, tensor in found.items()
            }
    return _counters(path)


def _counters(path: Path) -> dict[str, float]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    counters: dict[str, float] = json.loads(header["__metadata__"]["counters"])
    return counters
