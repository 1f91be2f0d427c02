"""splitinfer: attention on your machine, experts on others, one Gemma between them."""

from __future__ import annotations

__version__ = "0.1.0"
