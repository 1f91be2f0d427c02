"""The architecture of a checkpoint, from its own config.json; refuses by name what is not implemented.

Two spellings are read: published checkpoints carry `global_head_dim` and `num_global_key_value_heads`,
transformers 5.23 saves `per_layer_config`, a table of overrides by layer. Both give the same ModelConfig.
The reference for every meaning is transformers' `Gemma4TextConfig`; Gemma 3 comes translated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from splitinfer.errors import CheckpointError, UnsupportedModelError
from splitinfer.model.gemma3 import GEMMA3_TYPES, translated

__all__ = ["AttentionConfig", "ModelConfig", "RopeConfig", "load_config", "read_json", "read_text_config"]

MODEL_TYPES = ("gemma4", "gemma4_text", *GEMMA3_TYPES)
LAYER_TYPES = ("sliding_attention", "full_attention")
ROPE_TYPES = ("default", "linear", "proportional")
ROPE_KEYS = frozenset({"rope_type", "rope_theta", "partial_rotary_factor", "factor"})
LAYER_OVERRIDES = frozenset({"head_dim", "num_key_value_heads"})
MAX_JSON_NBYTES = 64 << 20  # config.json is a few kilobytes, a large tokenizer's vocabulary some tens of MB

# Options whose neutral value is implemented and any other is not: name -> values that change nothing.
NEUTRAL_ONLY: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "attn_logit_softcapping": (None, 0, 0.0),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (0, None),
    "num_kv_shared_layers": (0, None),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "use_bidirectional_attention": (None, False, "vision"),  # "vision": text stays causal
    "use_double_wide_mlp": (False, None),
}
# What transformers defaults to where the file is silent, for options that are not neutral then.
ABSENT = {"hidden_size_per_layer_input": 256, "hidden_activation": "gelu_pytorch_tanh"}

# Read here, or without any influence on inference.
# fmt: off
KNOWN = frozenset(NEUTRAL_ONLY) | {
    "attention_dropout", "attention_k_eq_v", "bos_token_id", "dtype", "enable_moe_block",
    "eos_token_id", "final_logit_softcapping", "global_head_dim", "head_dim", "hidden_size",
    "initializer_range", "intermediate_size", "layer_types", "max_position_embeddings", "model_type",
    "moe_intermediate_size", "num_attention_heads", "num_experts", "num_global_key_value_heads",
    "num_hidden_layers", "num_key_value_heads", "pad_token_id", "per_layer_config", "query_pre_attn_scalar",
    "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings", "top_k_experts",
    "torch_dtype", "use_cache", "vocab_size", "vocab_size_per_layer_input", "architectures",
    "chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "name_or_path",
    "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "transformers_version",
}
# fmt: on


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one layer type; "proportional" turns `partial_rotary_factor` of the pairs only.
    Angles are divided by `factor`."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float = 1.0
    factor: float = 1.0


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of one layer. `window` counts the keys a row sees, itself included; None sees all."""

    layer_type: str
    head_dim: int
    num_key_value_heads: int
    window: int | None
    k_eq_v: bool
    rope: RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """What the arithmetic needs to know, named as in Hugging Face's config.json. Sizes are element counts.

    `attention` has one entry per layer. `num_experts`, `top_k_experts` and `moe_intermediate_size` are 0
    where `enable_moe_block` is false. `final_logit_softcapping` is None for no cap. `dtype` is the name the
    file gives, or "" where it gives none.

    The last four tell Gemma 3 from 4, whose values are the defaults: what queries are multiplied with,
    whether values are normalised, what is added to norms' weights, whether each layer's output has a factor.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    attention: tuple[AttentionConfig, ...]
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    tie_word_embeddings: bool
    enable_moe_block: bool
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    attention_scale: float = 1.0
    value_norm: bool = True
    norm_offset: float = 0.0
    layer_scalars: bool = True

    @property
    def layer_types(self) -> tuple[str, ...]:
        return tuple(layer.layer_type for layer in self.attention)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, naming the file, where there is none."""
    try:
        if path.stat().st_size > MAX_JSON_NBYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_NBYTES >> 20} MiB", path=str(path))
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist",
            path=str(path),
            remedy="Name a model directory in the Hugging Face layout (config.json and *.safetensors).",
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=str(path)) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(
            f"{path} is not valid JSON: {error}", path=str(path), remedy="Fetch the file again."
        ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no JSON object", path=str(path), remedy="Fetch the file again.")
    return loaded


def load_config(path: str | Path) -> ModelConfig:
    """Reads `path`/config.json (and generation_config.json for the end-of-sequence ids).

    Raises CheckpointError for a file that is missing, damaged or contradicts itself, UnsupportedModelError
    (with `feature`) for an architecture or option that is not implemented.
    """
    directory = Path(path)
    file = directory / "config.json"
    outer = read_json(file)
    model_type = outer.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"{file}: model_type {model_type!r} is not implemented",
            feature=f"model_type={model_type}",
            path=str(file),
            remedy=f"Use a checkpoint with model_type {' or '.join(MODEL_TYPES)}.",
        )
    text = outer if model_type.endswith("_text") else outer.get("text_config")
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{file}: text_config is missing", path=str(file), remedy="Fetch the file again."
        )
    generation = directory / "generation_config.json"
    return _Reader(file, text, outer).read(read_json(generation) if generation.is_file() else {})


