"""The command line: one module per command, assembled in `app`."""

from __future__ import annotations

from splitinfer.cli.app import main

__all__ = ["main"]
