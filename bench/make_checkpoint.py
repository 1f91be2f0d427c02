"""A random-weight checkpoint with the true shapes of Gemma 4 26B-A4B, any number of layers, in bfloat16.

    python bench/make_checkpoint.py DIR                    6 layers, 11.3 GB
    python bench/make_checkpoint.py DIR --layers 30        the whole size, 51 GB
    python bench/make_checkpoint.py DIR --vocab 32768      a smaller embedding and head

The layout is that of the published files: prefix `model.language_model.`, fused expert tensors, no v_proj in
full-attention layers, tied embeddings. One shard holds the embedding, one each layer; a layer's experts are
drawn and written one by one, so memory stays below a gigabyte. The weights are random but sane: every
product keeps the scale of its input, so that routing and attention are neither uniform nor one-hot. Text
from such a model says nothing; its speed says everything.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["main", "text_config", "write"]

PREFIX = "model.language_model."
HIDDEN, HEADS, DENSE, MOE = 2816, 16, 2112, 704
KV_HEADS, HEAD_DIM, GLOBAL_KV_HEADS, GLOBAL_HEAD_DIM = 8, 256, 2, 512
TOP_K, PATTERN = 8, 6  # every sixth layer, and the last, attends to everything


def text_config(layers: int, experts: int, vocab: int) -> dict[str, Any]:
    """The text configuration in the published spelling."""
    full = [(i + 1) % PATTERN == 0 or i == layers - 1 for i in range(layers)]
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "enable_moe_block": True,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": GLOBAL_HEAD_DIM,
        "head_dim": HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": DENSE,
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "max_position_embeddings": 262_144,
        "model_type": "gemma4_text",
        "moe_intermediate_size": MOE,
        "num_attention_heads": HEADS,
        "num_experts": experts,
        "num_global_key_value_heads": GLOBAL_KV_HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1_000_000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "top_k_experts": TOP_K,
        "use_bidirectional_attention": "vision",
        "use_double_wide_mlp": False,
        "vocab_size": vocab,
    }


@dataclass(frozen=True)
class Planned:
    """One tensor to be: drawn block by block along its first dimension, `per_block` entries at a time."""

    name: str
    shape: tuple[int, ...]
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor]
    per_block: int

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)

    def blocks(self, generator: torch.Generator) -> Iterator[Tensor]:
        for lo in range(0, self.shape[0], self.per_block):
            shape = (min(self.per_block, self.shape[0] - lo), *self.shape[1:])
            yield self.draw(shape, generator).bfloat16()


def matrix(name: str, *shape: int, std: float | None = None) -> Planned:
    """Normal weights that keep the scale of what they multiply."""
    scale = shape[-1] ** -0.5 if std is None else std
    rows = max(1, (32 << 20) // math.prod(shape[1:]))
    return Planned(name, shape, lambda s, g: torch.empty(s).normal_(0, scale, generator=g), rows)


def near(name: str, size: int, value: float = 1.0) -> Planned:
    """A norm's or scale's weights, within a tenth of `value`."""
    return Planned(name, (size,), lambda s, g: value + value * 0.1 * torch.randn(s, generator=g), size)


def embedding_tensors(vocab: int) -> list[Planned]:
    """Small embeddings and a large last norm: with tied weights a larger one repeats its input for ever."""
    return [matrix("embed_tokens.weight", vocab, HIDDEN, std=0.005), near("norm.weight", HIDDEN, 4.0)]


def layer_tensors(layer: int, full: bool, experts: int) -> list[Planned]:
    head_dim, kv_heads = (GLOBAL_HEAD_DIM, GLOBAL_KV_HEADS) if full else (HEAD_DIM, KV_HEADS)
    p = f"layers.{layer}."
    planned = [
        matrix(p + "self_attn.q_proj.weight", HEADS * head_dim, HIDDEN),
        matrix(p + "self_attn.k_proj.weight", kv_heads * head_dim, HIDDEN),
        matrix(p + "self_attn.o_proj.weight", HIDDEN, HEADS * head_dim),
        near(p + "self_attn.q_norm.weight", head_dim),
        near(p + "self_attn.k_norm.weight", head_dim, 2 * head_dim**-0.5),
        matrix(p + "mlp.gate_proj.weight", DENSE, HIDDEN),
        matrix(p + "mlp.up_proj.weight", DENSE, HIDDEN),
        matrix(p + "mlp.down_proj.weight", HIDDEN, DENSE),
        matrix(p + "router.proj.weight", experts, HIDDEN, std=1.0),
        near(p + "router.scale", HIDDEN),
        near(p + "router.per_expert_scale", experts),
        near(p + "layer_scalar", 1, 0.8),
        matrix(p + "experts.gate_up_proj", experts, 2 * MOE, HIDDEN),
        matrix(p + "experts.down_proj", experts, HIDDEN, MOE),
    ]
    if not full:
        planned.append(matrix(p + "self_attn.v_proj.weight", kv_heads * head_dim, HIDDEN))
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"]
    norms += ["post_feedforward_layernorm", "pre_feedforward_layernorm_2"]
    norms += ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
    return planned + [near(f"{p}{name}.weight", HIDDEN) for name in norms]


def write_shard(path: Path, tensors: list[Planned], generator: torch.Generator) -> None:
    """One safetensors file: the header is known beforehand, so tensors go out as they are drawn."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[PREFIX + tensor.name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    part = path.with_suffix(".part")  # a run that is interrupted leaves no file that looks whole
    with part.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            _write_blocks(file, tensor, generator)
    part.rename(path)


