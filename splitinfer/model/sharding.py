"""Making shards: a plan of files with their exact sizes, then file after file, streaming and resumable.

A file is written under another name at known offsets, matrix by matrix in pieces, so memory stays small
whatever the model's size; it takes its own name when it is whole and on disk. The unfinished manifest lists
what is done, with checksums, and a second run goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from splitinfer.errors import CapacityError, UsageError
from splitinfer.model.quantize import Packed, QuantConfig, packed_shapes
from splitinfer.model.shard import MANIFEST, FileRecord, Manifest, checksum
from splitinfer.model.slicing import sliced_shape
from splitinfer.model.weights import Checkpoint, expected_tensors

__all__ = ["Plan", "PlannedFile", "plan_shard", "write_shard"]

UNFINISHED = MANIFEST + ".unfinished"
ALIGNMENT = 64  # bytes; tensors start at such offsets of the file
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.int32: "I32",
}
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class _Stored:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file to be: its header and where each tensor begins. `sources` are the model's tensors in it."""

    name: str
    sources: tuple[str, ...]
    tensors: tuple[_Stored, ...]

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The first bytes of the file, and every tensor's offset in it."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for tensor in self.tensors:
            end = begin + tensor.nbytes
            table[tensor.name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(table).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        offsets, place = {}, 8 + len(text)
        for tensor in self.tensors:
            offsets[tensor.name] = place
            place += tensor.nbytes
        return len(text).to_bytes(8, "little") + text, offsets

    @property
    def nbytes(self) -> int:
        return len(self.header()[0]) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """A shard to be. `small` are the model's small files, copied with it."""

    checkpoint: Checkpoint
    manifest: Manifest
    files: tuple[PlannedFile, ...]
    small: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files) + sum(map(len, self.small.values()))


def plan_shard(
    checkpoint: Checkpoint,
    *,
    experts: Sequence[int] = (),
    layers: Sequence[int] | None = None,
    client: bool = False,
    quant: QuantConfig | None = None,
    columns: tuple[int, int] | None = None,
) -> Plan:
    """What a shard of `experts` of `layers` (None: all) and, if `client`, of everything else would be.
    `columns` is the part held of every expert's intermediate dimension (None: all).

    Touches no weights. Raises UsageError for a shard of nothing, and for tied embeddings in two formats.
    """
    config, quant = checkpoint.config, quant or QuantConfig()
    experts = experts if config.enable_moe_block else ()
    layers = range(config.num_hidden_layers) if layers is None else layers
    if not experts and not client:
        raise UsageError("a shard of nothing", remedy="Give --experts, or --client for everything else.")
    if config.tie_word_embeddings:
        if client and quant.embeddings not in (None, quant.lm_head):
            raise UsageError(
                f"embeddings in {quant.embeddings}, lm_head in {quant.lm_head or 'its own format'}: "
                "in this model they are one tensor",
                remedy="Give both the same format.",
            )
        quant = replace(quant, embeddings=quant.lm_head)
    held = tuple(sorted(set(experts)))
    manifest = Manifest(
        fingerprint=checkpoint.fingerprint,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        layers=tuple(sorted(set(layers))),
        experts=held,
        client=client,
        quant=quant,
        files={},
        columns=columns if held else None,
    )
    groups: dict[str, list[str]] = {}
    for name, _ in expected_tensors(config):
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if name.endswith(EXPERTS):
            if held and layer in manifest.layers:
                groups.setdefault(f"experts-{layer:05d}.safetensors", []).append(name)
        elif client:
            file = "embeddings" if layer is None else f"client-{layer:05d}"
            groups.setdefault(f"{file}.safetensors", []).append(name)
    files = tuple(_planned(checkpoint, manifest, file, names) for file, names in groups.items())
    return Plan(checkpoint, manifest, files, checkpoint.small_files())


def _planned(checkpoint: Checkpoint, manifest: Manifest, file: str, names: Sequence[str]) -> PlannedFile:
    shapes = dict(expected_tensors(checkpoint.config))
    tensors = []
    for name in names:
        shape = shapes[name]
        format = format_for(name, manifest.quant)
        if not is_matrix(name, shape):
            tensors.append(_Stored(name, checkpoint.tensor(name).dtype, shape))
            continue
        group, format = checkpoint.stored_as(name, format)
        lead = (len(manifest.experts),) if name.endswith(EXPERTS) else ()
        if manifest.columns is not None and name.endswith("experts.down_proj"):
            group = min(group, manifest.columns[1] - manifest.columns[0])  # by channel: as many as there are
        if manifest.columns is not None:
            shape = sliced_shape(name, shape, manifest.columns[1] - manifest.columns[0])
        for part, (dtype, packed) in packed_shapes(format, shape[-2], shape[-1], group).items():
            suffix = "" if part == "weight" else ".scales"
            tensors.append(_Stored(name + suffix, dtype, (*lead, *packed)))
    # Wide items first: every tensor then starts where its dtype may.
    tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
    return PlannedFile(file, tuple(names), tuple(tensors))


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is multiplied with rows, and so has a format. The router stays as it is."""
    return len(shape) > 1 and not name.endswith("router.proj.weight")


def format_for(name: str, quant: QuantConfig) -> str | None:
    """The part's format, by the name of one of its matrices."""
    if name.endswith(EXPERTS):
        return quant.experts
    if ".self_attn." in name:
        return quant.attention
    if ".mlp." in name:
        return quant.dense
    return quant.embeddings if name == "embed_tokens.weight" else quant.lm_head


