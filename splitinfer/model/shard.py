"""Shards: a part of a model on disk, in the layout that the kernels read, with a manifest and checksums.

A shard is a directory. `splitinfer-shard.json` says what it holds of which model, in which formats, and each
file's size and checksum; beside it stand one safetensors file per layer for the experts, one for the client's
half, one for the embeddings, and copies of the model's small files. It opens like a checkpoint: matrices are
mapped, never converted, so two processes on one machine share their pages. `splitinfer.model.sharding` makes
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from splitinfer.errors import CheckpointError, UsageError
from splitinfer.model.config import load_config, read_json
from splitinfer.model.mapped import MappedFile
from splitinfer.model.quantize import GROUP, Packed, QuantConfig
from splitinfer.model.slicing import sliced, sliced_shape
from splitinfer.model.weights import SHARD, Checkpoint, expected_tensors

__all__ = ["MANIFEST", "VERSION", "FileRecord", "Manifest", "ShardCheckpoint", "checksum", "verify"]

MANIFEST = SHARD
VERSION = 1  # of the manifest and the files' layout
MAKE_AGAIN = "Make the shard again with `splitinfer shard`, or copy it again."
CHECKSUM_NBYTES = 8 << 20  # read at a time


@dataclass(frozen=True)
class FileRecord:
    """One file of a shard: its size in bytes, and BLAKE2b-256 of its contents."""

    nbytes: int
    blake2b: str


@dataclass(frozen=True)
class Manifest:
    """What a shard holds. `experts` and `layers` are ids; `client` is everything but experts; `columns` is
    the slice of every expert's intermediate dimension, from its first to before its last (None: all)."""

    fingerprint: str
    dtype: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    client: bool
    quant: QuantConfig
    files: dict[str, FileRecord]
    columns: tuple[int, int] | None = None

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Raises CheckpointError for a manifest that is damaged or of another version."""
        table = read_json(file)
        if table.pop("version", None) != VERSION:
            raise CheckpointError(
                f"{file} is of another version of splitinfer", path=str(file), remedy=MAKE_AGAIN
            )
        try:
            files = {name: FileRecord(**record) for name, record in table.pop("files").items()}
            quant = QuantConfig(**table.pop("quant"))
            layers, experts = tuple(table.pop("layers")), tuple(table.pop("experts"))
            columns = tuple(table.pop("columns", None) or ())
            manifest = cls(
                layers=layers, experts=experts, quant=quant, files=files, columns=columns or None, **table
            )
        except (AttributeError, KeyError, TypeError):
            raise CheckpointError(
                f"{file} is not a shard's manifest", path=str(file), remedy=MAKE_AGAIN
            ) from None
        if any(name != Path(name).name for name in files):
            raise CheckpointError(f"{file} names files elsewhere", path=str(file), remedy=MAKE_AGAIN)
        plain = (str, str, bool), (manifest.fingerprint, manifest.dtype, manifest.client)
        numbers = (*layers, *experts, *columns, *(record.nbytes for record in files.values()))
        wrong = [type(value) for value in plain[1]] != list(plain[0]) or {type(n) for n in numbers} - {int}
        if wrong or (columns and not (len(columns) == 2 and 0 <= columns[0] < columns[1])):
            raise CheckpointError(f"{file} is not a shard's manifest", path=str(file), remedy=MAKE_AGAIN)
        return manifest


class ShardCheckpoint(Checkpoint):
    """A shard, with a checkpoint's methods. It refuses what it does not hold, or holds in another format."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(directory, load_config(directory), {})
        self.manifest = manifest
        for name, record in manifest.files.items():
            _check_size(directory / name, record)
        for name in manifest.files:
            if name.endswith(".safetensors"):
                file = MappedFile(directory / name)
                self._located.update((stored, (file, stored)) for stored in file.entries)
        self._shapes = dict(expected_tensors(self.config))
        if manifest.columns is not None:
            width = manifest.columns[1] - manifest.columns[0]
            for name, shape in self._shapes.items():
                self._shapes[name] = sliced_shape(name, shape, width)

    @classmethod
    def open(cls, path: str | Path) -> ShardCheckpoint:
        """Raises CheckpointError, naming the file, for a shard that is incomplete; contents are not read."""
        directory = Path(path)
        return cls(directory, Manifest.read(directory / MANIFEST))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model that the shard was made from."""
        return torch.float32 if self.manifest.dtype == "float32" else torch.bfloat16

    @property
    def fingerprint(self) -> str:
        """That of the model that the shard was made from."""
        return self.manifest.fingerprint

    @property
    def held_layers(self) -> tuple[int, ...]:
        return self.manifest.layers

    @property
    def held_experts(self) -> tuple[int, ...]:
        return self.manifest.experts

    @property
    def held_columns(self) -> tuple[int, int] | None:
        return self.manifest.columns

    def stored_as(self, name: str, format: str | None) -> tuple[int, str]:
        packed = self._packed(name, format, self.tensor(name), self._scales(name), *self._shapes[name][-2:])
        return packed.group, packed.format

    def matrix_pieces(self, name: str, format: str | None = None) -> Iterator[Packed]:
        yield self.matrix(name, format)
        self._release(name)

    def matrix(self, name: str, format: str | None = None, *, floating: str | None = None) -> Packed:
        out_features, in_features = self._shapes[name]
        weight = self.tensor(name)
        return self._packed(name, format, weight, self._scales(name), out_features, in_features)

    def experts(
        self,
        layer: int,
        lo: int,
        hi: int,
        format: str | None = None,
        *,
        floating: str | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Iterator[tuple[Packed, Packed]]:
        absent = [e for e in range(lo, hi) if e not in self.manifest.experts]
        if layer not in self.manifest.layers or absent:
            raise UsageError(
                f"{self.path} does not hold experts {lo}-{hi - 1} of layer {layer}",
                remedy="Name what it holds, or make a shard of these.",
            )
        held = self.manifest.columns
        if held is not None and columns != held:
            raise UsageError(
                f"{self.path} holds columns {held[0]}-{held[1] - 1} of every expert, and no others",
                remedy="Serve it as it is: splitinfer node without --slice.",
            )
        first = self.manifest.experts.index(lo)
        places = range(first, first + hi - lo)
        parts = [
            self._stack(f"layers.{layer}.experts.{name}", format) for name in ("gate_up_proj", "down_proj")
        ]
        for place in places:
            pair = parts[0][place], parts[1][place]
            yield pair if columns is None or columns == held else sliced(*pair, columns)

    def _stack(self, name: str, format: str | None) -> list[Packed]:
        """All experts of one tensor, views."""
        _, out_features, in_features = self._shapes[name]
        weights, scales = self.tensor(name), self._scales(name)
        return [
            self._packed(name, format, w, None if scales is None else scales[i], out_features, in_features)
            for i, w in enumerate(weights)
        ]

    def _find(self, name: str) -> tuple[MappedFile, str]:
        if name not in self._located:
            raise CheckpointError(
                f"{self.path} is a shard without {name}",
                path=str(self.path),
                remedy="A client needs a shard made with --client, a node one made with --experts.",
            )
        return super()._find(name)

    def _scales(self, name: str) -> torch.Tensor | None:
        stored = name + ".scales"
        return self.tensor(stored) if stored in self._located else None

    def _packed(
        self,
        name: str,
        format: str | None,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        out_features: int,
        in_features: int,
    ) -> Packed:
        stored = {
            torch.float32: "float32",
            torch.bfloat16: "bfloat16",
            torch.int8: "int8",
            torch.int32: "int4",
        }[weight.dtype]
        if format not in (None, stored):
            raise UsageError(
                f"{self.path} holds {name} in {stored}, not in {format}",
                remedy="Leave the format out, or make another shard from the model.",
            )
        group = 0
        if scales is not None:
            centred = GROUP if scales.shape[-2] == 1 else 0
            group = centred if stored == "int4" else in_features // scales.shape[-1]
        return Packed(stored, out_features, in_features, group, weight, scales)

    def small_files(self) -> dict[str, bytes]:
        return {
            name: (self.path / name).read_bytes()
            for name in self.manifest.files
            if not name.endswith(".safetensors")
        }


def checksum(file: Path) -> str:
    """BLAKE2b-256 of a file's contents, in hex."""
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(CHECKSUM_NBYTES):
            digest.update(piece)
    return digest.hexdigest()


def verify(path: str | Path) -> Iterator[tuple[str, FileRecord]]:
    """Reads every file of a shard; yields each that is as it was written.

    Raises CheckpointError, naming the file, for the first that is missing, of another size or damaged.
    """
    directory = Path(path)
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(
            f"{directory} is not a shard: it has no {MANIFEST}",
            path=str(directory),
            remedy="Name a directory made by `splitinfer shard`.",
        )
    for name, record in Manifest.read(directory / MANIFEST).files.items():
        _check_size(directory / name, record)
        if checksum(directory / name) != record.blake2b:
            raise CheckpointError(
                f"{directory / name} is damaged: its checksum is not the one in {MANIFEST}",
                path=str(directory / name),
                remedy=MAKE_AGAIN,
            )
        yield name, record


def _check_size(file: Path, record: FileRecord) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing from the shard", path=str(file), remedy=MAKE_AGAIN)
    found: Any = file.stat().st_size
    if found != record.nbytes:
        raise CheckpointError(
            f"{file} has {found} bytes, its manifest says {record.nbytes}", path=str(file), remedy=MAKE_AGAIN
        )
