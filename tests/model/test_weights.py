from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from splitinfer.errors import CheckpointError, UnsupportedModelError, UsageError
from splitinfer.model.weights import Checkpoint, canonical_name, expected_tensors
from tests.checkpoints import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made") / "model", shards=3)


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "model")


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors of a one-file checkpoint."""
    tensors: dict[str, Any] = load_file(path / "model.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["text", "multimodal"])
@pytest.mark.parametrize("spelling", ["published", "transformers"])
def test_every_layout_gives_the_same_tensors(
    made: Path, tmp_path: Path, shards: int, layout: str, spelling: str
) -> None:
    path = write_checkpoint(tmp_path / "m", shards=shards, layout=layout, spelling=spelling)
    checkpoint, reference = Checkpoint.open(path), Checkpoint.open(made)
    for name, shape in expected_tensors(checkpoint.config):
        assert checkpoint.tensor(name).shape == shape
        assert torch.equal(checkpoint.tensor(name), reference.tensor(name))
    assert checkpoint.fingerprint == reference.fingerprint
    assert checkpoint.dtype == torch.float32


def test_expert_slice_is_a_view(made: Path) -> None:
    checkpoint = Checkpoint.open(made)
    gate_up, down = checkpoint.expert_slice(2, 3, 7)
    assert (gate_up.shape, down.shape) == ((4, 40, 48), (4, 48, 20))
    whole = checkpoint.tensor("layers.2.experts.gate_up_proj")
    assert torch.equal(gate_up, whole[3:7])
    assert gate_up.data_ptr() == whole[3].data_ptr()


@pytest.mark.parametrize(("layer", "lo", "hi"), [(-1, 0, 1), (4, 0, 1), (0, 5, 5), (0, 7, 3), (0, 0, 12)])
def test_expert_slice_out_of_bounds(made: Path, layer: int, lo: int, hi: int) -> None:
    with pytest.raises(UsageError, match="4 layers of 11 experts"):
        Checkpoint.open(made).expert_slice(layer, lo, hi)


def test_opening_and_fingerprinting_read_almost_nothing(tmp_path: Path) -> None:
    config = tiny_config(num_experts=64, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=4)
    path = write_checkpoint(tmp_path / "model", config)
    expert_nbytes = 64 * 3 * 256 * 256 * 4 * 4
    before = psutil.Process().memory_info().rss
    checkpoint = Checkpoint.open(path)
    assert len(checkpoint.fingerprint) == 32
    checkpoint.expert_slice(0, 0, 64)
    assert psutil.Process().memory_info().rss - before < expert_nbytes / 20


def test_fingerprint_tells_models_apart(tmp_path: Path, made: Path) -> None:
    prints = {Checkpoint.open(made).fingerprint}
    for i, (overrides, seed) in enumerate(
        [({}, 1), ({"sliding_window": 9}, 0), ({"rms_norm_eps": 1e-5}, 0), ({"dtype": "bfloat16"}, 0)]
    ):
        path = write_checkpoint(tmp_path / str(i), tiny_config(**overrides), seed=seed)
        prints.add(Checkpoint.open(path).fingerprint)
    assert len(prints) == 5


def test_towers_are_left_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    before = Checkpoint.open(path).fingerprint
    edit(path, **{"model.vision_tower.encoder.layers.0.x": torch.zeros(3, dtype=torch.int8)})
    edit(path, **{"model.embed_vision.embedding_projection.weight": torch.zeros(3)})
    assert Checkpoint.open(path).fingerprint == before


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.language_model.layers.0.x", "layers.0.x"),
        ("language_model.model.norm.weight", "norm.weight"),
        ("model.norm.weight", "norm.weight"),
        ("norm.weight", "norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.audio_tower.x", None),
        ("vision_tower.x", None),
        ("model.rotary_emb.inv_freq", None),
    ],
)
def test_canonical_name(stored: str, name: str | None) -> None:
    assert canonical_name(stored) == name


def test_tied_head_in_the_file_is_ignored(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    edit(path, **{"lm_head.weight": torch.zeros(131, 48)})
    assert Checkpoint.open(path).config.tie_word_embeddings


PREFIX = "model.language_model."


@pytest.mark.parametrize(
    ("name", "tensor", "kind", "text"),
    [
        ("layers.1.router.scale", None, CheckpointError, "layers.1.router.scale is missing"),
        ("norm.weight", torch.zeros(47), CheckpointError, r"norm.weight has shape \[47\], .* \[48\]"),
        (
            "layers.3.experts.down_proj",
            torch.zeros(11, 20, 48),
            CheckpointError,
            r"down_proj has shape \[11, 20, 48\]",
        ),
        ("layers.0.self_attn.q_proj.bias", torch.zeros(48), UnsupportedModelError, "q_proj.bias"),
        ("layers.3.self_attn.v_proj.weight", torch.zeros(16, 48), UnsupportedModelError, "v_proj"),
        ("layers.4.layer_scalar", torch.zeros(1), UnsupportedModelError, "layers.4.layer_scalar"),
        ("layers.0.experts.0.gate_proj.weight", torch.zeros(1), UnsupportedModelError, "experts.0.gate_proj"),
        ("norm.weight", torch.zeros(48, dtype=torch.int8), UnsupportedModelError, "dtype I8"),
        ("norm.weight", torch.zeros(48, dtype=torch.float64), UnsupportedModelError, "dtype F64"),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, kind: type[CheckpointError], text: str
) -> None:
    path = write_checkpoint(tmp_path / "model")
    edit(path, **{PREFIX + name: tensor})
    with pytest.raises(CheckpointError, match=text) as caught:
        Checkpoint.open(path)
    assert type(caught.value) is kind
    assert caught.value.remedy


def test_missing_shard_file(model: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of them missing: model-00002-of-00003\.safetensors"):
        Checkpoint.open(model)


def test_truncated_shard_file(model: Path) -> None:
    file = model / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=r"00003\.safetensors: cut short: .* tensor model\.language_model"
    ):
        Checkpoint.open(model)


@pytest.mark.parametrize("file", ["../model-00001-of-00003.safetensors", "/etc/passwd", "..", ""])
def test_an_index_may_not_lead_out_of_its_directory(model: Path, file: str) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open(model)


def test_an_index_that_disagrees_with_its_files(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.language_model.norm.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"norm\.weight, though"):
        Checkpoint.open(model)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        Checkpoint.open(model)


def test_no_weights(model: Path) -> None:
    for file in model.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        Checkpoint.open(model)
    (model / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(model)
    assert "pickle" in caught.value.remedy


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "file")


def test_unknown_tensor_name(made: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor nonsense"):
        Checkpoint.open(made).tensor("nonsense")
