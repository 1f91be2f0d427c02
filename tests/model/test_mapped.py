from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from splitinfer.errors import CheckpointError
from splitinfer.model.mapped import MappedFile

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.arange(10, dtype=torch.bfloat16).view(2, 5),
    "c": torch.ones(7, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def with_header(path: Path, header: object, body: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return path


def test_reads_what_the_library_wrote(file: Path) -> None:
    mapped = MappedFile(file)
    assert mapped.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert mapped.tensor(name).dtype == tensor.dtype
        assert torch.equal(mapped.tensor(name), tensor)


def test_tensors_are_views_of_one_mapping(file: Path) -> None:
    mapped = MappedFile(file)
    a, b = mapped.tensor("a"), mapped.tensor("b")
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    assert a[1:].untyped_storage().data_ptr() == a.untyped_storage().data_ptr()


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="this system does not tell")
def test_only_touched_pages_become_resident(tmp_path: Path) -> None:
    nbytes = 64 << 20
    save_file({"big": torch.zeros(nbytes // 4)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    mapped = MappedFile(file)

    def resident() -> int:
        """Of this file alone: what else the process takes and gives back does not count."""
        return sum(m.rss for m in psutil.Process().memory_maps() if m.path == str(file))

    assert len(mapped.sample("big", 64, 4)) == 256
    tensor = mapped.tensor("big")
    assert resident() < 4 << 20
    assert tensor[: nbytes // 32].sum() == 0  # an eighth
    assert 7 << 20 < resident() < 12 << 20


def test_a_misaligned_tensor_is_copied(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    raw = json.dumps(header).encode()
    raw += b" " * (-(8 + len(raw)) % 8)
    path = with_header(tmp_path / "f", raw, b"\0" + torch.tensor([1.0, -2.0]).numpy().tobytes())
    assert MappedFile(path).tensor("x").tolist() == [1.0, -2.0]


def test_sample_of_a_small_tensor_is_all_of_it(file: Path) -> None:
    assert MappedFile(file).sample("a", 64, 4) == TENSORS["a"].numpy().tobytes()


@pytest.mark.parametrize("cut", [0, 7, 8, 50, 300, -1])
def test_cut_short(file: Path, cut: int) -> None:
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError) as caught:
        MappedFile(file)
    assert str(file) in str(caught.value)
    assert "again" in caught.value.remedy


def test_cut_short_names_the_tensor(file: Path) -> None:
    last = max((e.begin, n) for n, e in MappedFile(file).entries.items() if e.end > e.begin)[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"cut short: .* tensor {last} is not all there"):
        MappedFile(file)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[" * 100_000,
        [1],
        {"x": 1},
        {"x": {}},
        {"x": ENTRY | {"dtype": 3}},
        {"x": ENTRY | {"dtype": "F7"}},
        {"x": ENTRY | {"shape": [-2]}},
        {"x": ENTRY | {"shape": [True, 2]}},
        {"x": ENTRY | {"shape": "2"}},
        {"x": ENTRY | {"shape": [1] * 9 + [2]}},
        {"x": ENTRY | {"shape": [1 << 61, 1 << 61]}},
        {"x": ENTRY | {"data_offsets": [8, 0]}},
        {"x": ENTRY | {"data_offsets": [0, 7]}},
        {"x": ENTRY | {"data_offsets": [0]}},
        {"x": ENTRY | {"data_offsets": [-8, 0]}},
        {"x": ENTRY | {"data_offsets": [1 << 60, (1 << 60) + 8]}},
    ],
    ids=lambda header: str(header)[:60],
)
def test_contradictory_headers(tmp_path: Path, header: object) -> None:
    with pytest.raises(CheckpointError, match="file"):
        MappedFile(with_header(tmp_path / "file", header, b"\0" * 8))


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        MappedFile(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="directory"):
        MappedFile(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 60), st.binary(max_size=20))
def test_no_bytes_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int, patch: bytes
) -> None:
    """Random files, and a good file with random bytes in its header: read, or refused in one way."""
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    good = with_header(path, {"x": ENTRY}, b"\0" * 8).read_bytes()
    for raw in (noise, good[:at] + patch + good[at + len(patch) :]):
        path.write_bytes(raw)
        with suppress(CheckpointError):
            MappedFile(path)
