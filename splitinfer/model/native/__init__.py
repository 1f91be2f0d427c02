"""The matrix kernels in C: built once with the machine's own compiler, called through ctypes.

PyTorch's products of quantised weights are fast on some processors only, its floating-point products let a
row's result depend on the rows beside it, and an operator per expert costs more than the expert's arithmetic.
The kernels here have none of that: a row's bits depend on neither its neighbours nor the number of threads.
Where no compiler is at hand, or `SPLITINFER_KERNELS=torch`, everything runs through PyTorch instead.

They have threads of their own, as many as torch would use (`torch.set_num_threads`): see team.c.
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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitinfer.errors import CapacityError, ConfigError

__all__ = [
    "DTYPES",
    "FIXED_SUM",
    "FORMAT_CODES",
    "MOST_ANSWERS",
    "Answer",
    "Expected",
    "Frame",
    "Kernels",
    "Matrix",
    "Request",
    "address_of",
    "arithmetic",
    "is_bfloat16",
    "kernels",
    "no_memory",
    "row_invariant",
]

log = logging.getLogger(__name__)

VARIABLE = "SPLITINFER_KERNELS"
TORCH = "torch"  # what `arithmetic` begins with where there are no kernels
SOURCES = (
    "team.c",
    "products.c",
    "floats.c",
    "integers.c",
    "experts.c",
    "exact.c",
    "frames.c",
    "attention.c",
    "rows.c",
    "stretches.c",
    "mlp.c",
)
HEADERS = ("team.h", "vectors.h", "products.h", "widen.h", "rows.h", "mlp.h", "frames.h")
# No contraction: the only fused operations are the written ones, so that every tile rounds alike.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-ffp-contract=off",
    "-pthread",
    "-fPIC",
    "-shared",
    "-Wl,-Bsymbolic",
)
BUILD_TIMEOUT = 120.0  # seconds; it takes about five
FORMAT_CODES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # the enum in products.h
DTYPES = (torch.float32, torch.bfloat16)
MOST_ANSWERS = 16  # of frames.h
FIXED_SUM = 2  # SUM_FIXED in experts.c


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


class Frame(ctypes.Structure):
    """`Frame` of frames.h."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("nbytes", ctypes.c_int64),
        ("file", ctypes.c_int32),
        ("sent", ctypes.c_int32),
    )

    @classmethod
    def of(cls, data: memoryview) -> Frame:
        """A message that lies there, to be sent nowhere yet."""
        return cls(address_of(data), data.nbytes, -1, 0)