def read_text_config(file: Path, text: dict[str, Any], outer: dict[str, Any]) -> ModelConfig:
    """A text configuration that stands inside `file` of another model. Raises as `load_config` does."""
    return _Reader(file, text, outer).read({})


class _Reader:
    """Takes one text configuration apart; every complaint names the file and the key."""

    def __init__(self, file: Path, text: dict[str, Any], outer: dict[str, Any]) -> None:
        self.file = file
        self.gemma3 = outer.get("model_type") in GEMMA3_TYPES
        self.text = translated(text) if self.gemma3 else text
        self.outer = outer

    def damaged(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.file}: {what}", path=str(self.file), remedy="Fetch the file again, or correct the key."
        )

    def refuse(self, key: str, value: object, remedy: str = "") -> NoReturn:
        raise UnsupportedModelError(
            f"{self.file}: {key}={value!r} is not implemented",
            feature=f"{key}={value}",
            path=str(self.file),
            remedy=remedy or "Use a checkpoint without this option.",
        )

    def count(self, key: str, default: int | None = None) -> int:
        value = self.text.get(key, default)
        if type(value) is not int or value < 1:
            self.damaged(f"{key} has to be a positive integer and is {value!r}")
        return value

    def number(self, key: str, source: dict[str, Any], default: float | None = None) -> float:
        value = source.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.damaged(f"{key} has to be a positive number and is {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.text.get(key, default)
        if not isinstance(value, bool):
            self.damaged(f"{key} has to be true or false and is {value!r}")
        return value

    def read(self, generation: dict[str, Any]) -> ModelConfig:
        self.refuse_unknown()
        layers = self.count("num_hidden_layers")
        moe = self.flag("enable_moe_block", False)
        experts = self.count("num_experts") if moe else 0
        top_k = self.count("top_k_experts") if moe else 0
        if top_k > experts:
            self.damaged(f"top_k_experts={top_k} is more than num_experts={experts}")
        cap = self.text.get("final_logit_softcapping")
        return ModelConfig(
            model_type=self.outer["model_type"],
            vocab_size=self.count("vocab_size", 262_144),
            hidden_size=self.count("hidden_size"),
            intermediate_size=self.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=self.count("num_attention_heads"),
            attention=self.attention(layers),
            max_position_embeddings=self.count("max_position_embeddings", 131_072),
            rms_norm_eps=self.number("rms_norm_eps", self.text, 1e-6),
            final_logit_softcapping=self.number("final_logit_softcapping", self.text) if cap else None,
            tie_word_embeddings=self.tied(),
            enable_moe_block=moe,
            num_experts=experts,
            top_k_experts=top_k,
            moe_intermediate_size=self.count("moe_intermediate_size") if moe else 0,
            dtype=self.dtype_name(),
            bos_token_id=self.token_id("bos_token_id", 2),
            eos_token_ids=self.eos(generation),
            **self.differences(),
        )

    def differences(self) -> dict[str, Any]:
        if not self.gemma3:
            return {}
        scale = self.number("query_pre_attn_scalar", self.text) ** -0.5
        return {"attention_scale": scale, "value_norm": False, "norm_offset": 1.0, "layer_scalars": False}

    def refuse_unknown(self) -> None:
        for key, neutral in NEUTRAL_ONLY.items():
            value = self.text.get(key, ABSENT.get(key, neutral[0]))
            if not any(value == allowed and type(value) is type(allowed) for allowed in neutral):
                self.refuse(key, value)
        if self.outer.get("quantization_config") is not None:
            self.refuse("quantization_config", self.outer["quantization_config"])
        inner = "gemma3_text" if self.gemma3 else "gemma4_text"
        if "text_config" in self.outer and self.text.get("model_type", inner) != inner:
            self.refuse("text_config.model_type", self.text["model_type"])
        for key, value in self.text.items():
            harmless = key in KNOWN or key.startswith("_") or key.endswith(("_version", "_token_id"))
            if not harmless and value not in (None, False, 0, "", [], {}):
                self.refuse(
                    key, value, "If this option does not change the arithmetic, delete it from the file."
                )

    def attention(self, layers: int) -> tuple[AttentionConfig, ...]:
        types = self.text.get("layer_types")
        if types is None:
            types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)]
        if not isinstance(types, list) or len(types) != layers:
            self.damaged(f"layer_types has to list {layers} layers")
        for kind in types:
            if kind not in LAYER_TYPES:
                self.refuse("layer_types", kind)
        if not self.gemma3:
            types = [*types[:-1], "full_attention"]  # the reference forces the last layer so
        ropes = {kind: self.rope(kind) for kind in set(types)}
        shapes = tuple(self.attention_layer(i, kind, ropes[kind]) for i, kind in enumerate(types))
        if len(set(shapes)) != len(ropes):
            self.refuse("per_layer_config", "different shapes within one layer type")
        return shapes

    def attention_layer(self, layer: int, kind: str, rope: RopeConfig) -> AttentionConfig:
        full = kind == "full_attention"
        shared = full and self.flag("attention_k_eq_v", False)
        head_dim, kv_heads = self.count("head_dim", 256), self.count("num_key_value_heads", 4)
        table = self.text.get("per_layer_config")
        if table is not None:
            overrides = self.overrides(table, layer)
            head_dim = overrides.get("head_dim", head_dim)
            kv_heads = overrides.get("num_key_value_heads", kv_heads)
        elif full:
            head_dim = self.count("global_head_dim", 512)
            if shared and self.text.get("num_global_key_value_heads") is not None:
                kv_heads = self.count("num_global_key_value_heads")
        if self.count("num_attention_heads") % kv_heads:
            self.damaged(
                f"layer {layer}: num_attention_heads is no multiple of num_key_value_heads={kv_heads}"
            )
        if head_dim % 2:
            self.damaged(f"layer {layer}: head_dim={head_dim} is odd")
        window = None if full else self.count("sliding_window", 512)
        return AttentionConfig(kind, head_dim, kv_heads, window, shared, rope)

    def overrides(self, table: object, layer: int) -> dict[str, int]:
        row = table.get(str(layer), {}) if isinstance(table, dict) else None
        if not isinstance(row, dict):
            self.damaged("per_layer_config has to map layer numbers to options")
        for key, value in row.items():
            if key not in LAYER_OVERRIDES:
                self.refuse(f"per_layer_config.{layer}.{key}", value)
            if type(value) is not int or value < 1:
                self.damaged(f"per_layer_config.{layer}.{key} has to be a positive integer and is {value!r}")
        return row

    def rope(self, kind: str) -> RopeConfig:
        by_type = self.text.get("rope_parameters")
        if by_type is None:
            return (
                RopeConfig("proportional", 1e6, 0.25)
                if kind == "full_attention"
                else RopeConfig("default", 1e4)
            )
        given = by_type.get(kind) if isinstance(by_type, dict) else None
        if not isinstance(given, dict):
            self.damaged(f"rope_parameters has no entry for {kind}")
        rope_type = given.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            self.refuse(f"rope_parameters.{kind}.rope_type", rope_type)
        for key in given.keys() - ROPE_KEYS:
            self.refuse(f"rope_parameters.{kind}.{key}", given[key])
        theta = self.number("rope_theta", given)
        if rope_type == "default":  # the reference ignores the other keys here
            return RopeConfig("default", theta)
        if rope_type == "linear":
            return RopeConfig("linear", theta, 1.0, self.number("factor", given))
        partial = self.number("partial_rotary_factor", given, 1.0)
        if partial > 1:
            self.damaged(f"rope_parameters.{kind}.partial_rotary_factor={partial} is more than 1")
        return RopeConfig("proportional", theta, partial, self.number("factor", given, 1.0))

    def tied(self) -> bool:
        value = self.text.get("tie_word_embeddings", self.outer.get("tie_word_embeddings", True))
        outer = self.outer.get("tie_word_embeddings", value)
        if not isinstance(value, bool) or value is not outer:
            self.damaged("tie_word_embeddings has to be true or false, the same in both places")
        return value

    def dtype_name(self) -> str:
        for source in (self.text, self.outer):
            for key in ("dtype", "torch_dtype"):
                if isinstance(source.get(key), str):
                    return str(source[key]).removeprefix("torch.")
        return ""

    def token_id(self, key: str, default: int | None) -> int | None:
        value = self.text.get(key, self.outer.get(key, default))
        if value is not None and (type(value) is not int or value < 0):
            self.damaged(f"{key} has to be a token id and is {value!r}")
        return value

    def eos(self, generation: dict[str, Any]) -> tuple[int, ...]:
        """The most specific answer wins: generation settings, then the outer, then the text configuration."""
        for source in (generation, self.outer, self.text):
            value = source.get("eos_token_id")
            if value is not None:
                ids = value if isinstance(value, list) else [value]
                if not all(type(i) is int and i >= 0 for i in ids):
                    self.damaged(f"eos_token_id has to be a token id or a list of them and is {value!r}")
                return tuple(ids)
        return ()
