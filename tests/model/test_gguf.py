from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from splitinfer.errors import CheckpointError, UnsupportedModelError, UsageError
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.gguf import GgufCheckpoint
from splitinfer.model.native import kernels
from splitinfer.model.quantize import quantize
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.model.tokenizer import Tokenizer
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint
from tests.model.gguf_files import TOKENS, Type, dequantised, write_gguf

EXPERTS, LAYERS = 11, 2
# Rows of whole blocks everywhere, as true models have them.
CONFIG = tiny_config(
    hidden_size=256, intermediate_size=256, moe_intermediate_size=256, head_dim=64, global_head_dim=128,
    num_hidden_layers=LAYERS, num_key_value_heads=2, num_attention_heads=4, num_global_key_value_heads=2,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_checkpoint(tmp_path_factory.mktemp("gguf") / "model", CONFIG))


def logits(checkpoint: Checkpoint) -> Tensor:
    everything = dict.fromkeys(range(LAYERS), range(EXPERTS))
    experts = LocalExperts(ExpertBank(checkpoint, everything))
    gemma = Gemma.load(checkpoint, experts, dtype=torch.float32)
    ids = torch.arange(5, 45)
    return gemma.logits(asyncio.run(gemma.forward([Segment(ids, gemma.new_cache())])))


def as_safetensors(model: Checkpoint, path: Path, kind: Type) -> Checkpoint:
    """The same weights after the file's quantisation, in the Hugging Face layout and float32."""
    path.mkdir()
    (path / "config.json").write_bytes((model.path / "config.json").read_bytes())
    tensors = {f"model.{name}": tensor for name, tensor in dequantised(model, kind).items()}
    save_file(tensors, path / "model.safetensors")
    return Checkpoint.open(path)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q8_0])
