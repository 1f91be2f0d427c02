from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from splitinfer.errors import CheckpointError, UnsupportedModelError, UsageError
from splitinfer.model.config import RopeConfig, read_text_config
from splitinfer.model.experts import ExpertBank
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.gguf import gguf_name
from splitinfer.model.gguf_config import config_table
from splitinfer.model.gguf_file import GgufFile
from splitinfer.model.tokenizer import Tokenizer
from splitinfer.model.weights import Checkpoint, expected_tensors
from tests.checkpoints import write_checkpoint
from tests.gemma3_checkpoints import gemma3_checkpoint, tiny_gemma3
from tests.model.gguf_files import Type, write_gguf

ARCHITECTURES = {"gemma3": gguf.MODEL_ARCH.GEMMA3, "gemma4": gguf.MODEL_ARCH.GEMMA4}
# What the converter names by itself, beside its table of names.
BY_HAND = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
GEMMA3 = tiny_gemma3(
    hidden_size=256, intermediate_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2,
    num_hidden_layers=7, sliding_window_pattern=6, query_pre_attn_scalar=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("gguf") / "gemma3"
    gemma3_checkpoint(path, GEMMA3)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("gguf") / "gemma4"))


def table(path: Path, **changed: Any) -> dict[str, Any]:
    """The table of a file whose metadata were changed after the fact: None takes a key away."""
    file = GgufFile(path)
    for key, value in changed.items():
        name = f"{file.metadata['general.architecture']}.{key.replace('__', '.')}"
        if value is None:
            del file.metadata[name]
        else:
            file.metadata[name] = value
    return config_table(file)


@pytest.mark.parametrize("architecture", ["gemma3", "gemma4"])
def test_names_are_llama_cpp_s(architecture: str, request: pytest.FixtureRequest) -> None:
    """Each tensor by the table of its own package, and no tensor that its loader does not know."""
    checkpoint: Checkpoint = request.getfixturevalue(architecture)
    arch = ARCHITECTURES[architecture]
    names = gguf.get_tensor_name_map(arch, checkpoint.config.num_hidden_layers)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    for name, _ in expected_tensors(checkpoint.config):
        found = gguf_name(name)
        rest = name.split(".", 2)[2] if name.startswith("layers.") else name
        if rest in BY_HAND:
            assert found == f"blk.{name.split('.')[1]}.{BY_HAND[rest]}"
        else:
            assert found == names.get_name(f"model.{name}", try_suffixes=(".weight",))
        stem = found.rsplit(".", 1)[0]
        assert stem.replace(f"blk.{name.split('.')[1]}.", "blk.{bid}.") in known, found


@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0, Type.Q8_0])
def test_gemma3_is_read(gemma3: Checkpoint, tmp_path: Path, kind: Type) -> None:
    """The configuration of the checkpoint; in float32 its logits."""
    file = Checkpoint.open(write_gguf(gemma3, tmp_path / "m.gguf", kind))
    assert file.config.attention == gemma3.config.attention
    assert file.config.attention_scale == gemma3.config.attention_scale
    for name in (
        "norm.weight",
        "layers.3.self_attn.k_norm.weight",
        "layers.6.post_attention_layernorm.weight",
    ):
        torch.testing.assert_close(file.tensor(name), gemma3.tensor(name), atol=1e-7, rtol=0)
    if kind == Type.F32:
        torch.testing.assert_close(logits(file), logits(gemma3), atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="of 0 experts"):
        ExpertBank(file, {0: (0,)})


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = Gemma.load(checkpoint, None, dtype=torch.float32)
    return model.logits(asyncio.run(model.forward([Segment(torch.arange(5, 45), model.new_cache())])))


