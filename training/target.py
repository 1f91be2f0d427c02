"""Training of the target: a recipe in one dataclass, and the function that follows it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import Corpus
from training.data import WindowStream, encode_documents, mixed_batch
from training.evaluate import measure
from training.loop import Budget, train
from training.muon import make_optimizers
from training.network import Architecture, Decoder, LayerState

__all__ = ["TargetRecipe", "train_target"]


@dataclass(frozen=True)
class TargetRecipe:
    architecture: Architecture = field(default_factory=Architecture)
    seed: int = 1
    length: int = 512
    module_rows: int = 4
    test_rows: int = 4
    late_module_rows: int = 6  # the mixture leans to what is measured once the rate decays
    late: float = 0.3
    matrix_lr: float = 0.03
    embedding_lr: float = 0.005
    vector_lr: float = 0.002
    weight_decay: float = 0.02
    balance: float = 0.02
    warmup: int = 100
    stable: float = 0.3
    tokens: int = 30_000_000
    minutes: float = 70.0


def train_target(
    recipe: TargetRecipe, corpus: Corpus, tokenizer: Tokenizer, folder: Path, device: str, console: Console
) -> tuple[Decoder, dict[str, float]]:
    """Train, or resume from `folder`; returns the model in float32 and the loop's counters."""
    model = Decoder(recipe.architecture)
    model.initialise(torch.Generator().manual_seed(recipe.seed))
    model.to(device)
    optimizers = make_optimizers(
        model,
        matrix_lr=recipe.matrix_lr,
        embedding_lr=recipe.embedding_lr,
        vector_lr=recipe.vector_lr,
        weight_decay=recipe.weight_decay,
    )
    modules = WindowStream(encode_documents(tokenizer, corpus.modules), recipe.seed)
    tests = WindowStream(encode_documents(tokenizer, corpus.tests), recipe.seed + 1)
    held_out = corpus.held_out[::4]
    held_out_ids = encode_documents(tokenizer, held_out)
    console.print(f"{modules.tokens:,} tokens of modules, {tests.tokens:,} of tests", highlight=False)
    forward = _Forward(model, console)
    rows = recipe.module_rows + recipe.test_rows

    def loss_of(step: int, progress: float) -> tuple[Tensor, int]:
        from_modules = recipe.module_rows if progress < recipe.late else recipe.late_module_rows
        batch = mixed_batch([(modules, from_modules), (tests, rows - from_modules)], step, recipe.length).to(
            device
        )
        loss, states = forward(batch)
        balance = torch.stack([state.balance for state in states]).sum()
        return loss + recipe.balance * balance, rows * recipe.length

    def report() -> str:
        found = measure(model, held_out, held_out_ids, recipe.length)
        return (
            f"held-out sample {found.bits_per_byte:.3f} bits/byte, least used expert {found.shares.min():.2f}"
        )

    counters = train(
        model,
        optimizers,
        loss_of,
        name="target",
        budget=Budget(recipe.tokens, recipe.minutes),
        folder=folder,
        warmup=recipe.warmup,
        stable=recipe.stable,
        report=report,
        console=console,
    )
    return model, counters


class _Forward:
    """Loss and layer states of one batch, with the layers and the head compiled where a compiler is at
    hand.
    """

    def __init__(self, model: Decoder, console: Console) -> None:
        self.model = model
        self.layers: list[Any] = list(model.layers)
        self.head: Callable[[Tensor, Tensor], Tensor] = self._head
        if shutil.which("g++") or shutil.which("clang++"):
            self.layers = [torch.compile(layer, dynamic=False) for layer in model.layers]
            self.head = torch.compile(self._head, dynamic=False)
        else:
            console.print("no C++ compiler found: training without torch.compile, about a quarter slower")

    def _head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model.logits(hidden).flatten(0, 1), targets.flatten())

    def __call__(self, batch: Tensor) -> tuple[Tensor, list[LayerState]]:
        hidden, states = self.model(batch[:, :-1], self.layers)
        return self.head(hidden, batch[:, 1:]), states
