"""The matrix kernels in C: built once with the machine's own compiler, called through ctypes.

PyTorch's products of quantised weights are fast on some processors only, its floating-point products let a
row's result depend on the rows beside it, and an operator per expert costs more than the expert's arithmetic.
The kernels here have none of that: a row's bits depend on neither its neighbours nor the number of threads.
Where no compiler is at hand, or `SPLITINFER_KERNELS=torch`, everything runs through PyTorch instead.

They use torch's own OpenMP threads (the library is linked by the name under which torch has loaded it).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitinfer.errors import CapacityError, ConfigError

__all__ = ["DTYPES", "FORMAT_CODES", "Kernels", "Matrix", "RowKernels", "kernels"]

log = logging.getLogger(__name__)

VARIABLE = "SPLITINFER_KERNELS"
SOURCES = ("products.c", "experts.c", "attention.c", "rows.c")
HEADERS = ("vectors.h", "products.h")
# No contraction: the only fused operations are the written ones, so that every tile rounds alike.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared")
BUILD_TIMEOUT = 120.0  # seconds; it takes about five
FORMAT_CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # the enum in products.h
DTYPES = (torch.float32, torch.bfloat16)


class Matrix(ctypes.Structure):
    """`Matrix` of products.h. It does not own its memory: whoever makes one keeps the tensors alive."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class Kernels:
    """The library's functions, for contiguous CPU tensors. Callers check shapes; dtypes are checked here."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.rows = RowKernels(library)
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._product = library.splitinfer_product
        self._product.argtypes = [pointer, integer, pointer, integer, size, pointer, integer, integer]
        self._experts = library.splitinfer_experts
        self._experts.argtypes = [pointer, pointer, size, pointer, integer, size, pointer, pointer, size]
        self._experts.argtypes += [pointer, integer, pointer, integer]
        self._attend = library.splitinfer_attend
        self._attend.argtypes = [pointer, pointer, pointer, pointer, integer, *[size] * 7, integer]

    def product(self, matrices: ctypes.Array[Matrix], x: Tensor, out: Tensor) -> Tensor:
        """x [rows, k] by every matrix, side by side into out [rows, sum of n]; float32 or bfloat16 each."""
        failed = self._product(
            ctypes.addressof(matrices), len(matrices), x.data_ptr(), _bfloat16(x), len(x), out.data_ptr(),
            _bfloat16(out), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise _no_memory(len(x))
        return out

    def experts(
        self,
        gate_up: ctypes.Array[Matrix],
        down: ctypes.Array[Matrix],
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Weighted sum [rows, H] of the experts that index [rows, K] int64 names; weights float32.

        -1 is left out. Raises KeyError, with the expert, for one without a matrix.
        """
        if index.dtype != torch.int64 or weights.dtype != torch.float32:
            raise TypeError(f"top_k_index is {index.dtype}, top_k_weights {weights.dtype}")
        wrong = ctypes.c_int64()
        failed = self._experts(
            ctypes.addressof(gate_up), ctypes.addressof(down), len(gate_up), x.data_ptr(), _bfloat16(x),
            len(x), index.data_ptr(), weights.data_ptr(), index.shape[-1], out.data_ptr(), _bfloat16(out),
            ctypes.addressof(wrong), torch.get_num_threads(),
        )  # fmt: skip
        if failed == -1:
            raise _no_memory(len(x))
        if failed:
            raise KeyError(wrong.value)
        return out

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Causal attention of queries [n, N, D] over keys and values [V, S, D], to [n, N * D].

        The last n of the S keys are the queries' own. Keys and values may be slices along S of one larger
        buffer each, of the same strides.
        """
        rows, heads, size = queries.shape
        kv_heads, seen, _ = keys.shape
        out = torch.empty((rows, heads * size), dtype=queries.dtype)
        if keys.dtype != queries.dtype or values.dtype != queries.dtype or keys.stride() != values.stride():
            raise TypeError(f"queries {queries.dtype}, keys {keys.dtype}, values {values.dtype}")
        queries = queries.contiguous()
        failed = self._attend(
            queries.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            _bfloat16(queries), rows, heads, kv_heads, size, seen, keys.stride(0), window or 0,
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise _no_memory(rows)
        return out


class RowKernels:
    """What happens to contiguous float32 or bfloat16 rows on the CPU between products (rows.c)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
        self._norm = library.splitinfer_norm
        self._norm.argtypes = [pointer, integer, size, size, pointer, real, pointer, integer, integer]
        self._residual = library.splitinfer_residual
        self._residual.argtypes = [
            pointer,
            pointer,
            integer,
            size,
            size,
            pointer,
            real,
            *[pointer] * 7,
            integer,
        ]
        self._combine = library.splitinfer_combine
        self._combine.argtypes = [pointer] * 3 + [integer, size, size, pointer, pointer, real, real, pointer]
        self._combine.argtypes += [integer]
        self._heads = library.splitinfer_heads
        self._heads.argtypes = [pointer, *[size] * 6, pointer, pointer, pointer, real, pointer, pointer]
        self._heads.argtypes += [integer, integer]
        self._gated = library.splitinfer_gated
        self._gated.argtypes = [pointer, size, size, pointer, integer]
        self._choose = library.splitinfer_choose
        self._choose.argtypes = [pointer, size, size, size, pointer, pointer, pointer]

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        """RMS norm [rows, n] times `weight` [n] float32, with one rounding."""
        rows, n = x.shape
        out = torch.empty((rows, n), dtype=out_dtype)
        given = None if weight is None else weight.data_ptr()
        threads = torch.get_num_threads()
        _done(
            self._norm(
                x.data_ptr(), _bfloat16(x), rows, n, given, eps, out.data_ptr(), _bfloat16(out), threads
            )
        )
        return out

    def residual(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        eps: float,
        first: Tensor,
        second: Tensor | None,
        third: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x + norm(y) * weight; that sum's norm times `first`, `second`, and, float32, `third`."""
        rows, n = x.shape
        total, normed, one = torch.empty_like(x), torch.empty((rows, n)), torch.empty_like(x)
        two = None if second is None else torch.empty_like(x)
        _done(
            self._residual(
                x.data_ptr(), y.data_ptr(), _same(x, y), rows, n, weight.data_ptr(), eps, first.data_ptr(),
                None if second is None else second.data_ptr(),
                None if third is None else third.data_ptr(), total.data_ptr(), normed.data_ptr(),
                one.data_ptr(), None if two is None else two.data_ptr(), torch.get_num_threads(),
            )
        )  # fmt: skip
        return total, one, two, normed

    def combine(
        self,
        x: Tensor,
        dense: Tensor,
        moe: Tensor | None,
        moe_weight: Tensor | None,
        weight: Tensor,
        eps: float,
        scalar: float,
    ) -> Tensor:
        """(x + norm(dense + norm(moe) * moe_weight) * weight) * scalar; without moe: norm(dense)."""
        rows, n = x.shape
        out = torch.empty_like(x)
        bfloat16 = _same(x, dense) if moe is None else _same(x, dense, moe)
        _done(
            self._combine(
                x.data_ptr(), dense.data_ptr(), None if moe is None else moe.data_ptr(), bfloat16, rows, n,
                None if moe_weight is None else moe_weight.data_ptr(), weight.data_ptr(), eps, scalar,
                out.data_ptr(), torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def heads(
        self,
        projected: Tensor,
        weight: Tensor,
        values: int,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Projections [rows, heads * D] float32 to normalised queries and keys [rows, N + V, D], turned, and
        values [rows, V, D]. `weight` is [N + V, D]; the last `values` heads are the values, be they keys too.
        """
        rows, width = projected.shape
        turning, size = weight.shape
        turned = torch.empty((rows, turning, size), dtype=dtype)
        value = torch.empty((rows, values, size), dtype=dtype)
        _done(
            self._heads(
                projected.data_ptr(), rows, width, size, turning, width // size - values, values,
                weight.data_ptr(), cos.data_ptr(), sin.data_ptr(), eps, turned.data_ptr(), value.data_ptr(),
                _bfloat16(turned), torch.get_num_threads(),
            )
        )  # fmt: skip
        return turned, value

    def gated(self, x: Tensor) -> Tensor:
        """gelu(first half) * second half of x [rows, 2 * n] float32, to [rows, n]."""
        rows, width = x.shape
        out = torch.empty((rows, width // 2))
        _done(self._gated(x.data_ptr(), rows, width // 2, out.data_ptr(), torch.get_num_threads()))
        return out

    def choose(self, scores: Tensor, k: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest of scores [rows, E] float32, falling, and their softmax times scale [E]."""
        rows, n = scores.shape
        index = torch.empty((rows, k), dtype=torch.int64)
        weights = torch.empty((rows, k))
        self._choose(scores.data_ptr(), rows, n, k, scale.data_ptr(), index.data_ptr(), weights.data_ptr())
        return index, weights


def _done(failed: int) -> None:
    if failed:
        raise _no_memory(1)


def _same(*tensors: Tensor) -> bool:
    """Whether all are bfloat16; raises TypeError where they differ."""
    if len({tensor.dtype for tensor in tensors}) != 1:
        raise TypeError(f"rows of {', '.join(str(tensor.dtype) for tensor in tensors)}")
    return _bfloat16(tensors[0])


def _bfloat16(x: Tensor) -> bool:
    if x.dtype not in DTYPES:
        raise TypeError(f"the kernels compute in float32 or bfloat16, not {x.dtype}")
    return x.dtype is torch.bfloat16


def _no_memory(rows: int) -> CapacityError:
    return CapacityError(f"no memory for a step of {rows} rows", remedy="Give fewer rows at a time.")


@cache
def kernels() -> Kernels | None:
    """The kernels, built on first use; None where they cannot be, with the reason in the log."""
    wanted = os.environ.get(VARIABLE, "").strip() or "auto"
    if wanted not in ("auto", "torch"):
        raise ConfigError(
            f"environment variable {VARIABLE} must be auto or torch, not {wanted!r}", remedy="correct it"
        )
    if wanted == "torch":
        return None
    compiler = shutil.which(os.environ.get("CC", "").strip() or "cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        log.warning("no C compiler: experts run on PyTorch's own products, slower on some processors")
        return None
    try:
        return Kernels(ctypes.CDLL(str(_built(compiler))))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.warning("the kernels could not be built, PyTorch's own products are used: %s", _reason(error))
        return None


def _reason(error: Exception) -> str:
    text: Any = getattr(error, "stderr", None) or str(error)
    return (text.decode(errors="replace") if isinstance(text, bytes) else text).strip().splitlines()[0]


def _built(compiler: str) -> Path:
    """The library for this processor, compiler and source, from the cache or built into it."""
    here = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=12)
    for name in (*SOURCES, *HEADERS):
        digest.update((here / name).read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_TIMEOUT, check=True)
    digest.update(b"\0".join([version.stdout, " ".join(FLAGS).encode(), _processor().encode()]))
    directory = _private_directory()
    library = directory / f"kernels-{digest.hexdigest()}.so"
    if not library.is_file():
        # Built beside its place and renamed: another process sees all of it or nothing.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / "kernels.so"
            _compile(compiler, [here / name for name in SOURCES], made)
            made.replace(library)
    return library


def _compile(compiler: str, sources: Sequence[Path], library: Path) -> None:
    command = [compiler, *FLAGS, "-o", str(library), *map(str, sources), "-lm"]
    subprocess.run(command, capture_output=True, timeout=BUILD_TIMEOUT, check=True)


def _processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = ("flags", "Features", "model name", "cpu family", "model", "CPU part")
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    return "\n".join(first[name] for name in names if name in first)


def _private_directory() -> Path:
    """Where libraries are kept: nobody else may write there, for they are run. Raises OSError otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = Path(base) / "splitinfer"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} belongs to somebody else, or others may write to it")
    return directory
