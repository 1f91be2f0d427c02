"""Makes the built-in demo model: vocabulary, target, drafter, checkpoints, measurements, model card."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer

from training.card import write_card, write_checksums
from training.corpus import Corpus, read_corpus
from training.data import WindowStream, encode_documents, mixed_batch
from training.drafter import Assistant, DrafterRecipe, train_drafter
from training.export import export_drafter, export_target
from training.figures import compression, draft_table, round_weights
from training.network import Decoder
from training.target import TargetRecipe, train_target
from training.vocabulary import train_vocabulary

__all__ = ["main"]

_DRAFTER_PART = 0.28  # of the target's minutes
_DEPTHS = (2, 3, 4, 5, 6, 7, 8)


def main(
    minutes: Annotated[
        float, typer.Option(help="Minutes for the target; the drafter takes a quarter more.")
    ] = 70.0,
    work: Annotated[Path, typer.Option(help="Where the state is kept; run again to go on.")] = Path(
        "build/demo"
    ),
    output: Annotated[
        Path, typer.Option(help="Where target/, drafter/ and the model card are written.")
    ] = Path("build/demo/model"),
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = "",
) -> None:
    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    work.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus()
    target_recipe = replace(TargetRecipe(), minutes=minutes)
    drafter_recipe = replace(DrafterRecipe(), minutes=minutes * _DRAFTER_PART)
    tokenizer = train_vocabulary(
        (document.text for document in corpus.modules), target_recipe.architecture.vocab_size
    )
    console.print(
        f"training on {device}, {torch.get_num_threads()} threads, process {os.getpid()}", highlight=False
    )

    target, target_counters = train_target(target_recipe, corpus, tokenizer, work / "target", device, console)
    export_target(target, tokenizer, output / "target")
    round_weights(target)  # from here on the model is what its users get
    streams = _drafter_streams(drafter_recipe, corpus, tokenizer)

    def batch_of(step: int) -> np.ndarray:
        return mixed_batch(streams, step, drafter_recipe.length - 1).numpy()

    assistant, drafter_counters = train_drafter(
        drafter_recipe, target, batch_of, work / "drafter", device, console
    )
    export_drafter(assistant, drafter_recipe.intermediate_size, output / "drafter")
    round_weights(assistant)

    figures = _measure(target.cpu(), assistant.cpu(), corpus, tokenizer, target_recipe, console)
    figures |= {
        "target": asdict(target_recipe),
        "drafter": asdict(drafter_recipe),
        "target_run": target_counters,
        "drafter_run": drafter_counters,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device,
    }
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    write_card(output, figures)
    write_checksums(output)
    console.print(
        f"{figures['compression']['bits_per_byte']:.3f} bits per byte held out; written to {output}"
    )


def _drafter_streams(
    recipe: DrafterRecipe, corpus: Corpus, tokenizer: Tokenizer
) -> list[tuple[WindowStream, int]]:
    modules = WindowStream(encode_documents(tokenizer, corpus.modules), recipe.seed)
    return [(modules, recipe.rows)]


def _measure(
    target: Decoder,
    assistant: Assistant,
    corpus: Corpus,
    tokenizer: Tokenizer,
    recipe: TargetRecipe,
    console: Console,
) -> dict[str, Any]:
    console.print("measuring on held-out files ...")
    encoded = encode_documents(tokenizer, corpus.held_out)
    return {
        "compression": compression(target, corpus.held_out, encoded, recipe.length),
        "drafts": [
            row._asdict() for row in draft_table(target, assistant, encoded, prompts=8, depths=_DEPTHS)
        ],
    }


if __name__ == "__main__":
    typer.run(main)
