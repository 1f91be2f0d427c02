"""The built-in demo model: where its two checkpoints lie. Data, recipe and figures are in README.md beside
them.
"""

from __future__ import annotations

from pathlib import Path

from splitinfer.errors import CheckpointError

__all__ = ["drafter_path", "path"]

_HERE = Path(__file__).parent


def path() -> Path:
    """The target's checkpoint: a directory in the Hugging Face layout, tokenizer included.

    Raises CheckpointError where the installation came without its weights."""
    return _checkpoint("target")


def drafter_path() -> Path:
    """The `gemma4_assistant` checkpoint that drafts for the target. Raises as `path` does."""
    return _checkpoint("drafter")


def _checkpoint(name: str) -> Path:
    folder = _HERE / name
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"the built-in demo model is not installed: {folder} holds no model.safetensors",
            path=str(folder),
            remedy="Install splitinfer again, or train the model: bin/train-demo --output splitinfer/demo.",
        )
    return folder
