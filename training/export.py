"""Writes trained models as checkpoints in the Hugging Face layout, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.drafter import LAYER_TYPES, Assistant
from training.network import FULL, SLIDING, Architecture, Decoder
from training.vocabulary import BOS, EOS, PAD

__all__ = ["export_drafter", "export_target", "rounded"]

# Plain turns between Gemma 4's markers. The model is no assistant: this keeps `chat` usable, not clever.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] + '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)
_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As stored: bfloat16, contiguous, on the CPU."""
    return {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def export_target(model: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights, configuration, tokenizer with chat template, and generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    _save(tensors, folder / "model.safetensors")
    a = model.architecture
    text = {
        **_text_config(a, a.layer_types, a.intermediate_size),
        "enable_moe_block": True,
        "final_logit_softcapping": a.final_logit_softcapping,
        "moe_intermediate_size": a.moe_intermediate_size,
        "num_experts": a.num_experts,
        "num_kv_shared_layers": 0,
        "top_k_experts": a.top_k_experts,
    }
    _write(folder / "config.json", {"architectures": ["Gemma4ForCausalLM"], **text})
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": BOS,
            "do_sample": True,
            "eos_token_id": [EOS, tokenizer.token_to_id("<turn|>")],
            "pad_token_id": PAD,
            "temperature": 0.7,
            "top_p": 0.95,
        },
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<bos>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "model_max_length": a.max_position_embeddings,
            "pad_token": "<pad>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )


def export_drafter(assistant: Assistant, intermediate_size: int, folder: Path) -> None:
    """The assistant's weights and configuration; its tokenizer is the target's."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(assistant.state_dict(), folder / "model.safetensors")
    a = assistant.architecture
    text = {
        **_text_config(a, LAYER_TYPES, intermediate_size),
        "enable_moe_block": False,
        "num_kv_shared_layers": len(LAYER_TYPES),
    }
    config = {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": a.hidden_size,
        "dtype": "bfloat16",
        "model_type": "gemma4_assistant",
        "text_config": text,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": False,
    }
    _write(folder / "config.json", config)


def _text_config(a: Architecture, layer_types: tuple[str, ...], intermediate_size: int) -> dict[str, Any]:
    """What target and assistant share, in the published checkpoints' spelling."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": True,
        "bos_token_id": BOS,
        "dtype": "bfloat16",
        "eos_token_id": EOS,
        "global_head_dim": a.global_head_dim,
        "head_dim": a.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": a.hidden_size,
        "hidden_size_per_layer_input": 0,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "layer_types": list(layer_types),
        "max_position_embeddings": a.max_position_embeddings,
        "model_type": "gemma4_text",
        "num_attention_heads": a.num_attention_heads,
        "num_global_key_value_heads": a.num_global_key_value_heads,
        "num_hidden_layers": len(layer_types),
        "num_key_value_heads": a.num_key_value_heads,
        "pad_token_id": PAD,
        "rms_norm_eps": a.rms_norm_eps,
        "rope_parameters": _ROPE,
        "sliding_window": a.sliding_window,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_double_wide_mlp": False,
        "vocab_size": a.vocab_size,
        "vocab_size_per_layer_input": 0,
    }


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(rounded(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its owner alone, and a package would carry that on


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
