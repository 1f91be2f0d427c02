"""What a GGUF file of Gemma 4 says of its architecture, as llama.cpp's converter writes it, and as llama.cpp
and `splitinfer.model.gguf` read it. For the files that benches and tests make."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from splitinfer.model.config import ModelConfig

__all__ = ["describe_any", "describe_gemma4", "rope_factors"]


def describe_any(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """What every Gemma has."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def describe_gemma4(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """All that Gemma 4 has, but for the tokenizer and the tensor `rope_factors`."""
    describe_any(writer, config)
    full = config.attention[-1]
    local = next((a for a in config.attention if a.window is not None), full)
    writer.add_head_count_kv([a.num_key_value_heads for a in config.attention])
    writer.add_rope_freq_base(full.rope.rope_theta)
    writer.add_rope_freq_base_swa(local.rope.rope_theta)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(local.head_dim)
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(local.head_dim)
    writer.add_value_length_swa(local.head_dim)
    writer.add_sliding_window(local.window or 1)
    writer.add_sliding_window_pattern([a.window is not None for a in config.attention])
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.top_k_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def rope_factors(config: ModelConfig) -> npt.NDArray[np.float32]:
    """`rope_freqs.weight`: full layers turn a part of their pairs; the others are divided by so much that
    they keep still."""
    full = config.attention[-1]
    turning = int(full.head_dim * full.rope.partial_rotary_factor / 2)
    return np.array([1.0] * turning + [1e30] * (full.head_dim // 2 - turning), dtype=np.float32)
