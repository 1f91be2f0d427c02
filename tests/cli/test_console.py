"""What commands share: sizes for people, the loop, spinners that stay off pipes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from splitinfer.cli.console import busy, human_size, plain, report, run, screen


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (5632, "5.63 kB"), (999_499, "999 kB"), (999_600, "1 MB"),
        (16_777_216, "16.8 MB"), (12.8e9, "12.8 GB"), (1.5e15, "1.5e+03 TB"),
    ],
)  # fmt: skip
def test_sizes(nbytes: float, text: str) -> None:
    assert human_size(nbytes) == text


def test_a_spinner_stays_off_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with busy("loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_spinner_on_a_terminal_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert screen().is_terminal
    with busy("loading"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading" in err
    assert err.endswith("\x1b[2K")  # the line is erased at the end


def test_run_gives_the_result_and_the_error() -> None:
    async def add(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    async def fail() -> None:
        raise LookupError("x")

    assert run(add(1, 2)) == 3
    with pytest.raises(LookupError):
        run(fail())


def test_run_takes_uvloop_where_it_is() -> None:
    pytest.importorskip("uvloop")

    async def loop() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert run(loop()).startswith("uvloop")


def test_plain_is_what_json_knows() -> None:
    @dataclass(frozen=True)
    class Inner:
        ids: tuple[int, ...]

    @dataclass(frozen=True)
    class Outer:
        inner: Inner
        names: dict[str, tuple[float, ...]]

    assert plain(Outer(Inner((1, 2)), {"a": (0.5,)})) == {"inner": {"ids": [1, 2]}, "names": {"a": [0.5]}}


def test_an_error_of_the_operating_system_names_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    error = FileExistsError(17, "File exists", "some/file")
    assert report(error, debug=False) == 1
    assert capsys.readouterr().err == "error: some/file: File exists\n"
