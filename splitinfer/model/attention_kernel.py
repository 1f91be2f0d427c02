"""A layer up to its experts in one call of the kernels: see `splitinfer_attention` in native/stretches.c.

Between the three calls that do the same there would be a dozen of PyTorch's operators, on caches which the
layer's weights have just swept: for one row together a third of a millisecond, in which no weights are read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Array
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splitinfer.model.native import Request, is_bfloat16, kernels
from splitinfer.model.row_kernels import address, done, struct_of
from splitinfer.model.rows import Begun, Dense, Routing

if TYPE_CHECKING:
    from splitinfer.model.cache import Place
    from splitinfer.model.layers import Attention
    from splitinfer.model.rotary import Rotation

__all__ = ["AttentionKernel"]


class _Sequence(ctypes.Structure):
    """`Sequence` of stretches.c."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("old", ctypes.c_int64),
        ("seen", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


class _Attention(ctypes.Structure):
    """`Attention` of stretches.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("projections", "output", "router")),
        *((name, ctypes.c_void_p) for name in ("norm", "head_scale", "post", "first", "second", "third")),
        *((name, ctypes.c_void_p) for name in ("expert_scale", "beside")),
        *((name, ctypes.c_int64) for name in ("count", "size", "turning", "values", "window", "chosen")),
        ("eps", ctypes.c_float),
        ("value_norm", ctypes.c_int32),
    )


@cache
def _function() -> Any:
    built = kernels()
    assert built is not None
    function = built.library.splitinfer_attention
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function.argtypes = [
        pointer, pointer, size, pointer, integer, size, *[pointer] * 8, integer, pointer, pointer, size,
        integer,
    ]  # fmt: skip
    return function


class AttentionKernel:
    """One layer's. The scales are those of `TorchRows.residual`, `routing` as in `TorchRows.attention_out`,
    `beside` the dense network that may begin."""

    def __init__(
        self,
        attention: Attention,
        post: Tensor,
        first: Tensor,
        second: Tensor | None,
        routing: Routing | None,
        beside: Dense,
    ) -> None:
        self._function = _function()
        self._top_k = 0 if routing is None else routing.top_k
        self._second = second is not None
        self._fuses_beside = beside.fuses
        turning, width = attention.qk_scale.shape
        self._alive = (attention, post, first, second, routing, beside)  # what the addresses are of
        self._layer = _Attention(
            projections=ctypes.addressof(attention.projections.matrices),
            output=ctypes.addressof(attention.output.matrices),
            router=None if routing is None else ctypes.addressof(routing.proj.matrices),
            norm=attention.norm.data_ptr(),
            head_scale=attention.qk_scale.data_ptr(),
            post=post.data_ptr(),
            first=first.data_ptr(),
            second=address(second),
            third=None if routing is None else address(routing.scale),
            expert_scale=None if routing is None else address(routing.per_expert_scale),
            beside=struct_of(beside) if beside.fuses else None,
            count=len(attention.projections.matrices),
            size=width,
            turning=turning,
            values=attention.kv_heads,
            window=attention.window or 0,
            chosen=self._top_k,
            eps=attention.eps,
            value_norm=attention.value_norm,
        )
        self._at = ctypes.addressof(self._layer)

    @staticmethod
    def fits(attention: Attention, routing: Routing | None) -> bool:
        """Whether the kernels can do all of it."""
        fuses = attention.projections.fuses and attention.output.fuses
        return attention.kernels is not None and fuses and (routing is None or routing.proj.fuses)

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation,
        places: Sequence[tuple[int, Place]],
        *,
        begins: bool,
        gives_way: bool,
        requests: Array[Request] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None, Begun | None]:
        """As `TorchRows.attention_out`, of x [rows, H]. `places` has how many of these rows each sequence has
        and where its keys and values go. With `begins` the dense network does. `requests` are filled, and go
        where they say."""
        x = x.contiguous()
        rows, hidden = x.shape
        total, one, two, dense = torch.empty((4, rows, hidden), dtype=x.dtype).unbind()
        index: Any = None
        weights: Any = None
        if self._top_k:
            index, weights = (
                torch.empty((rows, self._top_k), dtype=torch.int16),
                torch.empty(rows, self._top_k),
            )
        begins = begins and self._fuses_beside
        sequences = (_Sequence * len(places))(*(_Sequence(count, *place) for count, place in places))
        handle = ctypes.c_void_p()
        done(
            self._function(
                self._at, ctypes.addressof(sequences), len(places), x.data_ptr(), is_bfloat16(x), rows,
                rotation.cos.data_ptr(), rotation.sin.data_ptr(), total.data_ptr(), one.data_ptr(),
                two.data_ptr() if self._second else None, address(index), address(weights),
                dense.data_ptr() if begins else None, gives_way, ctypes.addressof(handle),
                None if requests is None else ctypes.addressof(requests),
                0 if requests is None else len(requests), torch.get_num_threads(),
            ),
            rows,
        )  # fmt: skip
        begun = None if handle.value is None else Begun(handle.value, one, dense)
        return total, one, two if self._second else None, (index, weights) if self._top_k else None, begun