def test_logits_equal_the_safetensors_path(model: Checkpoint, tmp_path: Path, kind: Type) -> None:
    """The reference computes in float32 with what the file's numbers mean; the kernels hold activations that
    meet quantised weights in 16 bits."""
    if kind == Type.Q4_0 and kernels() is None:
        pytest.skip("PyTorch's int4 product rounds scales and activations to bfloat16")
    found = Checkpoint.open(write_gguf(model, tmp_path / "m.gguf", kind))
    assert isinstance(found, GgufCheckpoint)
    assert found.config.attention == model.config.attention
    tolerance = 2e-3 if kind in (Type.Q4_0, Type.Q8_0) else 1e-4
    torch.testing.assert_close(
        logits(found), logits(as_safetensors(model, tmp_path / "st", kind)), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize(("kind", "format"), [(Type.Q4_0, "int4"), (Type.Q8_0, "int8")])
def test_quantised_weights_are_taken_as_they_are(
    model: Checkpoint, tmp_path: Path, kind: Type, format: str
) -> None:
    file = Checkpoint.open(write_gguf(model, tmp_path / "m.gguf", kind))
    expected = dequantised(model, kind)
    packed = file.matrix("layers.0.self_attn.q_proj.weight")
    assert packed.format == format
    assert torch.equal(packed.widen(), expected["layers.0.self_attn.q_proj.weight"])
    ((gate_up, down),) = file.experts(1, 7, 8)
    assert torch.equal(gate_up.widen(), expected["layers.1.experts.gate_up_proj"][7])
    assert torch.equal(down.widen(), expected["layers.1.experts.down_proj"][7])
    assert torch.equal(file.expert_slice(1, 7, 9)[1], expected["layers.1.experts.down_proj"][7:9])
    assert ExpertBank(file, {0: (1,)}).weight_format == format
    # Asked for by name it is the same: no second rounding.
    assert torch.equal(file.matrix("layers.0.self_attn.q_proj.weight", format).weight, packed.weight)
    assert file.stored_as("layers.0.self_attn.q_proj.weight", format) == (packed.group, format)


@pytest.mark.parametrize(
    ("kind", "format", "error"),
    [(Type.Q4_1, "int4", 1e-2), (Type.Q5_0, "int8", 1e-2), (Type.Q5_1, "int8", 1e-2)],
)
def test_other_types_become_the_nearest_format(
    model: Checkpoint, tmp_path: Path, kind: Type, format: str, error: float
) -> None:
    file = Checkpoint.open(write_gguf(model, tmp_path / "m.gguf", kind))
    name = "layers.0.mlp.up_proj.weight"
    packed = file.matrix(name)
    expected = dequantised(model, kind)[name]
    assert packed.format == format
    assert file.stored_as(name, None) == (32 if format == "int8" else 0, format)
    assert (packed.widen() - expected).norm() < error * expected.norm()


def test_another_format_by_name(model: Checkpoint, tmp_path: Path) -> None:
    file = Checkpoint.open(write_gguf(model, tmp_path / "m.gguf", Type.Q8_0))
    name = "layers.0.mlp.up_proj.weight"
    wide = dequantised(model, Type.Q8_0)[name]
    found, expected = file.matrix(name, "int4"), quantize(wide, "int4")
    assert torch.equal(found.weight, expected.weight)
    assert file.stored_as(name, "int4") == (0, "int4")


def test_a_shard_of_it(model: Checkpoint, tmp_path: Path) -> None:
    """With its fingerprint, configuration and tokenizer, and the same logits to the bit."""
    file = Checkpoint.open(write_gguf(model, tmp_path / "m.gguf", Type.Q8_0))
    write_shard(plan_shard(file, experts=range(EXPERTS), client=True), tmp_path / "shard")
    shard = Checkpoint.open(tmp_path / "shard")
    assert (shard.fingerprint, shard.config) == (file.fingerprint, file.config)
    assert torch.equal(logits(shard), logits(file))
    found, expected = Tokenizer.open(shard.path), Tokenizer.open(file.path)
    assert found is not None
    assert expected is not None
    assert found.encode("he ahe") == expected.encode("he ahe")


def test_fingerprints_tell_files_apart(model: Checkpoint, tmp_path: Path) -> None:
    first = Checkpoint.open(write_gguf(model, tmp_path / "a.gguf", Type.Q8_0)).fingerprint
    again = Checkpoint.open(write_gguf(model, tmp_path / "b.gguf", Type.Q8_0)).fingerprint
    other = Checkpoint.open(write_gguf(model, tmp_path / "c.gguf", Type.Q4_0)).fingerprint
    assert first == again != other


@pytest.mark.parametrize("merges", [True, False])
def test_tokenizer(model: Checkpoint, tmp_path: Path, merges: bool) -> None:
    """With merges, or with scores alone, which give the same."""
    kind = "gemma4" if merges else "llama"
    file = write_gguf(model, tmp_path / "m.gguf", merges=merges, tokenizer=kind)
    tokenizer = Tokenizer.open(file)
    assert tokenizer is not None
    ids = tokenizer.encode("a he<|turn>hé")
    text = [TOKENS.index(t) for t in ("<bos>", "a", "▁he")]
    assert ids == [*text, len(TOKENS), TOKENS.index("h"), 4 + 0xC3, 4 + 0xA9]
    assert tokenizer.decode(ids) == "a he<|turn>hé"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, (1,))
    assert tokenizer.render_chat([{"role": "user", "content": "he"}]) == "<bos>he"


def test_a_file_without_tokenizer(model: Checkpoint, tmp_path: Path) -> None:
    assert Tokenizer.open(write_gguf(model, tmp_path / "m.gguf", tokenizer=None)) is None


def test_refusals(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="architecture 'llama'"):
        Checkpoint.open(write_gguf(model, tmp_path / "llama.gguf", architecture="llama"))
    file = Checkpoint.open(write_gguf(model, tmp_path / "m.gguf", Type.Q5_0))
    with pytest.raises(UsageError, match="experts 11-11"):
        list(file.experts(0, 11, 12))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedModelError, match="Q5_0") as caught:
        file.matrix("layers.0.mlp.up_proj.weight")
    assert "splitinfer[gguf]" in caught.value.remedy


def test_cut_short(model: Checkpoint, tmp_path: Path) -> None:
    """At every place: one clear error, never another exception."""
    contents = write_gguf(model, tmp_path / "m.gguf", Type.Q4_0).read_bytes()
    file = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 7, 20, 24, 60, 500, 3000, 9000, len(contents) // 2, len(contents) - 40):
        file.write_bytes(contents[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            Checkpoint.open(file)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_headers(model: Checkpoint, tmp_path: Path, seed: int) -> None:
    contents = bytearray(write_gguf(model, tmp_path / "m.gguf", Type.Q4_0).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        at = int(torch.randint(0, 6000, (), generator=generator))
        contents[at] = int(torch.randint(0, 256, (), generator=generator))
    (tmp_path / "m.gguf").write_bytes(contents)
    with suppress(CheckpointError):  # the only one allowed: some bytes do not matter, or mean something else
        Checkpoint.open(tmp_path / "m.gguf")
        Tokenizer.open(tmp_path / "m.gguf")
