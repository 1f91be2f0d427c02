"""Rows on their way between the device that attends and the CPU, where experts and the network are.

For a CUDA device the host waits once a layer: when rows and choices have to be on the wire. What comes back
is queued behind that and nobody waits for it. Both ways go through pinned memory, which PyTorch's allocator
hands out again, but not before the copies that use it are done. Other devices have no such memory: their
copies wait by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Staging"]


class Staging:
    """Copies between `device` and the CPU; on the CPU nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._here = device.type == "cpu"
        self._pins = device.type == "cuda"
        self.waits = 0  # how often the host has waited for the device

    def to_host(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors on the CPU, contiguous, complete on return: the one wait of a layer."""
        if self._here:
            return tensors
        copies = tuple(self._room(tensor).copy_(tensor, non_blocking=self._pins) for tensor in tensors)
        if self._pins:
            torch.cuda.current_stream(self.device).synchronize()
        self.waits += 1
        return copies

    def to_device(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device, for what is queued there afterwards."""
        if self._here:
            return tensor
        if self._pins:
            tensor = self._room(tensor).copy_(tensor)
        return tensor.to(self.device, non_blocking=self._pins)

    def _room(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._pins)
