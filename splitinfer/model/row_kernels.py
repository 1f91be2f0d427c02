"""What happens to rows between the products, by the kernels in C (native/), as in `model.rows`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Array
from functools import cache
from typing import Any

import torch
from torch import Tensor

from splitinfer.model.linear import Linear
from splitinfer.model.native import DTYPES, Expected, is_bfloat16, kernels, no_memory
from splitinfer.model.rows import Begun, Closed, Dense, Routing, TorchRows

__all__ = ["RowKernels", "address", "done", "row_kernels", "row_ops", "struct_of"]


class RowKernels(TorchRows):
    """What happens to contiguous float32 or bfloat16 rows on the CPU between products (rows.c)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer, size, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

        def bind(name: str, *types: Any) -> Any:
            function = library[f"splitinfer_{name}"]
            function.argtypes = types
            return function

        self._norm = bind("norm", pointer, integer, size, size, pointer, real, pointer, integer, integer)
        self._residual = bind(
            "residual", pointer, pointer, integer, size, size, pointer, real, *[pointer] * 7, integer
        )
        self._combine = bind(
            "combine", *[pointer] * 3, integer, size, size, pointer, pointer, real, real, pointer, integer
        )
        self._heads = bind(
            "heads", pointer, *[size] * 6, integer, *[pointer] * 3, real, pointer, pointer, integer, integer
        )
        self._sum = bind("sum", pointer, integer, size, size, pointer, integer, integer)
        self._gated = bind("gated", pointer, size, size, pointer, integer)
        self._choose = bind("choose", pointer, size, size, size, pointer, pointer, pointer)
        self._attention_in = bind(
            "attention_in", pointer, integer, pointer, size, pointer, real, size, size, size, integer,
            *[pointer] * 5, integer, integer,
        )  # fmt: skip
        self._attention_out = bind(
            "attention_out", *[pointer] * 4, integer, size, pointer, real, *[pointer] * 6, size,
            *[pointer] * 5, integer, pointer, integer,
        )  # fmt: skip
        self._mlp = bind("mlp", pointer, pointer, size, pointer, integer, integer)
        self._mlp_until = bind("mlp_until", pointer, integer)
        self._mlp_end = bind("mlp_end", pointer)
        self._mlp_end.restype = None
        self._mlp_close = bind(
            "mlp_close", pointer, pointer, integer, size, *[pointer] * 4, real, real, pointer
        )

    def norm(self, x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
        """RMS norm [rows, n] times `weight` [n] float32, with one rounding."""
        rows, n = x.shape
        out = torch.empty((rows, n), dtype=out_dtype)
        given = None if weight is None else weight.data_ptr()
        threads = torch.get_num_threads()
        done(
            self._norm(
                x.data_ptr(), is_bfloat16(x), rows, n, given, eps, out.data_ptr(), is_bfloat16(out), threads
            ),
            rows,
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
        done(
            self._residual(
                x.data_ptr(), y.data_ptr(), _same(x, y), rows, n, weight.data_ptr(), eps, first.data_ptr(),
                None if second is None else second.data_ptr(),
                None if third is None else third.data_ptr(), total.data_ptr(), normed.data_ptr(),
                one.data_ptr(), None if two is None else two.data_ptr(), torch.get_num_threads(),
            ),
            rows,
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
        done(
            self._combine(
                x.data_ptr(), dense.data_ptr(), None if moe is None else moe.data_ptr(), bfloat16, rows, n,
                None if moe_weight is None else moe_weight.data_ptr(), weight.data_ptr(), eps, scalar,
                out.data_ptr(), torch.get_num_threads(),
            ),
            rows,
        )  # fmt: skip
        return out

    def heads(
        self,
        projected: Tensor,
        weight: Tensor,
        values: int,
        value_norm: bool,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Projections [rows, heads * D] float32 to normalised queries and keys [rows, N + V, D], turned, and
        values [rows, V, D]. `weight` is [N + V, D]; the last `values` heads are the values, be they keys too,
        and are normalised if `value_norm`.
        """
        rows, width = projected.shape
        turning, size = weight.shape
        turned = torch.empty((rows, turning, size), dtype=dtype)
        value = torch.empty((rows, values, size), dtype=dtype)
        done(
            self._heads(
                projected.data_ptr(), rows, width, size, turning, width // size - values, values,
                value_norm, weight.data_ptr(), cos.data_ptr(), sin.data_ptr(), eps, turned.data_ptr(),
                value.data_ptr(), is_bfloat16(turned), torch.get_num_threads(),
            ),
            rows,
        )  # fmt: skip
        return turned, value

    def gated(self, x: Tensor) -> Tensor:
        """gelu(first half) * second half of x [rows, 2 * n] float32, to [rows, n]."""
        rows, width = x.shape
        out = torch.empty((rows, width // 2))
        done(self._gated(x.data_ptr(), rows, width // 2, out.data_ptr(), torch.get_num_threads()), rows)
        return out

    def choose(self, scores: Tensor, k: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest of scores [rows, E] float32, falling, and their softmax times scale [E]."""
        rows, n = scores.shape
        index = torch.empty((rows, k), dtype=torch.int16)
        weights = torch.empty((rows, k))
        self._choose(scores.data_ptr(), rows, n, k, scale.data_ptr(), index.data_ptr(), weights.data_ptr())
        return index, weights

    def sum(self, parts: Sequence[int], out: Tensor) -> Tensor:
        """Adds blocks of float32 of the shape of `out` [rows, n], at the addresses `parts`, in their order,
        and rounds once."""
        rows, n = out.shape
        addresses = (ctypes.c_void_p * len(parts))(*parts)
        done(
            self._sum(
                ctypes.addressof(addresses), len(parts), rows, n, out.data_ptr(), is_bfloat16(out),
                torch.get_num_threads(),
            ),
            rows,
        )  # fmt: skip
        return out

    def attention_in(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        projections: Linear,
        weight: Tensor,
        values: int,
        value_norm: bool,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if not projections.fuses:
            return super().attention_in(x, norm, eps, projections, weight, values, value_norm, cos, sin)
        x = x.contiguous()
        rows, (turning, size) = x.shape[0], weight.shape
        turned = torch.empty((rows, turning, size), dtype=x.dtype)
        value = torch.empty((rows, values, size), dtype=x.dtype)
        done(
            self._attention_in(
                ctypes.addressof(projections.matrices), len(projections.matrices), x.data_ptr(), rows,
                norm.data_ptr(), eps, size, turning, values, value_norm, weight.data_ptr(), cos.data_ptr(),
                sin.data_ptr(), turned.data_ptr(), value.data_ptr(), is_bfloat16(x), torch.get_num_threads(),
            ),
            rows,
        )  # fmt: skip
        return turned, value

    def attention_out(
        self,
        attended: Tensor,
        output: Linear,
        x: Tensor,
        weight: Tensor,
        eps: float,
        first: Tensor,
        second: Tensor | None,
        routing: Routing | None,
        beside: Dense | None = None,
        gives_way: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None, Begun | None]:
        if not output.fuses or (routing is not None and not routing.proj.fuses):
            return super().attention_out(attended, output, x, weight, eps, first, second, routing)
        x, attended = x.contiguous(), attended.contiguous()
        rows = x.shape[0]
        total, one = torch.empty_like(x), torch.empty_like(x)
        two = None if second is None else torch.empty_like(x)
        router = scale = third = index = weights = None
        k = 0
        if routing is not None:
            router, scale, third = routing.proj.matrices, routing.per_expert_scale, routing.scale
            k = routing.top_k
            index, weights = torch.empty((rows, k), dtype=torch.int16), torch.empty((rows, k))
        network = None if beside is None or not beside.fuses else struct_of(beside)
        dense = None if network is None else torch.empty_like(x)
        handle = ctypes.c_void_p()
        done(
            self._attention_out(
                ctypes.addressof(output.matrices), None if router is None else ctypes.addressof(router),
                attended.data_ptr(), x.data_ptr(), _same(x, attended), rows, weight.data_ptr(), eps,
                first.data_ptr(), address(second), address(third), total.data_ptr(), one.data_ptr(),
                address(two), k, address(scale), address(index), address(weights), network,
                address(dense), gives_way, ctypes.addressof(handle), torch.get_num_threads(),
            ),
            rows,
        )  # fmt: skip
        begun = None if dense is None or handle.value is None else Begun(handle.value, one, dense)
        return total, one, two, None if index is None or weights is None else (index, weights), begun

    def mlp(self, x: Tensor, dense: Dense) -> Tensor:
        if not dense.fuses:
            return super().mlp(x, dense)
        x = x.contiguous()
        out = torch.empty((x.shape[0], dense.down.out_features), dtype=x.dtype)
        done(
            self._mlp(
                struct_of(dense), x.data_ptr(), x.shape[0], out.data_ptr(), is_bfloat16(x),
                torch.get_num_threads(),
            ),
            len(x),
        )  # fmt: skip
        return out

    def mlp_until(self, begun: Begun, file: int) -> bool:
        return bool(begun.handle and self._mlp_until(begun.handle, file))

    def end_mlp(self, begun: Begun) -> Tensor:
        handle, begun.handle = begun.handle, 0
        if handle:
            self._mlp_end(handle)
        return begun.out

    def close_mlp(
        self,
        begun: Begun,
        expected: Array[Expected],
        patience: int,
        x: Tensor,
        moe_weight: Tensor,
        weight: Tensor,
        eps: float,
        scalar: float,
    ) -> Closed:
        out, ended = torch.empty_like(x), ctypes.c_int64()
        state = self._mlp_close(
            begun.handle, ctypes.addressof(expected), len(expected), patience, ctypes.addressof(ended),
            x.data_ptr(), moe_weight.data_ptr(), weight.data_ptr(), eps, scalar, out.data_ptr(),
        )  # fmt: skip
        if state != _BEGUN:
            begun.handle = 0
        return Closed(out if state == _CLOSED else None, ended.value / 1e9, state == _OVER)


_BEGUN, _OVER, _CLOSED = 0, 1, 2  # of `splitinfer_mlp_close`


class _Mlp(ctypes.Structure):
    """`Mlp` of mlp.h."""

    _fields_ = (
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    )


def struct_of(dense: Dense) -> int:
    """Its address."""
    if dense.struct is None:
        matrices, down = dense.gate_up.matrices, dense.down.matrices
        dense.struct = _Mlp(
            ctypes.addressof(matrices), ctypes.addressof(down), len(matrices), address(dense.norm), dense.eps
        )
    return ctypes.addressof(dense.struct)


def address(x: Tensor | None) -> int | None:
    """None for none."""
    return None if x is None else x.data_ptr()


def done(failed: int, rows: int) -> None:
    """Raises CapacityError where a kernel had no memory for so many rows."""
    if failed:
        raise no_memory(rows)


def _same(*tensors: Tensor) -> bool:
    """Whether all are bfloat16; raises TypeError where they differ."""
    if len({tensor.dtype for tensor in tensors}) != 1:
        raise TypeError(f"rows of {', '.join(str(tensor.dtype) for tensor in tensors)}")
    return is_bfloat16(tensors[0])


@cache
def row_kernels() -> RowKernels | None:
    """The kernels, None where there are none."""
    built = kernels()
    return None if built is None else RowKernels(built.library)


def row_ops(device: torch.device, dtype: torch.dtype) -> TorchRows:
    """The kernels where they can be used, else PyTorch."""
    built = row_kernels() if device.type == "cpu" and dtype in DTYPES else None
    return TorchRows() if built is None else built
