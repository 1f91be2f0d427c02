"""Gemma 4 from llama.cpp's GGUF files: configuration, names, and weights in our formats.

| in the file            | here                                                                       |
|------------------------|----------------------------------------------------------------------------|
| F32, F16, BF16         | as they are (F16 as float32), or converted like any other checkpoint       |
| Q4_0                   | int4 without offsets: the same nibbles and factors                         |
| Q8_0                   | int8 with scales per 32 columns: the same bytes                            |
| Q4_1, Q4_K, Q3_K, ...  | int4, by way of float32 (needs the `gguf` package)                         |
| Q5_0, Q5_K, Q6_K, ...  | int8 with scales per 32 columns, likewise                                  |

Another format is reached by way of float32 when asked for by name. Tokenizer and chat template come from the
metadata too, see `splitinfer.model.gguf_tokenizer`. Gemma 3 has other arithmetic and is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitinfer.errors import CheckpointError, UnsupportedModelError, UsageError
from splitinfer.model.config import read_text_config
from splitinfer.model.gguf_file import BLOCKS, GgufFile
from splitinfer.model.gguf_tokenizer import tokenizer_files
from splitinfer.model.mapped import TensorEntry
from splitinfer.model.quantize import (
    GROUP,
    Packed,
    joined,
    natural_format,
    pack_int4,
    pack_int8,
    piece_rows,
    quantize,
)
from splitinfer.model.weights import NOT_ARITHMETIC, Checkpoint, expected_tensors

__all__ = ["GgufCheckpoint", "config_table"]

ARCHITECTURE = "gemma4"
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What each type becomes unless another format is asked for: the nearest that is not coarser.
FORMATS = {
    "Q2_K": "int4", "Q3_K": "int4", "Q4_0": "int4", "Q4_1": "int4", "Q4_K": "int4", "IQ4_NL": "int4",
    "IQ4_XS": "int4", "Q5_0": "int8", "Q5_1": "int8", "Q5_K": "int8", "Q6_K": "int8", "Q8_0": "int8",
}  # fmt: skip
SAMPLE_NBYTES, SAMPLES = 64, 4

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
        return self._floating(name).view(self.entry(name).shape)

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
        if columns is not None:
            raise UsageError(
                f"{self.path} is a GGUF file, whose experts are taken whole",
                remedy="Use --slice with a checkpoint in the Hugging Face layout.",
            )
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
            yield pair[0], pair[1]

    def small_files(self) -> dict[str, bytes]:
        config = json.dumps(self._table, indent=1).encode()
        return {"config.json": config, **tokenizer_files(self.file)}

    @cached_property
    def fingerprint(self) -> str:
        """As a checkpoint's, of this file's own bytes: its nodes have to be given the same file."""
        digest = hashlib.blake2b(b"splitinfer-gguf-1", digest_size=16)
        arithmetic = {k: v for k, v in asdict(self.config).items() if k not in NOT_ARITHMETIC}
        digest.update(json.dumps(arithmetic, sort_keys=True).encode())
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
        return _widened(raw, kind, self.path)

    def _packed(self, name: str, rows: slice, format: str | None) -> Packed:
        kind, columns = self.entry(name).dtype, self.entry(name).shape[-1]
        if kind in FLOATS:
            floating = self._floating(name, rows)
            return quantize(floating, format or natural_format(floating.dtype))
        raw = self.file.rows(gguf_name(name))[rows]
        if format not in (None, FORMATS[kind]):
            return quantize(_widened(raw, kind, self.path), format)
        if kind == "Q4_0":
            return _from_q4_0(raw, columns)
        if kind == "Q8_0":
            return _from_q8_0(raw, columns)
        wide = _widened(raw, kind, self.path)
        if FORMATS[kind] == "int8":
            groups = wide.view(len(wide), -1, GROUP)
            scales = (groups.abs().amax(-1, keepdim=True) / 127).to(torch.float16)
            steps = (groups / torch.where(scales == 0, 1.0, scales.float())).round_().clamp_(-127, 127)
            return pack_int8(steps.flatten(1), scales.squeeze(-1))
        return quantize(wide, FORMATS[kind])


def _blocks(raw: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The float16 scale [rows, blocks] and the bytes after it of every block."""
    blocks = raw.reshape(len(raw), -1, BLOCKS[kind][1])
    return blocks[..., :2].contiguous().view(torch.float16).squeeze(-1), blocks[..., 2:]


