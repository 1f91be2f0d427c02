"""Settings: the order of the four places, and what a wrong value says."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitinfer.config import Settings, find_file, load_settings
from splitinfer.errors import ConfigError, UsageError


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty current folder beside an empty home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def load(
    here: Path, toml: str | None = None, given: dict[str, object] | None = None, **environ: str
) -> Settings:
    if toml is not None:
        (here / "splitinfer.toml").write_text(toml)
    return load_settings(given, environ={"HOME": str(here.parent / "home"), **environ}, directory=here)


def test_defaults(here: Path) -> None:
    assert load(here) == Settings()


def test_each_place_overrules_the_next(here: Path) -> None:
    toml = "port = 1\nthreads = 1\ntimeout = 1\n"
    settings = load(here, toml, {"port": 3, "threads": None}, SPLITINFER_PORT="2", SPLITINFER_THREADS="2")
    assert (settings.port, settings.threads, settings.timeout, settings.host) == (3, 2, 1.0, "127.0.0.1")


def test_nodes_from_every_place(here: Path) -> None:
    assert load(here, 'nodes = ["a:1", "b:2,c:3"]').nodes == ("a:1", "b:2", "c:3")
    assert load(here, SPLITINFER_NODES="a:1, b:2").nodes == ("a:1", "b:2")
    assert load(here, given={"nodes": ["a:1,b:2", "c:3"]}).nodes == ("a:1", "b:2", "c:3")
    assert load(here, given={"nodes": []}, SPLITINFER_NODES="a:1").nodes == ("a:1",)  # no --nodes on the line


def test_the_current_folder_comes_before_the_home(here: Path) -> None:
    home = here.parent / "home" / ".config" / "splitinfer"
    home.mkdir(parents=True)
    (home / "splitinfer.toml").write_text("port = 1")
    assert load(here).port == 1
    assert load(here, "threads = 2").port == Settings().port  # only one file counts
    elsewhere = here.parent / "xdg"
    (elsewhere / "splitinfer").mkdir(parents=True)
    (elsewhere / "splitinfer" / "splitinfer.toml").write_text("port = 5")
    found = find_file(here.parent, {"HOME": str(here.parent / "home"), "XDG_CONFIG_HOME": str(elsewhere)})
    assert found == elsewhere / "splitinfer" / "splitinfer.toml"


def test_paths_in_the_file_are_relative_to_it(here: Path) -> None:
    (here / "gemma").mkdir()
    assert load(here, 'model = "gemma"').model == str(here / "gemma")
    assert load(here, 'model = "google/gemma-4"').model == "google/gemma-4"  # a hub id


@pytest.mark.parametrize(
    ("toml", "says", "remedy"),
    [
        ("prot = 7077", "there is no setting 'prot'", "Did you mean 'port'?"),
        ("nodez = []", "there is no setting 'nodez'", "Did you mean 'nodes'?"),
        ('token = "secret"', "there is no setting 'token'", "Did you mean 'token_file'?"),
        ("qqqq = 1", "there is no setting 'qqqq'", "The settings are model, nodes"),
        ("port = 70000", "port must be a whole number from 0 to 65535, not 70000", "Correct it"),
        ("port = true", "port must be a whole number", "Correct it"),
        ('timeout = "soon"', "timeout must be a number of seconds above 0, not 'soon'", "Correct it"),
        ("timeout = nan", "timeout must be a number of seconds", "Correct it"),
        ("nodes = [1]", "nodes must be a list of names", "Correct it"),
        ('dtype = "float16"', "dtype must be one of float32, bfloat16", "Correct it"),
        ('device = "tpu"', "device must be cpu, cuda, cuda:N or mps, not 'tpu'", "Correct it"),
        (
            "draft_depth = 16",
            "draft_depth must be auto, or a whole number from 1 to 15, not 16",
            "Correct it",
        ),
        ('insecure = "perhaps"', "insecure must be true or false", "Correct it"),
        ('model = " "', "model must be some text", "Correct it"),
        ("port =", "is not valid TOML", "Correct that line"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(here: Path, toml: str, says: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(here, toml)
    assert str(here / "splitinfer.toml") in str(caught.value)
    assert says in str(caught.value)
    assert remedy in caught.value.remedy


def test_an_unreadable_file_is_named(here: Path) -> None:
    (here / "splitinfer.toml").write_bytes(b"port = \xff")
    with pytest.raises(ConfigError, match=r"splitinfer\.toml is not valid TOML"):
        load(here)
    (here / "splitinfer.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than"):
        load(here)


def test_a_wrong_variable_is_named(here: Path) -> None:
    with pytest.raises(ConfigError, match="environment variable SPLITINFER_PORT must be a whole number"):
        load(here, SPLITINFER_PORT="many")
    assert load(here, SPLITINFER_PORT="").port == Settings().port  # set to nothing is not set


def test_a_depth_is_a_number_or_auto(here: Path) -> None:
    assert load(here, SPLITINFER_DRAFT_DEPTH="auto").draft_depth == "auto"
    assert load(here, SPLITINFER_DRAFT_DEPTH="4").draft_depth == 4


def test_a_switch_is_read_as_people_write_it(here: Path) -> None:
    for word, meant in (("1", True), ("True", True), ("no", False), ("false", False)):
        assert load(here, SPLITINFER_INSECURE=word).insecure is meant


def test_a_wrong_flag_is_named(here: Path) -> None:
    with pytest.raises(UsageError, match=r"--timeout must be a number of seconds above 0, not -1"):
        load(here, given={"timeout": -1.0})
