"""Tiny Gemma 4 checkpoints for tests: written here in plain torch, or made by transformers.

`write_checkpoint` needs no transformers: random weights with healthy statistics (attention and routing are
neither uniform nor one-hot), in the Hugging Face layout, with every variation found in the wild: both
prefixes, both spellings of the configuration, any number of shards.
`transformers_checkpoint` lets transformers write the files, from the same configuration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = ["layer_tensors", "tiny_config", "transformers_checkpoint", "wrap_config", "write_checkpoint"]

PREFIXES = {"text": "model.", "multimodal": "model.language_model."}


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A flat text configuration in the published spelling, odd in every size, small in every one."""
    config: dict[str, Any] = {
        "architectures": ["Gemma4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "dtype": "float32",
        "enable_moe_block": True,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 16,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": 36,
        "max_position_embeddings": 512,
        "model_type": "gemma4_text",
        "moe_intermediate_size": 20,
        "num_attention_heads": 6,
        "num_experts": 11,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
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
        "sliding_window": 8,
        "tie_word_embeddings": True,
        "top_k_experts": 3,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": False,
        "vocab_size": 131,
    }
    config.update(overrides)
    if "layer_types" not in overrides:
        layers = config["num_hidden_layers"]
        config["layer_types"] = [
            "full_attention" if (i + 1) % 4 == 0 or i == layers - 1 else "sliding_attention"
            for i in range(layers)
        ]
    return config


def by_layer_table(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5.23 saves it: `per_layer_config`, no global keys."""
    config = dict(config)
    overrides: dict[str, Any] = {"head_dim": config.pop("global_head_dim")}
    kv_heads = config.pop("num_global_key_value_heads", None)
    if kv_heads is not None and config["attention_k_eq_v"]:
        overrides["num_key_value_heads"] = kv_heads
    config["per_layer_config"] = {
        str(i): dict(overrides) for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"
    }
    return config


def wrap_config(config: dict[str, Any]) -> dict[str, Any]:
    """The multimodal wrapping: the text configuration one level down."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "dtype": config["dtype"],
        "eos_token_id": [1, 106],
        "model_type": "gemma4",
        "text_config": config,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "vision_config": None,
    }


class _Random:
    """Seeded draws; the generator is this object's own."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def matrix(self, *shape: int, std: float | None = None) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if std is None else std
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype)

    def near(self, value: float, *shape: int) -> torch.Tensor:
        return (value * (1 + 0.1 * torch.randn(*shape, generator=self.generator))).to(self.dtype)


def layer_tensors(config: dict[str, Any], layer: int, draw: _Random) -> dict[str, torch.Tensor]:
    """One layer's tensors by their names below `layers.<n>.`."""
    full = config["layer_types"][layer] == "full_attention"
    hidden, heads, inter = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    head_dim = config["global_head_dim"] if full else config["head_dim"]
    shared = full and config["attention_k_eq_v"]
    kv_heads = (config["num_global_key_value_heads"] if shared else None) or config["num_key_value_heads"]
    tensors = {
        "self_attn.q_proj.weight": draw.matrix(heads * head_dim, hidden),
        "self_attn.k_proj.weight": draw.matrix(kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": draw.matrix(hidden, heads * head_dim),
        "self_attn.q_norm.weight": draw.near(1.0, head_dim),
        "self_attn.k_norm.weight": draw.near(head_dim**-0.5 * 2, head_dim),
        "mlp.gate_proj.weight": draw.matrix(inter, hidden),
        "mlp.up_proj.weight": draw.matrix(inter, hidden),
        "mlp.down_proj.weight": draw.matrix(hidden, inter),
        "layer_scalar": torch.empty(1).uniform_(0.5, 1.0, generator=draw.generator).to(draw.dtype),
    }
    if not shared:
        tensors["self_attn.v_proj.weight"] = draw.matrix(kv_heads * head_dim, hidden)
    norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
    names = [f"{n}_layernorm.weight" for n in norms]
    if config["enable_moe_block"]:
        experts, moe = config["num_experts"], config["moe_intermediate_size"]
        names += [f"{n}.weight" for n in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2")]
        names.append("pre_feedforward_layernorm_2.weight")
        tensors["router.proj.weight"] = draw.matrix(experts, hidden, std=1.5)
        tensors["router.scale"] = draw.near(1.0, hidden)
        tensors["router.per_expert_scale"] = draw.near(1.0, experts)
        tensors["experts.gate_up_proj"] = draw.matrix(experts, 2 * moe, hidden)
        tensors["experts.down_proj"] = draw.matrix(experts, hidden, moe)
    for name in names:
        tensors[name] = draw.near(1.0, hidden)
    return tensors


def write_checkpoint(
    path: Path,
    config: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    shards: int = 1,
    layout: str = "multimodal",
    spelling: str = "published",
) -> Path:
    """Writes a random checkpoint to directory `path` and returns it.

    `layout` is "multimodal" (wrapped configuration, `model.language_model.` names) or "text" (`model.`);
    `spelling` is "published" or "transformers"; `shards` > 1 writes that many files and an index.
    """
    config = tiny_config() if config is None else config
    draw = _Random(seed, getattr(torch, config["dtype"]))
    prefix = PREFIXES[layout]
    tensors = {
        prefix + "embed_tokens.weight": draw.matrix(config["vocab_size"], config["hidden_size"], std=0.15),
        prefix + "norm.weight": draw.near(1.0, config["hidden_size"]),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw.matrix(config["vocab_size"], config["hidden_size"])
    for layer in range(config["num_hidden_layers"]):
        for name, tensor in layer_tensors(config, layer, draw).items():
            tensors[f"{prefix}layers.{layer}.{name}"] = tensor
    path.mkdir(parents=True, exist_ok=True)
    spelled = by_layer_table(config) if spelling == "transformers" else config
    saved = wrap_config(spelled) if layout == "multimodal" else spelled
    (path / "config.json").write_text(json.dumps(saved, indent=1))
    _save(path, tensors, shards)
    return path


def _save(path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def transformers_checkpoint(
    path: Path, config: dict[str, Any], *, seed: int = 0, layout: str = "text", max_shard_size: str = "5GB"
) -> Any:
    """Writes the checkpoint of `write_checkpoint` through transformers; returns its model, float32.

    The reference model is built from the configuration alone and filled with our random weights (its own
    initialisation leaves every norm at one, which hides mistakes), then saved by `save_pretrained`.
    """
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    text = Gemma4TextConfig(
        **{k: v for k, v in config.items() if k not in ("architectures", "model_type", "dtype")}
    )
    text._attn_implementation = "eager"
    model: Any
    if layout == "text":
        model = Gemma4ForCausalLM(text)
    else:
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=None))
        model.config.text_config._attn_implementation = "eager"
    draw = _Random(seed, torch.float32)
    inner = model.model if layout == "text" else model.model.language_model
    state = {
        "embed_tokens.weight": draw.matrix(config["vocab_size"], config["hidden_size"], std=0.15),
        "norm.weight": draw.near(1.0, config["hidden_size"]),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, tensor in layer_tensors(config, layer, draw).items():
            state[f"layers.{layer}.{name}"] = tensor
    missing, unexpected = inner.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "inv_freq" not in name and "embed_scale" not in name], missing
    if not config["tie_word_embeddings"]:
        model.lm_head.weight.data = draw.matrix(config["vocab_size"], config["hidden_size"])
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model.eval()
