"""A checkpoint directory: every tensor name mapped in one place, every shape checked before the first use.

Tensors are known here by their names below the text model ("layers.3.self_attn.q_proj.weight"), whatever
prefix the files use; tensors of vision and audio towers are left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path

import torch

from splitinfer.errors import CheckpointError, UnsupportedModelError, UsageError
from splitinfer.model.config import ModelConfig, load_config, read_json
from splitinfer.model.mapped import DTYPES, MappedFile, TensorEntry
from splitinfer.model.quantize import GROUP, Packed, natural_format, piece_rows, quantize

__all__ = ["Checkpoint", "arithmetic", "canonical_name", "expected_tensors", "has_weights"]

PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.", "multi_modal_projector.")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = "splitinfer-shard.json"  # the manifest that makes a directory a shard (splitinfer.model.shard)
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)

FINGERPRINT_VERSION = b"splitinfer-1"
SAMPLE_NBYTES = 64  # one cache line at each place
SAMPLES = 4  # places per tensor: a fine-tune moves nearly every weight, so few are enough
# Parts of ModelConfig that say how the file was written, not what it computes.
NOT_ARITHMETIC = ("model_type", "dtype", "bos_token_id", "eos_token_ids")


def canonical_name(name: str) -> str | None:
    """The name below the text model, or None for a tensor of another tower or a table computed here."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    return None if name.startswith((*TOWERS, "rotary_emb.")) else name


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor the model has, in the order of the forward pass."""
    hidden, inter = config.hidden_size, config.intermediate_size
    yield "embed_tokens.weight", (config.vocab_size, hidden)
    for i, attention in enumerate(config.attention):
        layer = f"layers.{i}."
        q_size = config.num_attention_heads * attention.head_dim
        kv_size = attention.num_key_value_heads * attention.head_dim
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "self_attn.q_proj.weight", (q_size, hidden)
        yield layer + "self_attn.k_proj.weight", (kv_size, hidden)
        if not attention.k_eq_v:
            yield layer + "self_attn.v_proj.weight", (kv_size, hidden)
        yield layer + "self_attn.q_norm.weight", (attention.head_dim,)
        yield layer + "self_attn.k_norm.weight", (attention.head_dim,)
        yield layer + "self_attn.o_proj.weight", (hidden, q_size)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        yield layer + "pre_feedforward_layernorm.weight", (hidden,)
        yield layer + "mlp.gate_proj.weight", (inter, hidden)
        yield layer + "mlp.up_proj.weight", (inter, hidden)
        yield layer + "mlp.down_proj.weight", (hidden, inter)
        if config.enable_moe_block:
            experts, moe = config.num_experts, config.moe_intermediate_size
            yield layer + "router.scale", (hidden,)
            yield layer + "router.proj.weight", (experts, hidden)
            yield layer + "router.per_expert_scale", (experts,)
            yield layer + "pre_feedforward_layernorm_2.weight", (hidden,)
            yield layer + "experts.gate_up_proj", (experts, 2 * moe, hidden)
            yield layer + "experts.down_proj", (experts, hidden, moe)
            yield layer + "post_feedforward_layernorm_1.weight", (hidden,)
            yield layer + "post_feedforward_layernorm_2.weight", (hidden,)
        yield layer + "post_feedforward_layernorm.weight", (hidden,)
        if config.layer_scalars:
            yield layer + "layer_scalar", (1,)
    yield "norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def arithmetic(config: ModelConfig) -> dict[str, object]:
    """What of a configuration enters a fingerprint. Defaults stay out: an option that a later version learns
    leaves the fingerprints of models without it as they were."""
    defaults = {field.name: field.default for field in fields(config)}
    values = asdict(config).items()
    return {name: value for name, value in values if name not in NOT_ARITHMETIC and value != defaults[name]}


class Checkpoint:
    """A checkpoint in the Hugging Face layout, validated and mapped; no weight is read by opening it."""

    def __init__(self, path: Path, config: ModelConfig, located: dict[str, tuple[MappedFile, str]]) -> None:
        self.path = path
        self.config = config
        self._located = located

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Opens `path`: a directory in the Hugging Face layout, a shard, or a GGUF file.

        Raises CheckpointError, naming file and tensor, for anything missing, cut short or of another shape
        than the configuration says; UnsupportedModelError for what is not implemented.
        """
        directory = Path(path)
        if directory.suffix == ".gguf":
            from splitinfer.model.gguf import GgufCheckpoint  # here: it builds on this module

            return GgufCheckpoint.open(directory)
        if (directory / SHARD).is_file():
            from splitinfer.model.shard import ShardCheckpoint  # here: it builds on this module

            return ShardCheckpoint.open(directory)
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise CheckpointError(
                f"{directory} {what}",
                path=str(directory),
                remedy="Name a directory in the Hugging Face layout, or a file whose name ends in .gguf.",
            )
        config = load_config(directory)
        located: dict[str, tuple[MappedFile, str]] = {}
        for stored, file in _locate(directory):
            name = canonical_name(stored)
            if name is not None:
                located[name] = (file, stored)
        _check(config, located, directory)
        return cls(directory, config, located)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in: float32 where the configuration says so, else the stored one (the
        embedding's, where they differ)."""
        if self.config.dtype == "float32":
            return torch.float32
        return DTYPES[self.entry("embed_tokens.weight").dtype]

    def entry(self, name: str) -> TensorEntry:
        """Shape, stored dtype and place of the tensor, without touching it. `name` as in `tensor`."""
        file, stored = self._find(name)
        return file.entries[stored]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor by its name below the text model, a view on the mapped file; do not write to it."""
        file, stored = self._find(name)
        return file.tensor(stored)

    def expert_slice(self, layer: int, lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts lo..hi-1 of one layer: gate_up_proj [hi-lo, 2*I, H] and down_proj [hi-lo, H, I], views.

        Raises UsageError for a layer or range that the model does not have.
        """
        if not 0 <= layer < self.config.num_hidden_layers or not 0 <= lo < hi <= self.config.num_experts:
            raise UsageError(
                f"layer {layer}, experts {lo}-{hi - 1}: the model has {self.config.num_hidden_layers} layers "
                f"of {self.config.num_experts} experts"
            )
        prefix = f"layers.{layer}.experts."
        return self.tensor(prefix + "gate_up_proj")[lo:hi], self.tensor(prefix + "down_proj")[lo:hi]

    def check_experts(self) -> None:
        """Raises UsageError where there are no experts that a node could hold."""
        if not self.config.enable_moe_block:
            raise UsageError(
                f"{self.path} is a dense model: it has no experts to hold",
                remedy="Run it on one machine, without nodes, or name a model with a mixture of experts.",
            )
        if not self.held_experts:
            raise UsageError(
                f"{self.path} is a client's shard: it has no experts to hold",
                remedy="Name the model, or a shard made with --experts.",
            )

    @property
    def held_layers(self) -> tuple[int, ...]:
        """Layers whose experts are here, at least in part: all, unless this is a shard."""
        return tuple(range(self.config.num_hidden_layers))

    @property
    def held_experts(self) -> tuple[int, ...]:
        """Experts that are here, in each of `held_layers`."""
        return tuple(range(self.config.num_experts))

    @property
    def held_columns(self) -> tuple[int, int] | None:
        """The slice of every expert's intermediate dimension that is here; None: all of it."""
        return None

    def stored_as(self, name: str, format: str | None) -> tuple[int, str]:
        """Columns per scale (0: the format's own) and format that `matrix` or `experts` would give."""
        return 0, format or natural_format(DTYPES[self.entry(name).dtype])

    def matrix(self, name: str, format: str | None = None, *, floating: str | None = None) -> Packed:
        """The tensor [out, in] in a weight format; None: as it is stored, or in the format `floating` where
        that is floating point. `name` as in `tensor`.
        """
        tensor = self.tensor(name)
        packed = quantize(tensor, format or floating or natural_format(tensor.dtype))
        if packed.weight.data_ptr() != tensor.data_ptr():
            self._release(name)
        return packed

    def matrix_pieces(self, name: str, format: str | None = None) -> Iterator[Packed]:
        """`matrix` in consecutive pieces of rows, so that no more than one is in memory."""
        tensor = self.tensor(name)
        for piece in torch.split(tensor, piece_rows(tensor.shape[1])):
            yield quantize(piece, format or natural_format(tensor.dtype))
            self._release(name)

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
        """gate_up_proj [2*I, H] and down_proj [H, I] of experts lo..hi-1, one expert at a time.

        `columns` keeps that part of the intermediate dimension, from its first to before its last. Formats
        and errors as in `matrix` and `expert_slice`; the file's pages do not stay where the weights were
        converted.
        """
        parts = self.expert_slice(layer, lo, hi)
        chosen = format or floating or natural_format(parts[0].dtype)
        for gate_up, down in zip(*parts, strict=True):
            if columns is not None:
                low, high = columns
                gate_up = torch.cat([half[low:high] for half in gate_up.chunk(2)])
            packed = quantize(gate_up, chosen), self._part(down, chosen, columns)
            if columns is not None or packed[0].weight.data_ptr() != gate_up.data_ptr():
                self._release(f"layers.{layer}.experts.gate_up_proj")
                self._release(f"layers.{layer}.experts.down_proj")
            yield packed

    def _part(self, down: torch.Tensor, format: str, columns: tuple[int, int] | None) -> Packed:
        """down_proj or columns of it, which are rounded as the whole is: slices add up to it."""
        if columns is None:
            return quantize(down, format)
        low, high = columns
        if format == "int4" and low % GROUP:
            return quantize(down[:, low:high], format)
        return quantize(down, format).columns(low, high)

    def small_files(self) -> dict[str, bytes]:
        """The configuration's and tokenizer's files by name: what a shard needs beside weights."""
        found = (self.path / name for name in SMALL_FILES)
        return {file.name: file.read_bytes() for file in found if file.is_file()}

    def _release(self, name: str) -> None:
        file, stored = self._find(name)
        file.release(stored)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that tell this model's weights from any other's, alike whatever part one loads.

        BLAKE2b over the configuration's arithmetic, each tensor's name, dtype and shape, and a few samples
        of its bytes. Prefixes, sharding and the configuration's spelling do not enter.
        """
        digest = hashlib.blake2b(FINGERPRINT_VERSION, digest_size=16)
        digest.update(json.dumps(arithmetic(self.config), sort_keys=True).encode())
        for name in sorted(name for name, _ in expected_tensors(self.config)):
            file, stored = self._located[name]
            entry = file.entries[stored]
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            digest.update(file.sample(stored, SAMPLE_NBYTES, SAMPLES))
        return digest.hexdigest()

    def _find(self, name: str) -> tuple[MappedFile, str]:
        if name not in self._located:
            raise CheckpointError(f"{self.path} has no tensor {name}", path=str(self.path))
        return self._located[name]


def has_weights(directory: Path) -> bool:
    """Whether there is more than a configuration: a shard, or safetensors."""
    return any((directory / name).is_file() for name in (SHARD, INDEX, SINGLE))


def _locate(directory: Path) -> Iterator[tuple[str, MappedFile]]:
    """Every stored tensor name with its file, by the index where there is one."""
    index = directory / INDEX
    if not index.is_file():
        file = MappedFile(_single(directory))
        yield from ((name, file) for name in file.entries)
        return
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", path=str(index), remedy="Fetch the file again.")
    names = sorted({str(name) for name in weight_map.values()})
    absent = [name for name in names if not _plain(name) or not (directory / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(names)} files, {len(absent)} of them missing: {', '.join(absent[:3])}",
            path=str(directory / absent[0]),
            remedy="Fetch the missing files into the directory.",
        )
    files = {name: MappedFile(directory / name) for name in names}
    for stored, name in weight_map.items():
        if stored not in files[name].entries:
            raise CheckpointError(
                f"{directory / name} has no tensor {stored}, though {INDEX} places it there",
                path=str(directory / name),
                remedy="Fetch the index and its files again, from one revision.",
            )
        yield stored, files[name]


def _plain(name: str) -> bool:
    """A file name without a path: an index may not lead out of its directory."""
    return name not in ("", ".", "..") and Path(name).name == name


def _single(directory: Path) -> Path:
    if (directory / SINGLE).is_file():
        return directory / SINGLE
    pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
    raise CheckpointError(
        f"{directory} holds neither {SINGLE} nor {INDEX}",
        path=str(directory),
        remedy="Save the model as safetensors: pickled files are not read."
        if pickled
        else "Fetch the weights.",
    )


def _check(config: ModelConfig, located: dict[str, tuple[MappedFile, str]], directory: Path) -> None:
    """Raises for a tensor that is missing, misshapen or of a kind nobody here computes with."""
    shapes = dict(expected_tensors(config))
    for name, (file, stored) in located.items():
        if name not in shapes and not (name == "lm_head.weight" and config.tie_word_embeddings):
            raise UnsupportedModelError(
                f"{file.path}: tensor {stored} belongs to no implemented part of the model",
                feature=name,
                path=str(file.path),
                remedy="Use a plain Gemma text checkpoint, with fused expert tensors and merged adapters.",
            )
    for name, shape in shapes.items():
        if name not in located:
            raise CheckpointError(
                f"{directory}: tensor {name} is missing",
                path=str(directory),
                remedy="Fetch the weights again, or check that config.json belongs to them.",
            )
        file, stored = located[name]
        dtype, found = file.entries[stored].dtype, file.entries[stored].shape
        if found != shape:
            raise CheckpointError(
                f"{file.path}: tensor {stored} has shape {list(found)}, config.json asks for {list(shape)}",
                path=str(file.path),
                remedy="Use the config.json that belongs to these weights.",
            )
        if dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{file.path}: tensor {stored} has dtype {dtype}, which is not implemented",
                feature=f"dtype={dtype}",
                path=str(file.path),
                remedy=f"Use a checkpoint in {', '.join(sorted(DTYPES))}.",
            )
