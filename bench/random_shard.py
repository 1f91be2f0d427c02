"""Shards with the true shapes of Gemma 4 26B-A4B and random weights, drawn as they lie on disk.

    python bench/random_shard.py DIR                                 6 layers, the whole model, int4
    python bench/random_shard.py DIR --layers 30 --experts 0-63      half of the experts: 7.1 GB
    python bench/random_shard.py DIR --layers 30 --client            everything else: 2.4 GB

The formats are those of `splitinfer shard --quant int4`. Shards of one number of layers are of one model: a
client and its nodes accept each other. Memory while writing stays below a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

from random_model import RandomCheckpoint

from splitinfer.model.quantize import Packed, QuantConfig
from splitinfer.model.shard import Manifest
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.placement import parse_ranges

__all__ = ["write"]


class RandomSource(RandomCheckpoint):
    """What a shard is made of: every weight drawn when it is asked for, and not kept."""

    def __init__(self, layers: int, experts: int = 128, vocab: int = 262_144) -> None:
        super().__init__(layers, experts, vocab, distinct=layers)
        self.fingerprint = f"random-{layers}-{experts}-{vocab}"
        self.held_layers = tuple(range(layers))

    def draw(self, key: object, format: str, out_features: int, in_features: int) -> Packed:
        return self._draw(format, out_features, in_features)

    def stored_as(self, name: str, format: str | None) -> tuple[int, str]:
        return 0, format or "bfloat16"

    def matrix_pieces(self, name: str, format: str | None = None) -> Iterator[Packed]:
        yield self.matrix(name, format)

    def small_files(self) -> dict[str, bytes]:
        return {"config.json": json.dumps(self.table, indent=1).encode()}


def write(
    path: Path, layers: int, *, experts: str | None = None, client: bool = False, quant: str | None = "int4"
) -> Manifest:
    """Writes a shard of `experts`, or of everything else, or, of neither, the whole model."""
    source = RandomSource(layers)
    whole = experts is None and not client
    held = parse_ranges("0-127" if whole else experts or "", 128, "--experts") if whole or experts else ()
    plan = plan_shard(source, experts=held, client=client or whole, quant=QuantConfig.of(quant))  # type: ignore[arg-type]
    return write_shard(plan, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", metavar="RANGES")
    parser.add_argument("--client", action="store_true")
    parser.add_argument("--quant", default="int4")
    arguments = parser.parse_args()
    manifest = write(
        arguments.path,
        arguments.layers,
        experts=arguments.experts,
        client=arguments.client,
        quant=arguments.quant,
    )
    nbytes = math.fsum(record.nbytes for record in manifest.files.values())
    print(f"{arguments.path}: {len(manifest.files)} files, {nbytes / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
