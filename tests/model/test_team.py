"""The kernels' team of threads: the same bits alone, together, from several threads, after a fork."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from splitinfer.model.linear import Linear
from splitinfer.model.native import kernels
from splitinfer.model.quantize import quantize

pytestmark = pytest.mark.skipif(kernels() is None, reason="the kernels could not be built here")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product() -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(0)
    return Linear(quantize(torch.randn(640, 256), "int4")), torch.randn(5, 256)


def test_any_number_of_threads_one_after_the_other() -> None:
    linear, x = product()
    torch.set_num_threads(1)
    expected = linear(x)
    for threads in (4, 2, 7, 1, 3, 300, 2):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert torch.equal(linear(x), expected)


def test_calls_from_several_threads_at_once() -> None:
    linear, x = product()
    expected = linear(x)

    def repeatedly(_: int) -> bool:
        torch.set_num_threads(3)  # OpenMP keeps this for each thread
        return all(torch.equal(linear(x), expected) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeatedly, range(4), timeout=60))


def test_a_child_after_a_fork_has_a_team_of_its_own() -> None:
    script = """
        import os, sys, torch
        from tests.model.test_team import product
        linear, x = product()
        torch.set_num_threads(3)
        expected = linear(x)
        child = os.fork()
        same = all(torch.equal(linear(x), expected) for _ in range(20))
        if child == 0:
            os._exit(0 if same else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not same)
    """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
