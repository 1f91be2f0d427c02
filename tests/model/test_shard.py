from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from splitinfer.errors import CapacityError, CheckpointError, UsageError
from splitinfer.model import sharding
from splitinfer.model.experts import ExpertBank, LocalExperts
from splitinfer.model.gemma import Gemma, Segment
from splitinfer.model.quantize import FORMATS, QuantConfig, quantize
from splitinfer.model.shard import MANIFEST, Manifest, ShardCheckpoint, verify
from splitinfer.model.sharding import UNFINISHED, plan_shard, write_shard
from splitinfer.model.weights import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint

LAYERS, EXPERTS = 4, 11
ALL = QuantConfig(*["int4"] * 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(
        write_checkpoint(tmp_path_factory.mktemp("model") / "m", tiny_config(dtype="bfloat16"))
    )


def shard(model: Checkpoint, path: Path, **options: object) -> Checkpoint:
    write_shard(plan_shard(model, **options), path)  # type: ignore[arg-type]
    return Checkpoint.open(path)


def logits(checkpoint: Checkpoint, quant: QuantConfig | None = None) -> Tensor:
    quant = quant or QuantConfig()
    everything = dict.fromkeys(range(LAYERS), range(EXPERTS))
    experts = LocalExperts(ExpertBank(checkpoint, everything, format=quant.experts))
    model = Gemma.load(checkpoint, experts, quant=quant)
    ids = torch.arange(5, 25)
    return model.logits(asyncio.run(model.forward([Segment(ids, model.new_cache())])))


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_a_shard_computes_what_the_model_computes(
    model: Checkpoint, tmp_path: Path, format: str | None
) -> None:
    """Bit for bit what quantising at load gives; with the model's fingerprint, dtype and configuration."""
    quant = QuantConfig(*[format] * 5)
    whole = shard(model, tmp_path / "s", experts=range(EXPERTS), client=True, quant=quant)
    assert isinstance(whole, ShardCheckpoint)
    assert torch.equal(logits(whole), logits(model, quant))
    assert (whole.fingerprint, whole.dtype, whole.config) == (model.fingerprint, model.dtype, model.config)
    assert len(list(verify(tmp_path / "s"))) == 2 * LAYERS + 1 + len(model.small_files())


def test_parts(model: Checkpoint, tmp_path: Path) -> None:
    """A node's part and a client's part; experts that are no single range."""
    part = shard(model, tmp_path / "n", experts=(9, 2, 3, 10), layers=(1, 3), quant=ALL)
    assert (part.held_layers, part.held_experts) == ((1, 3), (2, 3, 9, 10))
    ((gate_up, down),) = part.experts(3, 9, 10)
    expected = [quantize(t[0], "int4") for t in model.expert_slice(3, 9, 10)]
    for found, wanted in zip((gate_up, down), expected, strict=True):
        assert torch.equal(found.weight, wanted.weight)
        assert found.scales is not None
        assert wanted.scales is not None
        assert torch.equal(found.scales, wanted.scales)
    for layer, lo in ((0, 2), (1, 4)):
        with pytest.raises(UsageError, match=f"does not hold experts {lo}-{lo} of layer {layer}"):
            list(part.experts(layer, lo, lo + 1))
    with pytest.raises(CheckpointError, match=r"shard without norm\.weight") as caught:
        part.tensor("norm.weight")
    assert "--client" in caught.value.remedy
    client = shard(model, tmp_path / "c", client=True, quant=ALL)
    bank = ExpertBank(model, dict.fromkeys(range(LAYERS), range(EXPERTS)))
    assert Gemma.load(client, LocalExperts(bank)).config == model.config
    assert client.held_experts == ()


def test_files_are_plain_safetensors(model: Checkpoint, tmp_path: Path) -> None:
    part = shard(model, tmp_path / "s", experts=(4,), layers=(2,), client=True, quant=ALL)
    found = load_file(tmp_path / "s" / "experts-00002.safetensors")
    assert found["layers.2.experts.down_proj"].dtype == torch.int32
    assert found["layers.2.experts.down_proj.scales"].dtype == torch.float16
    assert torch.equal(found["layers.2.experts.down_proj"], part.tensor("layers.2.experts.down_proj"))
    norms = load_file(tmp_path / "s" / "client-00002.safetensors")
    assert torch.equal(norms["layers.2.layer_scalar"], model.tensor("layers.2.layer_scalar"))


def test_the_plan_says_what_is_written(model: Checkpoint, tmp_path: Path) -> None:
    plan = plan_shard(model, experts=range(5), client=True, quant=ALL)
    assert not list(tmp_path.iterdir())
    seen: list[tuple[str, int]] = []
    write_shard(plan, tmp_path, progress=lambda name, nbytes: seen.append((name, nbytes)))
    assert seen == [(file.name, file.nbytes) for file in plan.files]
    assert all((tmp_path / name).stat().st_size == nbytes for name, nbytes in seen)
    written = sum(file.stat().st_size for file in tmp_path.iterdir() if file.name != MANIFEST)
    assert written == plan.nbytes


def test_a_second_run_goes_on(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_shard(model, experts=range(EXPERTS), quant=ALL)
    original, written = sharding._write_file, []

    def stopped(plan: object, file: object, path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        original(plan, file, path)  # type: ignore[arg-type]

    monkeypatch.setattr(sharding, "_write_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_shard(plan, tmp_path)
    assert (tmp_path / UNFINISHED).is_file()
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path)
    first = [(tmp_path / name).stat().st_mtime_ns for name in written]
    monkeypatch.setattr(sharding, "_write_file", original)
    manifest = write_shard(plan, tmp_path)
    assert [(tmp_path / name).stat().st_mtime_ns for name in written] == first
    assert not (tmp_path / UNFINISHED).exists()
    assert {name for name, _ in verify(tmp_path)} == set(manifest.files)
    assert not list(tmp_path.glob("*.part"))
    assert write_shard(plan, tmp_path) == manifest  # nothing left to do


def test_another_shard_is_not_overwritten(model: Checkpoint, tmp_path: Path) -> None:
    write_shard(plan_shard(model, experts=(1,), quant=ALL), tmp_path)
    with pytest.raises(UsageError, match="holds another shard"):
        write_shard(plan_shard(model, experts=(2,), quant=ALL), tmp_path)


def test_a_damaged_file_is_named(model: Checkpoint, tmp_path: Path) -> None:
    shard(model, tmp_path, experts=range(3), quant=ALL)
    file = tmp_path / "experts-00002.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"experts-00002\.safetensors is damaged"):
        list(verify(tmp_path))
    file.write_bytes(contents[:-1])
    for attempt in (lambda: list(verify(tmp_path)), lambda: Checkpoint.open(tmp_path)):
        with pytest.raises(CheckpointError, match=r"experts-00002\.safetensors has \d+ bytes"):
            attempt()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"experts-00002\.safetensors is missing"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="is not a shard"):
        list(verify(model.path))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"version": 99}, "another version"),
        ({"files": 3}, "not a shard's manifest"),
        ({"experts": ["a"]}, "not a shard's manifest"),
        ({"client": "yes"}, "not a shard's manifest"),
        ({"extra": 1}, "not a shard's manifest"),
        ({"files": {"../config.json": {"nbytes": 3, "blake2b": ""}}}, "names files elsewhere"),
    ],
)
def test_a_damaged_manifest(model: Checkpoint, tmp_path: Path, change: dict[str, object], what: str) -> None:
    shard(model, tmp_path, experts=(1,), quant=ALL)
    table = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**table, **change}))
    with pytest.raises(CheckpointError, match=what):
        Checkpoint.open(tmp_path)


