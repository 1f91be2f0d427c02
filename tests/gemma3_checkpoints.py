"""Tiny Gemma 3 checkpoints for tests, written by transformers from random weights with healthy statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["gemma3_checkpoint", "tiny_gemma3"]


def tiny_gemma3(**overrides: Any) -> dict[str, Any]:
    """A flat text configuration in the spelling of the published files."""
    return {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 8,
        "hidden_size": 48,
        "intermediate_size": 36,
        "max_position_embeddings": 512,
        "model_type": "gemma3_text",
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 3,
        "query_pre_attn_scalar": 12,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1_000_000.0,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "vocab_size": 131,
        **overrides,
    }


def gemma3_checkpoint(path: Path, config: dict[str, Any], *, seed: int = 0, layout: str = "text") -> Any:
    """Writes the checkpoint with `save_pretrained` and returns its model, float32.

    `layout` is "text" (Gemma3ForCausalLM) or "multimodal" (Gemma3ForConditionalGeneration, with a vision
    tower of one layer). Its own initialisation leaves every norm at one, which hides mistakes: all is drawn.
    """
    from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    text = Gemma3TextConfig(**{k: v for k, v in config.items() if k != "model_type"})
    text._attn_implementation = "eager"
    model: Any
    if layout == "text":
        model = Gemma3ForCausalLM(text)
    else:
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        tower = {**vision, "image_size": 28, "patch_size": 14, "vision_use_head": False}
        whole = Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
        model = Gemma3ForConditionalGeneration(whole)
        model.config.text_config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                drawn *= 0.1
            elif "embed_tokens" in name:
                drawn *= 0.15
            else:
                drawn *= parameter.shape[-1] ** -0.5
            parameter.copy_(drawn)
    model.save_pretrained(path)
    return model.eval()