class Request(ctypes.Structure):
    """`Request` of frames.h."""

    _fields_ = (
        ("frame", Frame),
        ("x", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("asked", ctypes.c_void_p),
        ("needed", ctypes.c_int64),
    )


class Answer(ctypes.Structure):
    """`Answer` of frames.h."""

    _fields_ = (("frame", Frame), ("took", ctypes.c_void_p))


class Expected(ctypes.Structure):
    """`Expected` of frames.h."""

    _fields_ = (
        ("pattern", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("nbytes", "number", "body")),
        ("room", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("file", ctypes.c_int32),
        ("received", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("awake", "took", "seen")),
    )


class Kernels:
    """The library's functions, for contiguous CPU tensors. Callers check shapes; dtypes are checked here."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.splitinfer_vectors.restype = ctypes.c_char_p
        self.vectors: str = library.splitinfer_vectors().decode()
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._product = library.splitinfer_product
        self._product.argtypes = [pointer, integer, pointer, integer, size, pointer, integer, integer]
        self._experts = library.splitinfer_experts
        self._experts.argtypes = [pointer, pointer, size, pointer, integer, size, pointer, pointer, size]
        self._experts.argtypes += [pointer, integer, pointer, pointer, integer]
        self._send = library.splitinfer_request_send
        self._send.argtypes = [pointer, pointer, size, pointer, pointer, size]
        self._send.restype = None
        self._read = library.splitinfer_answers_read
        self._read.argtypes = [pointer, integer, size]
        self._attend = library.splitinfer_attend
        self._attend.argtypes = [*[pointer] * 6, integer, *[size] * 8, integer]

    def product(self, matrices: ctypes.Array[Matrix], x: Tensor, out: Tensor) -> Tensor:
        """x [rows, k] by every matrix, side by side into out [rows, sum of n]; float32 or bfloat16 each."""
        failed = self._product(
            ctypes.addressof(matrices), len(matrices), x.data_ptr(), is_bfloat16(x), x.shape[0],
            out.data_ptr(), is_bfloat16(out), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise no_memory(len(x))
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
        """Weighted sum [rows, H] of the experts that index [rows, K] int16 names; weights float32.

        `out` is float32, bfloat16, or int64 for fixed point (see `model.exact`). -1 is left out. Raises
        KeyError, with the expert, for one without a matrix, and OverflowError for a fixed sum out of range.
        """
        if index.dtype != torch.int16 or weights.dtype != torch.float32:
            raise TypeError(f"top_k_index is {index.dtype}, top_k_weights {weights.dtype}")
        kind = FIXED_SUM if out.dtype is torch.int64 else int(is_bfloat16(out))
        self.experts_at(
            gate_up, down, x.data_ptr(), is_bfloat16(x), x.shape[0], index.data_ptr(), weights.data_ptr(),
            index.shape[-1], out.data_ptr(), kind,
        )  # fmt: skip
        return out

    def experts_at(
        self,
        gate_up: ctypes.Array[Matrix],
        down: ctypes.Array[Matrix],
        x: int,
        bfloat16: bool,
        rows: int,
        index: int,
        weights: int,
        k: int,
        out: int,
        out_kind: int,
        answer: Answer | None = None,
    ) -> None:
        """`experts` of what lies at addresses; `out_kind` is 0 for float32, 1 for bfloat16, or FIXED_SUM. An
        `answer`, in whose frame `out` lies, goes on its way."""
        wrong = ctypes.c_int64()
        failed = self._experts(
            ctypes.addressof(gate_up), ctypes.addressof(down), len(gate_up), x, bfloat16, rows, index,
            weights, k, out, out_kind, ctypes.addressof(wrong),
            None if answer is None else ctypes.addressof(answer), torch.get_num_threads(),
        )  # fmt: skip
        if failed == -1:
            raise no_memory(rows)
        if failed == 2:
            raise OverflowError
        if failed:
            raise KeyError(wrong.value)

    def send(self, requests: ctypes.Array[Request], x: Tensor, index: Tensor, weights: Tensor) -> None:
        """Fill requests with rows and their experts, and send them, as a layer does after its attention."""
        for request in requests:
            self._send(
                ctypes.addressof(request), x.data_ptr(), x.nbytes, index.data_ptr(), weights.data_ptr(),
                index.numel(),
            )  # fmt: skip

    def read(self, expected: ctypes.Array[Expected], patience: int) -> bool:
        """Wait for answers, so many nanoseconds for each; whether all have come, as expected."""
        before, left = len(expected) + 1, len(expected)
        while 0 < left < before:
            before, left = left, int(self._read(ctypes.addressof(expected), len(expected), patience))
        return left == 0

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
        *,
        window: int | None,
    ) -> Tensor:
        """Causal attention of queries [n, N, D] over keys and values [V, S, D], to [n, N * D].

        The last n of the S keys are the queries' own. Keys and values are of the queries' dtype, or int8 with
        scales [V, S] float16. They may be slices along S of larger buffers, alike in strides.
        """
        rows, heads, size = queries.shape
        kv_heads, seen, _ = keys.shape
        out = torch.empty((rows, heads * size), dtype=queries.dtype)
        stored = queries.dtype if key_scales is None else torch.int8
        if {keys.dtype, values.dtype} != {stored} or keys.stride() != values.stride():
            raise TypeError(f"queries {queries.dtype}, keys {keys.dtype}, values {values.dtype}")
        scales: tuple[int, int] | tuple[None, None] = (None, None)
        stride = 0
        if key_scales is not None and value_scales is not None:
            if {key_scales.dtype, value_scales.dtype} != {torch.float16}:
                raise TypeError(f"scales {key_scales.dtype} and {value_scales.dtype}")
            scales, stride = (key_scales.data_ptr(), value_scales.data_ptr()), key_scales.stride(0)
        queries = queries.contiguous()
        failed = self._attend(
            queries.data_ptr(), keys.data_ptr(), values.data_ptr(), *scales, out.data_ptr(),
            is_bfloat16(queries), rows, heads, kv_heads, size, seen, keys.stride(0), stride, window or 0,
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise no_memory(rows)
        return out


def address_of(buffer: Any) -> int:
    """Where the bytes of a writable, contiguous, not empty buffer lie."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def is_bfloat16(x: Tensor) -> bool:
    """The kernels' flag. Raises TypeError for what is neither bfloat16 nor float32."""
    if x.dtype not in DTYPES:
        raise TypeError(f"the kernels compute in float32 or bfloat16, not {x.dtype}")
    return x.dtype is torch.bfloat16


def no_memory(rows: int) -> CapacityError:
    return CapacityError(f"no memory for a step of {rows} rows", remedy="Give fewer rows at a time.")


@cache
def kernels() -> Kernels | None:
    """The kernels, built on first use; None where they cannot be, with the reason in the log."""
    wanted = os.environ.get(VARIABLE, "").strip() or "auto"
    if wanted not in ("auto", "torch"):
        raise ConfigError(
            f"environment variable {VARIABLE} must be auto or torch, not {wanted!r}", remedy="Correct it."
        )
    if wanted == "torch":
        return None
    compiler = shutil.which(os.environ.get("CC", "").strip() or "cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        log.warning("no C compiler: experts run on PyTorch's own products, slower on some processors")
        return None
    try:
        return Kernels(_library(compiler))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        log.warning("the kernels could not be built, PyTorch's own products are used: %s", _reason(error))
        return None


@cache
def arithmetic() -> str:
    """How this machine rounds: where this is the same, the same experts give the same bits."""
    built = kernels()
    if built is None:
        return f"{TORCH} {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
    return f"c {_source_digest().hexdigest()[:8]} {built.vectors}"


def row_invariant(arithmetic: str) -> bool:
    """Whether a machine that rounds so gives a row the same bits whatever rows are beside it. PyTorch's
    products do not; a machine that does not say is not trusted to."""
    return bool(arithmetic) and not arithmetic.startswith(TORCH)


def _source_digest() -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=12)
    for name in (*SOURCES, *HEADERS):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest


def _reason(error: Exception) -> str:
    text: Any = getattr(error, "stderr", None) or str(error)
    return (text.decode(errors="replace") if isinstance(text, bytes) else text).strip().splitlines()[0]


def _library(compiler: str) -> ctypes.CDLL:
    """The library for this processor, compiler and source, from the cache or built into it.

    Where nothing can be kept, in a container say that is read-only, every process builds its own.
    """
    digest = _source_digest()
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_TIMEOUT, check=True)
    digest.update(b"\0".join([version.stdout, " ".join(FLAGS).encode(), _processor().encode()]))
    try:
        directory = _private_directory()
        library = directory / f"kernels-{digest.hexdigest()}.so"
        if not library.is_file():
            # Built beside its place and renamed: another process sees all of it or nothing.
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                _compile(compiler, Path(scratch) / "kernels.so").replace(library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        log.warning("the kernels are built anew by every process (XDG_CACHE_HOME may help): %s", error)
    with tempfile.TemporaryDirectory() as scratch:
        return ctypes.CDLL(str(_compile(compiler, Path(scratch) / "kernels.so")))


def _compile(compiler: str, library: Path) -> Path:
    sources = (str(Path(__file__).parent / name) for name in SOURCES)
    command = [compiler, *FLAGS, "-o", str(library), *sources, "-lm"]
    subprocess.run(command, capture_output=True, timeout=BUILD_TIMEOUT, check=True)
    return library


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