def _from_q4_0(raw: Tensor, columns: int) -> Packed:
    """weight = (nibble - 8) d; byte i of a block holds columns i (low half) and i + 16 (high half)."""
    scales, halves = _blocks(raw, "Q4_0")
    nibbles = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)
    return pack_int4(nibbles, scales, None, columns)


def _from_q8_0(raw: Tensor, columns: int) -> Packed:
    scales, values = _blocks(raw, "Q8_0")
    return pack_int8(values.reshape(len(raw), columns).view(torch.int8), scales)


def _widened(raw: Tensor, kind: str, path: Path) -> Tensor:
    """Any quantised type as float32, by the `gguf` package."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UnsupportedModelError(
            f"{path} has weights in {kind}, which the `gguf` package reads and is not installed",
            feature=f"ggml type {kind}",
            path=str(path),
            remedy="Install it: pip install 'splitinfer[gguf]'.",
        ) from None
    wide: Any = dequantize(raw.contiguous().numpy(), GGMLQuantizationType[kind])
    return torch.from_numpy(wide)


def config_table(file: GgufFile) -> dict[str, Any]:
    """The metadata as a Hugging Face text configuration in the published spelling.

    Raises UnsupportedModelError for another architecture, CheckpointError for metadata that are missing.
    """
    found = file.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        raise UnsupportedModelError(
            f"{file.path}: architecture {found!r} is not implemented",
            feature=f"architecture={found}",
            path=str(file.path),
            remedy="Use a GGUF file of Gemma 4.",
        )
    try:
        return _config_table(file)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: metadata about the architecture are missing or wrong ({error})",
            path=str(file.path),
            remedy="Convert the model again with a present llama.cpp.",
        ) from None


def _config_table(file: GgufFile) -> dict[str, Any]:
    def value(key: str, *default: Any) -> Any:
        return file.metadata.get(f"{ARCHITECTURE}.{key}", *default) if default else file.metadata[
            f"{ARCHITECTURE}.{key}"
        ]  # fmt: skip

    layers = value("block_count")
    sliding = [bool(s) for s in value("attention.sliding_window_pattern")]
    kv_heads = value("attention.head_count_kv")
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
    full = sliding.index(False)
    table = {
        "model_type": "gemma4_text",
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "dtype": "float32" if file.tensors["token_embd.weight"].type == "F32" else "bfloat16",
        "final_logit_softcapping": value("final_logit_softcapping", None),
        "global_head_dim": value("attention.key_length"),
        "head_dim": value("attention.key_length_swa"),
        "hidden_size": value("embedding_length"),
        "hidden_size_per_layer_input": value("embedding_length_per_layer_input", 0),
        "intermediate_size": value("feed_forward_length"),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "max_position_embeddings": value("context_length"),
        "num_attention_heads": value("attention.head_count"),
        "num_global_key_value_heads": kv_heads[full],
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads[sliding.index(True)] if True in sliding else kv_heads[full],
        "num_kv_shared_layers": value("attention.shared_kv_layers", 0),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, value),
        "sliding_window": value("attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "enable_moe_block": value("expert_count", 0) > 0,
    }
    if table["enable_moe_block"]:
        table |= {
            "num_experts": value("expert_count"),
            "top_k_experts": value("expert_used_count"),
            "moe_intermediate_size": value("expert_feed_forward_length"),
        }
    tokens = file.metadata
    ends = [tokens.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    table["eos_token_id"] = sorted({i for i in ends if i is not None})
    table["bos_token_id"] = tokens.get("tokenizer.ggml.bos_token_id")
    return table


def _rope(file: GgufFile, value: Any) -> dict[str, Any]:
    """Full layers turn a part of their pairs: the file's factors are 1 for those and huge for the others."""
    partial = 1.0
    if "rope_freqs.weight" in file.tensors:
        factors = file.rows("rope_freqs.weight").clone().view(torch.float32).view(-1)
        turning = int((factors == 1).sum())
        if bool((factors[turning:] < 1e20).any()):
            raise ValueError("rope_freqs")
        partial = turning / len(factors)
    return {
        "full_attention": {
            "partial_rotary_factor": partial,
            "rope_theta": value("rope.freq_base"),
            "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": value("rope.freq_base_swa"), "rope_type": "default"},
    }
