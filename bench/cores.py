"""Which cores the two processes of a bench run on."""

from __future__ import annotations

import os

__all__ = ["halves", "run_on"]


def halves(apart: bool) -> tuple[set[int], set[int]]:
    """The cores of a server and of a client: all of them twice, or half of them each.

    Empty sets, for "any", where the system does not let programs choose.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return (set(cores[::2]), set(cores[1::2])) if apart and len(cores) > 1 else (set(cores), set(cores))


def run_on(cores: set[int]) -> None:
    """Run this process on these from now on."""
    if cores:
        os.sched_setaffinity(0, cores)