def test_another_format_than_the_shard_has(model: Checkpoint, tmp_path: Path) -> None:
    part = shard(model, tmp_path, experts=range(EXPERTS), client=True, quant=ALL)
    with pytest.raises(UsageError, match="in int4, not in int8"):
        ExpertBank(part, {0: (1,)}, format="int8")
    assert ExpertBank(part, {0: (1,)}, dtype=torch.bfloat16).weight_format == "int4"


def test_what_cannot_be_planned(model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="a shard of nothing"):
        plan_shard(model)
    with pytest.raises(UsageError, match="one tensor"):
        plan_shard(model, client=True, quant=QuantConfig(embeddings="int8", lm_head="int4"))
    plan = plan_shard(model, experts=(1,))
    monkeypatch.setattr("os.statvfs", lambda path: type("Full", (), {"f_bavail": 1, "f_frsize": 512}))
    for directory in (tmp_path, tmp_path / "new"):
        with pytest.raises(CapacityError, match="512 bytes free"):
            write_shard(plan, directory)
    assert tmp_path.exists()
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_meanwhile(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said as what it is; with room again a second run goes on."""
    plan = plan_shard(model, experts=range(EXPERTS), quant=ALL)
    real, written = os.pwrite, []

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        written.append(offset)
        if len(written) == 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(CapacityError, match="no space left on device") as caught:
        write_shard(plan, tmp_path)
    assert "again" in caught.value.remedy
    assert (tmp_path / UNFINISHED).is_file()
    manifest = write_shard(plan, tmp_path)
    assert {name for name, _ in verify(tmp_path)} == set(manifest.files)


def test_a_shard_of_a_shard(model: Checkpoint, tmp_path: Path) -> None:
    """Cut smaller, without a second rounding."""
    whole = shard(model, tmp_path / "a", experts=range(EXPERTS), client=True, quant=ALL)
    part = shard(whole, tmp_path / "b", experts=(7,), client=True)
    assert torch.equal(
        part.tensor("layers.0.experts.gate_up_proj")[0], whole.tensor("layers.0.experts.gate_up_proj")[7]
    )
    assert Manifest.read(tmp_path / "b" / MANIFEST).fingerprint == model.fingerprint


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_a_shard_of_a_slice(model: Checkpoint, tmp_path: Path, format: str | None) -> None:
    """What the slice of the model computes, bit for bit; it knows its part and gives no other."""
    columns, held = (4, 12), {1: range(2, 5)}
    part = shard(model, tmp_path / "s", experts=(2, 3, 4), quant=QuantConfig(format), columns=columns)
    assert part.held_columns == columns
    assert len(list(verify(tmp_path / "s"))) == LAYERS + len(model.small_files())
    x, index = torch.randn(3, model.config.hidden_size), torch.tensor([[2, 3], [3, 4], [4, 2]])
    weights = torch.rand(3, 2)
    expected, found = (
        ExpertBank(checkpoint, held, format=format, columns=columns).forward(1, x, index, weights)
        for checkpoint in (model, part)
    )
    assert torch.equal(found, expected)
    again = shard(part, tmp_path / "again", experts=(2, 3), columns=columns)
    assert again.held_columns == columns
    for other in (None, (4, 8)):
        with pytest.raises(UsageError, match="holds columns 4-11 of every expert, and no others"):
            ExpertBank(part, held, columns=other)


@pytest.mark.parametrize("columns", [[1], [3, 2], [-1, 4], ["0", 4]])
def test_a_manifest_with_columns_that_cannot_be(
    model: Checkpoint, tmp_path: Path, columns: list[object]
) -> None:
    shard(model, tmp_path / "s", experts=(2,), columns=(4, 12))
    file = tmp_path / "s" / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"columns": columns}))
    with pytest.raises(CheckpointError, match="not a shard's manifest"):
        Checkpoint.open(tmp_path / "s")
