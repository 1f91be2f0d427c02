from __future__ import annotations

import contextlib
import time

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitinfer.errors import RemoteProtocolError, UsageError
from splitinfer.transport.compression import (
    BLOCK_NBYTES,
    LZ4,
    LZ4_PLANES,
    MIN_NBYTES,
    Compressor,
    Encoded,
    compress,
    decompress,
)


def activations(rows: int, columns: int = 2816, seed: int = 0) -> npt.NDArray[np.uint16]:
    """Normal rows in bfloat16, as uint16: what an expert call carries."""
    normal = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    return (normal.view(np.uint32) >> 16).astype(np.uint16)


def noise(nbytes: int, seed: int = 0) -> memoryview:
    return memoryview(np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8))


def raw(array: npt.NDArray[np.generic]) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def undo(encoded: Encoded, nbytes: int, itemsize: int) -> bytes:
    out = bytearray(nbytes)
    decompress(memoryview(b"".join(encoded.parts)), memoryview(out), itemsize, encoded.codec)
    return bytes(out)


@pytest.mark.parametrize("codec", [LZ4, LZ4_PLANES])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("items", [1, 7, 1024, BLOCK_NBYTES // 4, BLOCK_NBYTES // 2 + 3, BLOCK_NBYTES])
def test_round_trip_of_every_size(codec: int, itemsize: int, items: int) -> None:
    data = np.arange(items * itemsize, dtype=np.uint8)
    encoded = compress(raw(data), itemsize, codec, max_nbytes=1 << 30)
    assert encoded is not None
    assert encoded.nbytes == sum(part.nbytes for part in encoded.parts)
    assert undo(encoded, data.nbytes, itemsize) == data.tobytes()


@given(data=st.binary(max_size=4096), itemsize=st.sampled_from([1, 2, 4, 8]), planes=st.booleans())
@settings(max_examples=200, deadline=None)
def test_round_trip_of_anything(data: bytes, itemsize: int, planes: bool) -> None:
    whole = memoryview(data)[: len(data) // itemsize * itemsize]
    codec = LZ4_PLANES if planes and itemsize > 1 else LZ4
    encoded = compress(whole, itemsize, codec, max_nbytes=1 << 30)
    if encoded is None:
        assert not whole.nbytes
    else:
        assert undo(encoded, whole.nbytes, itemsize) == bytes(whole)


def test_planes_shrink_activations_and_plain_lz4_does_not() -> None:
    data = raw(activations(128))
    planes, plain = compress(data, 2, LZ4_PLANES), compress(data, 2, LZ4)
    assert planes is not None
    assert planes.nbytes < 0.88 * data.nbytes
    assert plain is None or plain.nbytes > 0.97 * data.nbytes


def test_stored_runs_are_the_callers_own_memory() -> None:
    data = noise(BLOCK_NBYTES)
    encoded = compress(data, 1, LZ4, max_nbytes=1 << 30)
    assert encoded is not None
    address = np.frombuffer(encoded.parts[1], np.uint8).ctypes.data
    assert address == np.frombuffer(data, np.uint8).ctypes.data


def test_noise_never_grows() -> None:
    for itemsize, codec in ((1, LZ4), (2, LZ4_PLANES), (4, LZ4_PLANES)):
        assert compress(noise(3 * BLOCK_NBYTES + 8), itemsize, codec) is None


@pytest.mark.parametrize("mode", ["on", "auto"])
@given(seed=st.integers(0, 1 << 16), nbytes=st.integers(0, 40_000), distinct=st.integers(1, 256))
@settings(max_examples=60, deadline=None)
def test_never_more_bytes_than_raw(mode: str, seed: int, nbytes: int, distinct: int) -> None:
    data = memoryview(np.random.default_rng(seed).integers(0, distinct, nbytes, dtype=np.uint8))
    compressor = Compressor(mode, link_rate=1e6)  # type: ignore[arg-type]
    encoded = compressor.encode(data, 1)
    if encoded is not None:
        assert encoded.nbytes < nbytes
        assert undo(encoded, nbytes, 1) == bytes(data)


def test_off_loopback_and_small_tensors_stay_raw() -> None:
    zeros = memoryview(bytes(1 << 20))
    assert Compressor("off").encode(zeros, 2) is None
    assert Compressor("auto", loopback=True).encode(zeros, 2) is None
    assert not Compressor("auto", loopback=True).active
    assert Compressor("on", loopback=True).encode(zeros, 2) is not None
    assert Compressor("on").encode(zeros[: MIN_NBYTES - 1], 2) is None


def test_unknown_mode_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="zip"):
        Compressor("zip")  # type: ignore[arg-type]


class SteppedClock:
    """Every look costs `step` seconds: attempts have a price that does not depend on the machine."""

    def __init__(self, step: float) -> None:
        self.now, self.step, self.looks = 0.0, step, 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += self.step
        return self.now


def test_auto_weighs_the_link() -> None:
    data = raw(activations(256))
    slow = Compressor("auto", link_rate=100e6 / 8, clock=SteppedClock(60e-6)).encode(data, 2)
    fast = Compressor("auto", link_rate=10e9 / 8, clock=SteppedClock(60e-6)).encode(data, 2)
    assert slow is not None
    assert slow.codec == LZ4_PLANES
    assert fast is None


def test_auto_compresses_padding_on_a_link_nobody_measured() -> None:
    encoded = Compressor("auto", clock=SteppedClock(60e-6)).encode(memoryview(bytes(1 << 20)), 2)
    assert encoded is not None
    assert encoded.nbytes < 8192


@pytest.mark.parametrize("rate", [12.5e6, 1.25e9, 10e9])
@pytest.mark.parametrize("nbytes", [1 << 14, 1 << 20, 1 << 24])
def test_attempts_in_vain_stay_within_their_share(rate: float, nbytes: int) -> None:
    clock = SteppedClock(60e-6)
    compressor = Compressor("auto", link_rate=rate, clock=clock)
    data = noise(nbytes)
    count = 3000 if nbytes < 1 << 20 else 200
    for _ in range(count):
        assert compressor.encode(data, 2) is None
    spent = clock.looks / 2 * clock.step
    assert spent <= 0.05 * count * nbytes / rate + 120e-6  # the first attempt is on credit


def test_auto_tries_again_when_the_data_changes() -> None:
    compressor = Compressor("auto", link_rate=12.5e6, clock=SteppedClock(60e-6))
    for _ in range(50):
        compressor.encode(noise(1 << 20), 2)
    zeros = memoryview(bytes(1 << 20))
    assert any(compressor.encode(zeros, 2) is not None for _ in range(3))


@pytest.mark.slow
def test_auto_costs_under_five_percent_of_a_fast_link_by_the_clock() -> None:
    """Real clock, real noise: 4 GB in tensors of 1 MiB against the time a 2 GB/s link takes for them."""
    compressor, data = Compressor("auto"), noise(1 << 20)
    start = time.perf_counter()
    for _ in range(4000):
        compressor.encode(data, 2)
    assert time.perf_counter() - start < 0.05 * 4000 * (1 << 20) / 2e9


def encoded_activations() -> tuple[bytearray, int]:
    data = raw(activations(64))
    encoded = compress(data, 2, LZ4_PLANES)
    assert encoded is not None
    return bytearray(b"".join(encoded.parts)), data.nbytes


def test_every_cut_is_refused() -> None:
    whole, nbytes = encoded_activations()
    out = memoryview(bytearray(nbytes))
    for length in [*range(12), len(whole) // 2, len(whole) - 1]:
        with pytest.raises(RemoteProtocolError):
            decompress(memoryview(whole)[:length], out, 2, LZ4_PLANES)
    with pytest.raises(RemoteProtocolError, match="too many"):
        decompress(memoryview(whole + b"\0"), out, 2, LZ4_PLANES)


def test_the_shape_decides_the_size_not_the_peer() -> None:
    whole, nbytes = encoded_activations()
    for wrong in (nbytes - 2, nbytes + 2, 2, 2 * BLOCK_NBYTES):
        with pytest.raises(RemoteProtocolError):
            decompress(memoryview(whole), memoryview(bytearray(wrong)), 2, LZ4_PLANES)


def test_a_run_that_claims_more_than_its_block_is_refused_before_lz4_sees_it() -> None:
    bomb = (1 << 30).to_bytes(4, "little") + bytes(64)
    with pytest.raises(RemoteProtocolError, match="claims"):
        decompress(memoryview(bomb), memoryview(bytearray(64)), 1, LZ4)


def test_an_expanding_lz4_block_is_stopped_at_the_run() -> None:
    compressed = compress(memoryview(bytes(BLOCK_NBYTES)), 1, LZ4)
    assert compressed is not None
    with pytest.raises(RemoteProtocolError):
        decompress(memoryview(b"".join(compressed.parts)), memoryview(bytearray(2048)), 1, LZ4)


@pytest.mark.parametrize(("codec", "itemsize"), [(0, 2), (3, 2), (LZ4_PLANES, 1), (LZ4_PLANES, 3)])
def test_unknown_codecs_are_refused(codec: int, itemsize: int) -> None:
    with pytest.raises(RemoteProtocolError, match="codec"):
        decompress(memoryview(b""), memoryview(bytearray(6)), itemsize, codec)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_damage_is_refused_or_gives_bytes_of_the_right_size(data: st.DataObject) -> None:
    whole, nbytes = encoded_activations()
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    out = bytearray(nbytes)
    with contextlib.suppress(RemoteProtocolError):
        decompress(memoryview(whole), memoryview(out), 2, LZ4_PLANES)
    assert len(out) == nbytes
