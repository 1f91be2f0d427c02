"""`python -m splitinfer`: the same as the `splitinfer` command."""

from __future__ import annotations

import sys

from splitinfer.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
