"""An expert call as a node gets it: what a peer can get wrong is refused here, before any arithmetic."""

from __future__ import annotations

from math import prod
from typing import Any, Final, NamedTuple

import torch

from splitinfer import transport
from splitinfer.errors import UsageError
from splitinfer.model.native import Answer, Frame, address_of
from splitinfer.placement import Holding

__all__ = ["ExpertCalls", "ReadyAnswer", "Request", "answer_parcel"]

_REMEMBERED: Final = 256  # kinds of calls; a client that decodes makes one for each layer


class Request(NamedTuple):
    """An expert call: what `ExpertBank.forward_bytes` takes, and the answer's dtype by name and shape."""

    layer: int
    x: memoryview
    top_k_index: memoryview
    weights: memoryview
    places: tuple[int, ...]
    dtype: torch.dtype
    out_dtype: torch.dtype
    out: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the answer."""
        return prod(self.shape) * self.out_dtype.itemsize


def answer_parcel(out: str, shape: tuple[int, ...]) -> transport.Parcel:
    """An answer before its sums are there, as a node sends it and a client that reads it expects it."""
    return transport.Parcel("", [(out, shape)], {"compute_us": transport.NUMBER})


class ReadyAnswer:
    """An answer that lies ready but for the sums, which the kernels write into `out` and send on."""

    __slots__ = ("answer", "out", "parcel")

    def __init__(self, request: Request) -> None:
        self.parcel = answer_parcel(request.out, request.shape)
        self.out = self.parcel.tensors[0].data
        self.answer = Answer(Frame.of(self.parcel.frame), address_of(self.parcel.number))


class ExpertCalls:
    """Reads the calls of a node that holds `holding` of a model. What was checked once, layer, dtypes and
    shapes, is not checked again: for one decoded row that takes as long as a small expert."""

    def __init__(self, hidden_size: int, holding: Holding) -> None:
        self._hidden_size = hidden_size
        self._holding = holding
        self._known: dict[Any, tuple[torch.dtype, torch.dtype]] = {}
        self._ready: dict[tuple[str, tuple[int, ...]], ReadyAnswer] = {}

    def read(self, call: transport.Call) -> Request:
        """Raises UsageError for what cannot be computed here."""
        meta, tensors = call.meta, call.tensors
        try:
            x, index, weights = tensors
            layer, out = meta["layer"], meta["out"]
            dtype, out_dtype = self._known[_kind(layer, out, x, index, weights)]
        except (KeyError, TypeError, ValueError):
            dtype, out_dtype = self._check(call)
            x, index, weights = tensors
            layer, out = meta["layer"], meta["out"]
        return Request(layer, x.data, index.data, weights.data, index.shape, dtype, out_dtype, out, x.shape)

    def ready_answer(self, call: transport.Call, request: Request) -> ReadyAnswer | None:
        """One that may be sent from within the arithmetic; None where it has to go as others do."""
        kind = request.out, request.shape
        ready = self._ready.get(kind)
        if ready is None:
            if not 0 < request.nbytes <= transport.PARCEL_NBYTES or not request.top_k_index.nbytes:
                return None
            if len(self._ready) >= _REMEMBERED:
                self._ready.clear()
            ready = self._ready[kind] = ReadyAnswer(request)
        file = call.stamp(ready.parcel)
        if file is None:
            return None
        ready.answer.frame.file = file
        return ready

    def _check(self, call: transport.Call) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of x and of the answer; remembers that such a call is fine."""
        layer, out, hidden_size = call.meta.get("layer"), call.meta.get("out"), self._hidden_size
        if layer not in self._holding.layers:
            raise UsageError(f"this node does not hold layer {layer!r}; it holds {self._holding}")
        if len(call.tensors) != 3:
            raise UsageError(f"an expert call carries 3 tensors, not {len(call.tensors)}")
        x, index, weights = call.tensors
        if x.dtype not in ("float32", "bfloat16") or len(x.shape) != 2 or x.shape[1] != hidden_size:
            raise UsageError(f"x is {x.dtype} {list(x.shape)}, not [rows, {hidden_size}] float32 or bfloat16")
        if index.dtype != "int16" or len(index.shape) != 2 or index.shape[0] != x.shape[0]:
            raise UsageError(f"top_k_index is {index.dtype} {list(index.shape)}, not int16 [{x.shape[0]}, k]")
        if weights.dtype != "float32" or weights.shape != index.shape:
            raise UsageError(
                f"top_k_weights is {weights.dtype} {list(weights.shape)}, not float32 {list(index.shape)}"
            )
        if out not in ("float32", "int64", x.dtype):
            raise UsageError(f"cannot answer {x.dtype} rows in {out!r}")
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        dtypes = getattr(torch, x.dtype), getattr(torch, out)
        self._known[_kind(layer, out, x, index, weights)] = dtypes
        return dtypes


def _kind(
    layer: int, out: str, x: transport.Tensor, index: transport.Tensor, weights: transport.Tensor
) -> tuple[Any, ...]:
    """What a call is checked by: calls alike in this are right or wrong together."""
    return layer, out, x.dtype, x.shape, index.dtype, index.shape, weights.dtype, weights.shape
