"""The mathematics: checkpoints, the model, a bank of experts. Knows nothing of the network."""

from __future__ import annotations

__all__: list[str] = []