def write_shard(
    plan: Plan, directory: Path, *, progress: Callable[[str, int], None] = lambda name, nbytes: None
) -> Manifest:
    """Writes the shard into `directory` and returns its manifest; files that an earlier run finished stay.

    `progress` is told, file by file, what was written. Raises UsageError where the directory holds another
    shard or cannot be made, CapacityError where the disk is too small or fails.
    """
    existed = directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be made: {(error.strerror or str(error)).lower()}",
            remedy="Name another directory with -o.",
        ) from None
    done = _earlier(plan.manifest, directory)
    missing = sum(file.nbytes for file in plan.files if file.name not in done)
    free = os.statvfs(directory)
    if missing > free.f_bavail * free.f_frsize:
        if not existed:
            directory.rmdir()
        raise CapacityError(
            f"{directory} has {free.f_bavail * free.f_frsize} bytes free, the shard needs {missing}",
            remedy="Free some space, or name another directory with -o.",
        )
    try:
        return _write_all(plan, directory, done, progress)
    except OSError as error:
        raise CapacityError(
            f"{error.filename or directory} cannot be written: {(error.strerror or str(error)).lower()}",
            remedy="Make room or mend that, and run it again: what is finished stays.",
        ) from error


def _write_all(
    plan: Plan, directory: Path, done: dict[str, FileRecord], progress: Callable[[str, int], None]
) -> Manifest:
    for name, contents in plan.small.items():
        (directory / name).write_bytes(contents)
        done[name] = FileRecord(len(contents), checksum(directory / name))
    for file in plan.files:
        if file.name not in done:
            _write_file(plan, file, directory / file.name)
            done[file.name] = FileRecord(file.nbytes, checksum(directory / file.name))
            _save(replace(plan.manifest, files=done), directory / UNFINISHED)
        progress(file.name, file.nbytes)
    manifest = replace(plan.manifest, files=done)
    _save(manifest, directory / MANIFEST)
    (directory / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _earlier(wanted: Manifest, directory: Path) -> dict[str, FileRecord]:
    """What an earlier run of the same plan has finished."""
    for name in (MANIFEST, UNFINISHED):
        if (directory / name).is_file():
            found = Manifest.read(directory / name)
            if replace(found, files={}) != wanted:
                raise UsageError(
                    f"{directory} holds another shard", remedy="Name another directory, or remove that one."
                )
            files = found.files.items()
            return {
                name: record
                for name, record in files
                if (directory / name).is_file() and (directory / name).stat().st_size == record.nbytes
            }
    return {}


def _save(manifest: Manifest, file: Path) -> None:
    beside = file.with_name(file.name + ".new")
    beside.write_text(manifest.to_json(), encoding="utf-8")
    beside.replace(file)


def _write_file(plan: Plan, file: PlannedFile, path: Path) -> None:
    header, offsets = file.header()
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.truncate(file.nbytes)
        os.pwrite(stream.fileno(), header, 0)
        for name, tensor in _contents(plan, file):
            offsets[name] += _put(stream.fileno(), tensor, offsets[name])
        os.fsync(stream.fileno())
    part.replace(path)


def _put(fd: int, tensor: Tensor, offset: int) -> int:
    """Writes a tensor's bytes; returns how many."""
    view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], offset + written)
    return written


def _contents(plan: Plan, file: PlannedFile) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors, in pieces that follow each other within each tensor."""
    checkpoint, manifest = plan.checkpoint, plan.manifest
    shapes = dict(expected_tensors(checkpoint.config))
    if file.name.startswith("experts-"):
        layer = int(file.sources[0].split(".")[1])
        for expert in manifest.experts:
            for pair in checkpoint.experts(
                layer, expert, expert + 1, manifest.quant.experts, columns=manifest.columns
            ):
                for name, packed in zip(file.sources, pair, strict=True):
                    yield from _pieces(name, packed)
        return
    for name in file.sources:
        if is_matrix(name, shapes[name]):
            for packed in checkpoint.matrix_pieces(name, format_for(name, manifest.quant)):
                yield from _pieces(name, packed)
        else:
            yield name, checkpoint.tensor(name)


def _pieces(name: str, packed: Packed) -> Iterator[tuple[str, Tensor]]:
    yield name, packed.weight
    if packed.scales is not None:
        yield name + ".scales", packed.scales
