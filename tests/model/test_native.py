from __future__ import annotations

import logging
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitinfer.errors import ConfigError
from splitinfer.model import native
from splitinfer.model.cache import Held
from splitinfer.model.native import Kernels, kernels

BUILT = kernels()
needs_kernels = pytest.mark.skipif(BUILT is None, reason="the kernels could not be built here")


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and nothing remembered."""
    monkeypatch.setattr(native, "kernels", kernels.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    return tmp_path / "splitinfer"


def failing(*args: object, **kwargs: object) -> None:
    raise subprocess.CalledProcessError(1, "cc", stderr=b"products.c:1: error: no such processor\nmore")


def test_torch_by_request(monkeypatch: pytest.MonkeyPatch, unbuilt: Path) -> None:
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert native.kernels() is None
    monkeypatch.setenv(native.VARIABLE, "fast")
    with pytest.raises(ConfigError, match="SPLITINFER_KERNELS must be auto or torch"):
        native.kernels()


@needs_kernels
def test_built_once(monkeypatch: pytest.MonkeyPatch, unbuilt: Path) -> None:
    assert isinstance(native.kernels(), Kernels)
    (library,) = unbuilt.iterdir()
    assert library.name.startswith("kernels-")
    monkeypatch.setattr(native, "_compile", failing)
    assert isinstance(native.kernels(), Kernels)


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, unbuilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.WARNING):
        assert native.kernels() is None
    assert "no C compiler" in caplog.text


@needs_kernels
def test_a_failed_build_is_named(
    monkeypatch: pytest.MonkeyPatch, unbuilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_compile", failing)
    with caplog.at_level(logging.WARNING):
        assert native.kernels() is None
    assert "products.c:1: error: no such processor" in caplog.text
    assert not list(unbuilt.iterdir())


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built is a copy of what was built before: the compiler takes ten seconds."""
    assert BUILT is not None
    source = BUILT.library._name

    def copy(compiler: str, library: Path) -> Path:
        return Path(shutil.copy(source, library))

    monkeypatch.setattr(native, "_compile", copy)


@needs_kernels
def test_a_cache_that_others_may_write_to_is_not_used(
    unbuilt: Path, copied: None, caplog: pytest.LogCaptureFixture
) -> None:
    unbuilt.mkdir()
    unbuilt.chmod(0o777)
    assert isinstance(native.kernels(), Kernels)
    assert not list(unbuilt.iterdir())
    assert "built anew by every process" in caplog.text
    assert "others may write" in caplog.text


@needs_kernels
def test_where_nothing_can_be_kept(unbuilt: Path, copied: None, caplog: pytest.LogCaptureFixture) -> None:
    unbuilt.write_bytes(b"")  # in the folder's place
    assert isinstance(native.kernels(), Kernels)
    assert "built anew by every process (XDG_CACHE_HOME may help)" in caplog.text


@needs_kernels
def test_a_damaged_library_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, unbuilt: Path, copied: None, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = native._compile

    def damaged(compiler: str, library: Path) -> Path:
        if unbuilt not in library.parents:
            return compiled(compiler, library)
        library.write_bytes(b"\x7fELF")
        return library

    monkeypatch.setattr(native, "_compile", damaged)
    assert isinstance(native.kernels(), Kernels)
    (library,) = unbuilt.iterdir()
    assert str(library) in caplog.text


def attention(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    n, heads, _ = queries.shape
    kv_heads, seen, _ = keys.shape
    own, other = torch.arange(seen - n, seen).unsqueeze(1), torch.arange(seen)
    mask = other <= own
    if window is not None:
        mask &= other > own - window
    keys, values = (t.double().repeat_interleave(heads // kv_heads, 0) for t in (keys, values))
    found = F.scaled_dot_product_attention(
        queries.double().transpose(0, 1), keys, values, attn_mask=mask, scale=1.0
    )
    return found.transpose(0, 1).flatten(1)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5, 6, 8, 9]),
    size=st.sampled_from([6, 8, 16, 24, 80]),
    rows=st.integers(1, 9),
    before=st.sampled_from([0, 1, 5, 63, 64, 130]),
    window=st.sampled_from([None, 1, 4, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention(
    kv_heads: int, group: int, size: int, rows: int, before: int, window: int | None, dtype: torch.dtype
) -> None:
    """Equal to PyTorch's, and a row's bits are the same alone and beside others."""
    assert BUILT is not None
    generator = torch.Generator().manual_seed(rows * before + size)
    seen = before + rows
    queries = torch.randn(rows, kv_heads * group, size, generator=generator).to(dtype)
    keys, values = (
        torch.randn(kv_heads, seen + 7, size, generator=generator).to(dtype)[:, 3 : 3 + seen]
        for _ in range(2)
    )
    found = BUILT.attend(queries, keys, values, window=window)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(
        found.double(), attention(queries, keys, values, window), atol=tolerance, rtol=tolerance
    )
    for row in range(rows):
        end = before + row + 1
        lo = max(0, end - window) if window else 0
        alone = BUILT.attend(queries[row : row + 1], keys[:, lo:end], values[:, lo:end], window=window)
        assert torch.equal(alone[0], found[row])


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 5, 8]),
    size=st.sampled_from([6, 16, 80]),
    rows=st.integers(1, 9),
    before=st.sampled_from([0, 1, 63, 130]),
    window=st.sampled_from([None, 1, 70]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_over_int8(
    kv_heads: int, group: int, size: int, rows: int, before: int, window: int | None, dtype: torch.dtype
) -> None:
    """As over the same keys and values widened, and a row's bits are the same alone and beside others."""
    assert BUILT is not None
    generator = torch.Generator().manual_seed(rows * before + size)
    seen = before + rows
    queries = torch.randn(rows, kv_heads * group, size, generator=generator).to(dtype)
    codes = torch.randint(-127, 128, (2, kv_heads, seen + 7, size), generator=generator).to(torch.int8)
    scales = torch.rand(2, kv_heads, seen + 7, generator=generator).div(60).half()
    held = Held(codes[0], codes[1], scales[0], scales[1]).part(3, 3 + seen)
    found = BUILT.attend(queries, *held, window=window)
    expected = attention(queries, *held.widened(torch.float32), window)
    tolerance = 2**-9 if dtype == torch.float32 else 2**-7  # queries become 16-bit integers for int8 keys
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    for row in range(rows):
        end = before + row + 1
        lo = max(0, end - window) if window else 0
        alone = BUILT.attend(queries[row : row + 1], *held.part(lo, end), window=window)
        assert torch.equal(alone[0], found[row])


@needs_kernels
def test_dtypes_are_checked() -> None:
    assert BUILT is not None
    x = torch.ones(1, 1, 8)
    with pytest.raises(TypeError, match="bfloat16"):
        BUILT.attend(x, x.bfloat16(), x.bfloat16(), window=None)
    with pytest.raises(TypeError, match="int8"):
        BUILT.attend(x, x.to(torch.int8), x.to(torch.int8), window=None)
    with pytest.raises(TypeError, match="scales"):
        BUILT.attend(x, x.to(torch.int8), x.to(torch.int8), x[0], x[0], window=None)
    with pytest.raises(TypeError, match="float64"):
        BUILT.attend(x.double(), x.double(), x.double(), window=None)
