"""Gemma 4 and Gemma 3 from llama.cpp's GGUF files: configuration, names, and weights in our formats.

Weights in F32, F16 and BF16 stay as they are (F16 as float32) or are converted like any other checkpoint's;
quantised ones become int4 or int8, see `splitinfer.model.gguf_blocks`. Another format than that is reached by
way of float32 when asked for by name. Tokenizer and chat template come from the metadata too, see
`splitinfer.model.gguf_tokenizer`, and the configuration: `splitinfer.model.gguf_config`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from splitinfer.errors import CheckpointError, UnsupportedModelError, UsageError
from splitinfer.model.config import read_text_config
from splitinfer.model.gguf_blocks import FORMATS, packed_blocks, widened
from splitinfer.model.gguf_config import config_table
from splitinfer.model.gguf_file import GgufFile
from splitinfer.model.gguf_tokenizer import tokenizer_files
from splitinfer.model.mapped import TensorEntry
from splitinfer.model.quantize import (
    GROUP,
    Packed,
    joined,
    natural_format,
    piece_rows,
    quantize,
)
from splitinfer.model.slicing import sliced
from splitinfer.model.weights import Checkpoint, arithmetic, expected_tensors

__all__ = ["GgufCheckpoint", "gguf_name"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAMPLE_NBYTES, SAMPLES = 64, 4
# Layouts of the same weights that llama.cpp's converter writes when it is told to, and how not to.
OTHER_LAYOUTS = {
    "attn_qkv.weight": "without --fuse-qkv",
    "ffn_gate_exps.weight": "with --fuse-gate-up-exps",
}

TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name in TOP:
        return TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{IN_LAYER[rest]}"


class GgufCheckpoint(Checkpoint):
    """A GGUF file with a checkpoint's methods."""

    def __init__(self, file: GgufFile) -> None:
        table = config_table(file)
        super().__init__(file.path, read_text_config(file.path, table, table), {})
        self.file = file
        self._table = table
        for other, flag in OTHER_LAYOUTS.items():
            if f"blk.0.{other}" in file.tensors:
                raise UnsupportedModelError(
                    f"{file.path}: tensor blk.0.{other} is not implemented",
                    feature=other,
                    path=str(file.path),
                    remedy=f"Convert the model again {flag}.",
                )
        for name, shape in expected_tensors(self.config):
            stored = gguf_name(name)
            found = file.tensors[stored].shape if stored in file.tensors else None
            if found != shape:
                raise CheckpointError(
                    f"{file.path}: tensor {stored} " + (f"has shape {list(found)}" if found else "is missing")
                    + f", its metadata ask for {list(shape)}",
                    path=str(file.path),
                    remedy="Fetch the file again, or convert the model again.",
                )  # fmt: skip

    @classmethod
    def open(cls, path: str | Path) -> GgufCheckpoint:
        """Raises CheckpointError for a damaged file, UnsupportedModelError for another architecture."""
        return cls(GgufFile(Path(path)))

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in: float32 for a file of float32, bfloat16 for any other."""
        kind = self.file.tensors["token_embd.weight"].type
        return torch.float32 if kind == "F32" else torch.bfloat16

    def entry(self, name: str) -> TensorEntry:
        return TensorEntry(*self.file.tensors[gguf_name(name)])

    def tensor(self, name: str) -> Tensor:
        """The tensor in floating point: a view if it is stored so, else widened to float32."""
        tensor = self._floating(name).view(self.entry(name).shape)
        # llama.cpp's converter adds what Gemma 3's norms leave out; here it is added to what was stored.
        shifted = self.config.norm_offset and name.endswith("norm.weight")
        return tensor - self.config.norm_offset if shifted else tensor

    def expert_slice(self, layer: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        pairs = list(self.experts(layer, lo, hi, "float32"))
        gate_up, down = (torch.stack([packed.weight for packed in part]) for part in zip(*pairs, strict=True))
        return gate_up, down

    def stored_as(self, name: str, format: str | None) -> tuple[int, str]:
        kind = self.entry(name).dtype
        if kind in FLOATS:
            return 0, format or natural_format(FLOATS[kind])
        if format not in (None, FORMATS[kind]):
            return 0, format
        return (GROUP if FORMATS[kind] == "int8" or kind == "Q4_0" else 0), FORMATS[kind]

    def matrix(self, name: str, format: str | None = None, *, floating: str | None = None) -> Packed:
        if self.entry(name).dtype in FLOATS:
            format = format or floating
        pieces = list(self.matrix_pieces(name, format))
        return joined(pieces, self.entry(name).shape[0]) if len(pieces) > 1 else pieces[0]

    def matrix_pieces(self, name: str, format: str | None = None) -> Iterator[Packed]:
        rows, columns = self.entry(name).shape
        step = piece_rows(columns)
        for lo in range(0, rows, step):
            yield self._packed(name, slice(lo, min(lo + step, rows)), format)
            self.file.release(gguf_name(name))

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
        if not 0 <= layer < self.config.num_hidden_layers or not 0 <= lo < hi <= self.config.num_experts:
            raise UsageError(
                f"layer {layer}, experts {lo}-{hi - 1}: the model has {self.config.num_hidden_layers} layers "
                f"of {self.config.num_experts} experts"
            )
        names = [f"layers.{layer}.experts.{part}" for part in ("gate_up_proj", "down_proj")]
        for expert in range(lo, hi):
            pair = []
            for name in names:
                entry = self.entry(name)
                rows = slice(expert * entry.shape[1], (expert + 1) * entry.shape[1])
                pair.append(self._packed(name, rows, format or (floating if entry.dtype in FLOATS else None)))
                self.file.release(gguf_name(name))
            yield (pair[0], pair[1]) if columns is None else sliced(pair[0], pair[1], columns)

    def small_files(self) -> dict[str, bytes]:
        config = json.dumps(self._table, indent=1).encode()
        return {"config.json": config, **tokenizer_files(self.file)}

    @cached_property
    def fingerprint(self) -> str:
        """As a checkpoint's, of this file's own bytes: its nodes have to be given the same file."""
        digest = hashlib.blake2b(b"splitinfer-gguf-1", digest_size=16)
        digest.update(json.dumps(arithmetic(self.config), sort_keys=True).encode())
        for name in sorted(name for name, _ in expected_tensors(self.config)):
            entry = self.entry(name)
            digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
            flat = self.file.rows(gguf_name(name)).view(-1)
            span = len(flat) - SAMPLE_NBYTES
            for i in range(SAMPLES if span > 0 else 1):
                at = max(0, span) * (2 * i + 1) // (2 * SAMPLES)
                digest.update(flat[at : at + SAMPLE_NBYTES].numpy().tobytes())
        return digest.hexdigest()

    def _floating(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows in floating point, [rows, columns]."""
        kind = self.entry(name).dtype
        raw = self.file.rows(gguf_name(name))[rows]
        if kind in FLOATS:
            aligned = raw if raw.storage_offset() % FLOATS[kind].itemsize == 0 else raw.clone()
            return aligned.view(FLOATS[kind])
        return widened(raw, kind, self.path)

    def _packed(self, name: str, rows: slice, format: str | None) -> Packed:
        kind, columns = self.entry(name).dtype, self.entry(name).shape[-1]
        if kind in FLOATS:
            floating = self._floating(name, rows)
            return quantize(floating, format or natural_format(floating.dtype))
        raw = self.file.rows(gguf_name(name))[rows]
        if format in (None, FORMATS[kind]):
            return packed_blocks(raw, kind, columns, self.path)
        return quantize(widened(raw, kind, self.path), format)
