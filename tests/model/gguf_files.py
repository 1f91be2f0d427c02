"""GGUF files made from a checkpoint with the `gguf` package, as llama.cpp's own converter lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch

from bench.gguf_metadata import describe_any, describe_gemma4, rope_factors
from splitinfer.model.config import ModelConfig
from splitinfer.model.gguf import gguf_name
from splitinfer.model.weights import Checkpoint, expected_tensors

__all__ = ["TOKENS", "Type", "dequantised", "write_gguf"]

Type = gguf.GGMLQuantizationType
TOKENS = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁",
    *"abcdeh",
    "he",
    "▁he",
]


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    quantised: Type = Type.F32,
    *,
    merges: bool = True,
    tokenizer: str | None = "gemma4",
    architecture: str | None = None,
    last_token: str = "<|turn>",
    raw: Mapping[str, tuple[Type, torch.Tensor]] | None = None,
) -> Path:
    """`quantised` is the type of the matrices whose rows it fits; `raw` are tensors as ready blocks."""
    config = checkpoint.config
    gemma3 = not config.layer_scalars
    writer = gguf.GGUFWriter(path, architecture or ("gemma3" if gemma3 else "gemma4"))
    if gemma3:
        _describe_gemma3(writer, config)
    else:
        describe_gemma4(writer, config)
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    if tokenizer:
        _add_tokenizer(writer, tokenizer, merges, last_token)
    for name, shape in expected_tensors(config):
        kind = Type.F32
        if name in (raw or {}):
            kind, blocks = (raw or {})[name]
            writer.add_tensor(gguf_name(name), blocks.numpy(), raw_dtype=kind)
            continue
        if len(shape) > 1 and "router" not in name:
            kind = quantised
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Type.F32
        values = _as_written(checkpoint, name)
        data = values if kind == Type.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_written(checkpoint: Checkpoint, name: str) -> Any:
    """The converter adds the one that Gemma 3's norms leave out."""
    values = checkpoint.tensor(name).float().numpy()
    return values + checkpoint.config.norm_offset if name.endswith("norm.weight") else values


def _describe_gemma3(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    describe_any(writer, config)
    local = config.attention[0]
    full = next(attention for attention in config.attention if attention.window is None)
    if full.rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full.rope.factor)
    writer.add_rope_freq_base(full.rope.rope_theta)
    writer.add_key_length(local.head_dim)
    writer.add_value_length(local.head_dim)
    writer.add_head_count_kv(local.num_key_value_heads)
    writer.add_sliding_window(local.window or 1)


def _add_tokenizer(writer: gguf.GGUFWriter, model: str, merges: bool, last_token: str) -> None:
    kinds = [3, 3, 3, 2] + [6] * 256 + [1] * (len(TOKENS) - 260)
    writer.add_tokenizer_model(model)
    writer.add_token_list([*TOKENS, last_token])
    writer.add_token_types([*kinds, 4])
    writer.add_token_scores([-float(i) for i in range(len(TOKENS) + 1)])
    if merges:
        writer.add_token_merges(["h e", "▁ he"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}")


def dequantised(checkpoint: Checkpoint, kind: Type) -> dict[str, torch.Tensor]:
    """Every tensor as the file's reader ought to see it, float32."""
    found = {}
    for name, shape in expected_tensors(checkpoint.config):
        values = checkpoint.tensor(name).float().numpy()
        if len(shape) > 1 and "router" not in name and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        found[name] = torch.from_numpy(values.copy())
    return found
