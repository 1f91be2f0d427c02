"""What each weight format costs in quality: loss on text that the model was not trained on.

    python bench/quality.py                              the demo model, on its held-out files
    python bench/quality.py path/to/gemma --text a.txt b.txt

Every part is converted alone and all together, then the keys and values; everything is computed in float32,
so that nothing else is rounded. Loss is in bits per byte of text, beside it the perplexity per token and the
share of positions whose likeliest token stays that of the stored weights. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.quantize import QUANT_PARTS, QuantConfig
from splitinfer.model.tokenizer import Tokenizer
from splitinfer.model.weights import Checkpoint

CHUNK = 512  # tokens of one forward pass
KV_CACHE = "--kv-cache int8"


def held_out_text(count: int) -> list[str]:
    """The first `count` files that the demo model's training left out."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from training.corpus import read_corpus

    return [document.text for document in read_corpus().held_out[:count]]


def configurations() -> dict[str, QuantConfig]:
    """What is compared, by name."""
    found = {"as stored": QuantConfig()}
    for format in ("bfloat16", "int8", "int4"):
        for part in QUANT_PARTS:
            if part != "embeddings":  # they follow lm_head, with which they share a tensor
                chosen = replace(QuantConfig(), **{part: format})
                found[f"{part} {format}"] = replace(chosen, embeddings=chosen.lm_head)
        found[f"--quant {format}"] = QuantConfig.of(format)
        found[f"all {format}"] = QuantConfig(*[format] * len(QUANT_PARTS))
    return found


async def score(model: Gemma, texts: list[list[int]], *, int8_cache: bool) -> tuple[float, Tensor]:
    """Sum of the tokens' negative log2 probabilities, and the likeliest token at every position."""
    bits, best = 0.0, []
    for ids in texts:
        cache, tokens = model.new_cache(int8=int8_cache), torch.tensor(ids)
        for at in range(0, len(ids) - 1, CHUNK):
            step = tokens[at : min(at + CHUNK, len(ids) - 1)]
            logits = model.logits(await model.forward([Segment(step, cache)]))
            follow = tokens[at + 1 : at + 1 + len(step)]
            bits += float(torch.nn.functional.cross_entropy(logits, follow, reduction="sum")) / math.log(2)
            best.append(logits.argmax(-1))
    return bits, torch.cat(best)


def load(checkpoint: Checkpoint, quant: QuantConfig) -> Gemma:
    config = checkpoint.config
    everything = dict.fromkeys(range(config.num_hidden_layers), range(config.num_experts))
    bank = ExpertBank(checkpoint, everything, format=quant.experts)
    return Gemma.load(checkpoint, LocalExperts(bank), dtype=torch.float32, quant=quant)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo model")
    parser.add_argument("--text", type=Path, nargs="+", help="default: files held out of the demo's training")
    parser.add_argument("--files", type=int, default=6, help="how many held-out files")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    arguments = parser.parse_args()
    if arguments.model is None:
        from splitinfer import demo

        arguments.model = Path(demo.path())
    texts = [file.read_text() for file in arguments.text or ()] or held_out_text(arguments.files)
    checkpoint, tokenizer = Checkpoint.open(arguments.model), Tokenizer.open(arguments.model)
    if tokenizer is None:
        sys.exit(f"{arguments.model} has no tokenizer")
    ids = [tokenizer.encode(text)[: arguments.tokens] for text in texts]
    nbytes = sum(len(tokenizer.decode(tokens).encode()) for tokens in ids)
    count = sum(len(tokens) - 1 for tokens in ids)
    table = Table("weights", "bits per byte", "more", "perplexity", "same likeliest token")
    table.title = f"{arguments.model.name}: {count} tokens, {nbytes} bytes"
    records: list[dict[str, object]] = []
    reference, first = torch.empty(0), 0.0
    for name, quant in (configurations() | {KV_CACHE: QuantConfig()}).items():
        bits, best = asyncio.run(score(load(checkpoint, quant), ids, int8_cache=name == KV_CACHE))
        if not records:
            reference, first = best, bits
        same = float((best == reference).float().mean())
        records.append({"weights": name, "bits_per_byte": bits / nbytes, "same": same})
        table.add_row(
            name,
            f"{bits / nbytes:.4f}",
            f"{bits / first - 1:+.2%}",
            f"{2 ** (bits / count):.3f}",
            f"{same:.1%}",
        )
    Console(stderr=True).print(table)
    json.dump({"model": str(arguments.model), "tokens": count, "records": records}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
