"""A model by path or by Hugging Face id: what is on this machine first, the network only for an id."""

from __future__ import annotations

import re
from pathlib import Path

from splitinfer.errors import CheckpointError, UsageError

__all__ = ["check_model", "resolve_model"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights as safetensors, settings, tokenizer: nothing that could hold code or a pickle.
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")
FILES = ("*.safetensors", *SMALL_FILES)


def check_model(model: object) -> None:
    """Raises UsageError for what cannot name a model."""
    if not isinstance(model, str | Path) or not str(model).strip():
        raise UsageError(
            f"model is {model!r}, neither a path nor a hub id",
            remedy="Name a model directory, a GGUF file or a Hugging Face id; splitinfer.demo has the "
            "path() of the built-in one.",
        )


def resolve_model(model: str | Path, *, weights: bool = True) -> Path:
    """The directory of `model`: the path itself, or a download of the hub id `owner/name`, with its weights
    or without.

    Raises CheckpointError for what is neither on this machine nor reachable.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not isinstance(model, str) or not HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model} does not exist",
            path=str(model),
            remedy="Name a model directory, a GGUF file, or a Hugging Face id such as owner/name.",
        )
    # Imported here: it takes half a second, and most starts never need the hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(FILES if weights else SMALL_FILES)))
    except (RepositoryNotFoundError, HFValidationError):
        what, remedy = "there is no such model, or it needs a login", "Check the id, or run `hf auth login`."
    except (LocalEntryNotFoundError, OSError) as error:
        what = f"the hub cannot be reached ({type(error).__name__})"
        remedy = "Copy the model's directory to this machine and name its path."
    raise CheckpointError(f"{model}: no such directory here, and {what}", path=model, remedy=remedy)