def test_what_gemma3_files_leave_out(gemma3: Checkpoint, tmp_path: Path) -> None:
    """As llama.cpp's loader has it: period, local theta, and the one size that is scaled otherwise."""
    path = write_gguf(gemma3, tmp_path / "m.gguf")
    plain = table(path)
    assert plain["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert plain["rope_parameters"]["full_attention"] == {
        "rope_type": "linear",
        "rope_theta": 1e6,
        "factor": 8.0,
    }
    assert plain["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    changed = table(path, attention__sliding_window_pattern=3, rope__freq_base_swa=2e4)
    assert changed["layer_types"].count("full_attention") == 2
    assert changed["rope_parameters"]["sliding_attention"]["rope_theta"] == 2e4
    as_array = table(path, attention__sliding_window_pattern=[True, False] * 3 + [True])
    assert as_array["layer_types"].count("full_attention") == 3
    assert set(table(path, attention__sliding_window=None)["layer_types"]) == {"full_attention"}
    assert table(path, block_count=62)["query_pre_attn_scalar"] == 256 // 4
    assert (
        table(path, rope__scaling__type=None)["rope_parameters"]["full_attention"]["rope_type"] == "default"
    )


def test_values_by_layer(gemma4: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp writes some as one number or as an array: arrays have to fit one shape per layer type."""
    path = write_gguf(gemma4, tmp_path / "m.gguf")
    layers = gemma4.config.num_hidden_layers
    assert isinstance(GgufFile(path).metadata["gemma4.attention.head_count_kv"], list)
    same = table(path, feed_forward_length=[36] * layers, expert_feed_forward_length=[20] * layers)
    assert (same["intermediate_size"], same["moe_intermediate_size"]) == (36, 20)
    with pytest.raises(UnsupportedModelError, match="feed_forward_length="):
        table(path, feed_forward_length=[36, 36, 36, 72])  # wider networks where keys and values are shared
    with pytest.raises(UnsupportedModelError, match="head_count_kv"):
        table(path, attention__head_count_kv=[3, 2, 3, 1])
    assert table(path, attention__head_count_kv=3)["num_global_key_value_heads"] == 3
    with pytest.raises(UnsupportedModelError, match="dimension_count_swa"):
        table(path, rope__dimension_count_swa=4)
    assert table(path, rope__freq_base_swa=None)["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "hidden_size_per_layer_input"])
def test_options_of_the_small_models_are_refused(gemma4: Checkpoint, tmp_path: Path, key: str) -> None:
    """Keys and values shared by layers, and embeddings by layer: by the name of the option."""
    name = {
        "num_kv_shared_layers": "attention.shared_kv_layers",
        "hidden_size_per_layer_input": "embedding_length_per_layer_input",
    }[key]
    path = write_gguf(gemma4, tmp_path / "m.gguf")
    file = GgufFile(path)
    file.metadata[f"gemma4.{name}"] = 2
    found = config_table(file)
    with pytest.raises(UnsupportedModelError, match=key):
        read_text_config(path, found, found)


@pytest.mark.parametrize("key", ["block_count", "attention__key_length", "rope__freq_base"])
def test_missing_metadata(gemma3: Checkpoint, tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match="metadata about the architecture"):
        table(write_gguf(gemma3, tmp_path / "m.gguf"), **{key: None})


@pytest.mark.parametrize("text", ["<end_of_turn>", "<turn|>"])
def test_the_end_of_a_turn_ends_a_reply(gemma3: Checkpoint, tmp_path: Path, text: str) -> None:
    """Files name <eos> only; llama.cpp finds the other by its text."""
    path = write_gguf(gemma3, tmp_path / "m.gguf", tokenizer="llama", merges=False, last_token=text)
    tokenizer = Tokenizer.open(path)
    assert tokenizer is not None
    assert tokenizer.eos_ids == (1, tokenizer.encode(text)[-1])


def test_rope_of_gemma4(gemma4: Checkpoint, tmp_path: Path) -> None:
    file = Checkpoint.open(write_gguf(gemma4, tmp_path / "m.gguf"))
    assert file.config.attention[-1].rope == RopeConfig("proportional", 1e6, 0.25)


@pytest.mark.parametrize(
    ("name", "flag"), [("attn_qkv.weight", "--fuse-qkv"), ("ffn_gate_exps.weight", "--fuse-gate-up-exps")]
)
def test_other_layouts_are_refused(
    gemma4: Checkpoint, tmp_path: Path, name: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(gemma4, tmp_path / "m.gguf")
    original = GgufFile.__init__

    def with_another(self: GgufFile, path: Path) -> None:
        original(self, path)
        self.tensors[f"blk.0.{name}"] = self.tensors["token_embd.weight"]

    monkeypatch.setattr(GgufFile, "__init__", with_another)
    with pytest.raises(UnsupportedModelError, match=name) as caught:
        Checkpoint.open(path)
    assert flag in caught.value.remedy