def _write_blocks(file: BinaryIO, tensor: Planned, generator: torch.Generator) -> None:
    for block in tensor.blocks(generator):
        file.write(block.view(torch.uint8).numpy().data)


def write(path: Path, *, layers: int, experts: int = 128, vocab: int = 262_144, seed: int = 0) -> int:
    """Writes the checkpoint to directory `path`; returns the bytes of its tensors.

    Shards that are there already are kept: an interrupted run continues, and more layers can be added.
    Every shard is drawn from a seed of its own, so that one does not depend on the others.
    """
    config = text_config(layers, experts, vocab)
    shards = {"embedding": embedding_tensors(vocab)}
    for layer, kind in enumerate(config["layer_types"]):
        # The kind is part of the name: the last layer of a short model is another one in a longer model.
        name = f"layer-{layer:02d}-{kind.removesuffix('_attention')}"
        shards[name] = layer_tensors(layer, kind == "full_attention", experts)
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    path.mkdir(parents=True, exist_ok=True)
    files = {name: path / f"{name}-e{experts}-v{vocab}-s{seed}.safetensors" for name in shards}
    missing = sum(t.nbytes for name, ts in shards.items() if not files[name].exists() for t in ts)
    if missing > shutil.disk_usage(path).free:
        raise SystemExit(f"error: {path} has no room for {missing / 1e9:.1f} GB")
    for number, (name, tensors) in enumerate(shards.items()):
        start = time.perf_counter()
        if not files[name].exists():
            write_shard(files[name], tensors, torch.Generator().manual_seed(seed * 1000 + number))
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    weight_map = {PREFIX + t.name: files[name].name for name, tensors in shards.items() for t in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    outer: dict[str, Any] = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "dtype": "bfloat16",
        "model_type": "gemma4",
    }
    outer |= {"eos_token_id": [1, 106], "text_config": config, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(outer, indent=1))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="DIR")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=262_144)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.layers, args.vocab) < 1 or args.experts < TOP_K or args.seed < 0:
        parser.error(
            f"--layers and --vocab have to be 1 or more, --experts {TOP_K} or more, --seed 0 or more"
        )
    total = write(args.path, layers=args.layers, experts=args.experts, vocab=args.vocab, seed=args.seed)
    print(f"{args.path}: {args.layers} layers, {total / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
