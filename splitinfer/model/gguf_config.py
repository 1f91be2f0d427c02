"""A GGUF file's metadata as a Hugging Face text configuration, for Gemma 4 and Gemma 3.

Keys and defaults are those that llama.cpp's converter writes and its loader assumes
(`gguf-py/gguf/constants.py`, `src/models/gemma4.cpp`, `src/models/gemma3.cpp`).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from splitinfer.errors import CheckpointError, UnsupportedModelError
from splitinfer.model.gguf_file import GgufFile

__all__ = ["config_table"]

ARCHITECTURES = ("gemma4", "gemma3")
ENDS = ("eos", "eot", "eom")
TURN_ENDS = ("<end_of_turn>", "<turn|>")  # llama.cpp knows the ends of a reply by these texts too
GEMMA3_PERIOD = 6  # every sixth layer of Gemma 3 is a full one; its files do not say so
GEMMA3_27B_LAYERS = 62  # the one size whose queries are scaled by hidden_size / heads; nor this


def config_table(file: GgufFile) -> dict[str, Any]:
    """The metadata as a text configuration in the published spelling.

    Raises UnsupportedModelError for another architecture or option, CheckpointError for metadata that are
    missing.
    """
    found = file.metadata.get("general.architecture")
    if found not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: architecture {found!r} is not implemented",
            feature=f"architecture={found}",
            path=str(file.path),
            remedy="Use a GGUF file of Gemma 4 or Gemma 3.",
        )
    try:
        return _Metadata(file, found).table()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file.path}: metadata about the architecture are missing or wrong ({error})",
            path=str(file.path),
            remedy="Convert the model again with a present llama.cpp.",
        ) from None


class _Metadata:
    """The keys of one architecture."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def value(self, key: str) -> Any:
        return self.file.metadata[f"{self.architecture}.{key}"]

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def uniform(self, key: str) -> Any:
        """A value that may be given by layer, and has to be the same in all of them."""
        value = self.value(key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            self.refuse(key, value)
        return value[0]

    def refuse(self, key: str, value: object) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.file.path}: {self.architecture}.{key}={value!r} is not implemented",
            feature=f"{key}={value}",
            path=str(self.file.path),
            remedy="Use a GGUF file of a Gemma model without this option.",
        )

    def table(self) -> dict[str, Any]:
        shared = self.shared()
        return shared | (self.gemma4() if self.architecture == "gemma4" else self.gemma3())

    def shared(self) -> dict[str, Any]:
        metadata, tokens = self.file.metadata, self.file.metadata.get("tokenizer.ggml.tokens")
        ends = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ENDS}
        if isinstance(tokens, list):
            ends |= {tokens.index(text) for text in TURN_ENDS if text in tokens}
        return {
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "dtype": "float32" if self.file.tensors["token_embd.weight"].type == "F32" else "bfloat16",
            "eos_token_id": sorted(ends - {None}),
            "final_logit_softcapping": self.get("final_logit_softcapping"),
            "hidden_size": self.value("embedding_length"),
            "intermediate_size": self.uniform("feed_forward_length"),
            "max_position_embeddings": self.value("context_length"),
            "num_attention_heads": self.uniform("attention.head_count"),
            "num_hidden_layers": self.value("block_count"),
            "rms_norm_eps": self.value("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "vocab_size": self.file.tensors["token_embd.weight"].shape[0],
        }

    def gemma4(self) -> dict[str, Any]:
        sliding = [bool(layer) for layer in self.value("attention.sliding_window_pattern")]
        kv_heads = self.value("attention.head_count_kv")
        kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * len(sliding)
        full = sliding.index(False)
        table = {
            "model_type": "gemma4_text",
            "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in self.file.tensors,
            "enable_moe_block": self.get("expert_count", 0) > 0,
            "global_head_dim": self.value("attention.key_length"),
            "head_dim": self.value("attention.key_length_swa"),
            "hidden_size_per_layer_input": self.get("embedding_length_per_layer_input", 0),
            "layer_types": _layer_types(sliding),
            "num_global_key_value_heads": kv_heads[full],
            "num_key_value_heads": kv_heads[sliding.index(True)] if True in sliding else kv_heads[full],
            "num_kv_shared_layers": self.get("attention.shared_kv_layers", 0),
            "rope_parameters": self.gemma4_rope(),
            "sliding_window": self.value("attention.sliding_window"),
        }
        for kind, heads in zip(sliding, kv_heads, strict=True):
            if heads != table["num_key_value_heads" if kind else "num_global_key_value_heads"]:
                self.refuse("attention.head_count_kv", kv_heads)
        if table["enable_moe_block"]:
            table |= {
                "num_experts": self.value("expert_count"),
                "top_k_experts": self.value("expert_used_count"),
                "moe_intermediate_size": self.uniform("expert_feed_forward_length"),
            }
        return table

    def gemma4_rope(self) -> dict[str, Any]:
        """Full layers turn a part of their pairs: factors are 1 for those and huge for the others."""
        partial = 1.0
        if "rope_freqs.weight" in self.file.tensors:
            factors = self.file.rows("rope_freqs.weight").clone().view(torch.float32).view(-1)
            turning = int((factors == 1).sum())
            if bool((factors[turning:] < 1e20).any()):
                raise ValueError("rope_freqs")
            partial = turning / len(factors)
        turned = self.get("rope.dimension_count_swa", self.value("attention.key_length_swa"))
        if turned != self.value("attention.key_length_swa"):
            self.refuse("rope.dimension_count_swa", turned)
        return {
            "full_attention": {
                "partial_rotary_factor": partial,
                "rope_theta": self.value("rope.freq_base"),
                "rope_type": "proportional",
            },
            "sliding_attention": {
                "rope_theta": self.get("rope.freq_base_swa", 10_000.0),
                "rope_type": "default",
            },
        }

    def gemma3(self) -> dict[str, Any]:
        layers, head_dim = self.value("block_count"), self.value("attention.key_length")
        window = self.get("attention.sliding_window", 0)
        pattern = self.get("attention.sliding_window_pattern", GEMMA3_PERIOD if window else 1)
        if not isinstance(pattern, list):
            pattern = [(i + 1) % pattern != 0 for i in range(layers)]
        scalar = head_dim
        if layers == GEMMA3_27B_LAYERS:
            scalar = self.value("embedding_length") // self.uniform("attention.head_count")
        return {
            "model_type": "gemma3_text",
            "head_dim": head_dim,
            "layer_types": _layer_types(pattern),
            "num_key_value_heads": self.uniform("attention.head_count_kv"),
            "query_pre_attn_scalar": scalar,
            "rope_parameters": self.gemma3_rope(),
            "sliding_window": window or 1,
        }

    def gemma3_rope(self) -> dict[str, Any]:
        scaling = self.get("rope.scaling.type", "none")
        full = {"rope_type": "default", "rope_theta": self.value("rope.freq_base")}
        if scaling != "none":
            full |= {"rope_type": scaling, "factor": self.value("rope.scaling.factor")}
        theta = self.get("rope.freq_base_swa", 10_000.0)
        return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}


def _layer_types(sliding: list[Any]) -> list[str]:
    return ["sliding_attention" if layer else "full_attention" for layer in sliding]
