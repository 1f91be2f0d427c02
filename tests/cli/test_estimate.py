"""`--estimate`: what it prints is what the same command then holds, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitinfer.cli.console import human_size
from splitinfer.model.experts import ExpertBank
from splitinfer.model.footprint import PROGRAM_NBYTES, Sizes, working_nbytes
from splitinfer.model.quantize import QuantConfig
from splitinfer.model.sharding import plan_shard, write_shard
from splitinfer.model.weights import Checkpoint
from tests.cli.conftest import Cli
from tests.model.gguf_files import write_gguf


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    folder = Checkpoint.open(tiny)
    whole = plan_shard(folder, experts=range(11), client=True, quant=QuantConfig.of("int4"))
    write_shard(whole, directory / "shard")
    return {"folder": tiny, "shard": directory / "shard", "gguf": write_gguf(folder, directory / "m.gguf")}


def line(out: str, name: str) -> str:
    """The figure of one part."""
    (found,) = (text for text in out.splitlines() if text.startswith(f"  {name} "))
    return found.removeprefix(f"  {name}").strip()


@pytest.mark.parametrize("kind", ["folder", "shard", "gguf"])
def test_a_node(cli: Cli, models: dict[str, Path], kind: str) -> None:
    ran = cli("node", str(models[kind]), "--experts", "2-5", "--layers", "1-2", "--estimate")
    bank = ExpertBank(Checkpoint.open(models[kind]), dict.fromkeys((1, 2), range(2, 6)))
    figure = f"{human_size(bank.nbytes)}  {bank.weight_format}, experts 2-5 of layers 1-2"
    assert line(ran.out, "experts").startswith(figure)
    assert ran.out.startswith(f"a node takes {human_size(bank.nbytes + PROGRAM_NBYTES)} ")
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize("kind", ["folder", "shard", "gguf"])
def test_everything_here(cli: Cli, models: dict[str, Path], kind: str) -> None:
    out = cli("generate", "--model", str(models[kind]), "--context", "40", "--estimate").out
    model = Checkpoint.open(models[kind])
    bank = ExpertBank(model, dict.fromkeys(range(4), range(11)))
    assert line(out, "experts").startswith(human_size(bank.nbytes) + " ")
    parts = Sizes.of(model).client(40, range(4))
    total = parts.total + working_nbytes(model.config, 40)
    assert out.startswith(f"this machine takes {human_size(total)} ")
    assert line(out, "embeddings").endswith(", lm_head too")
    assert "one sequence of 40 tokens" in line(out, "keys and values")


def test_a_client_of_nodes_connects_to_none(cli: Cli, models: dict[str, Path]) -> None:
    ran = cli("chat", str(models["folder"]), "--nodes", "nobody:1", "--quant", "int4", "--estimate")
    assert (ran.code, ran.err) == (0, "")
    assert "  experts " not in ran.out
    bank = ExpertBank(Checkpoint.open(models["folder"]), dict.fromkeys(range(4), range(11)), format="int4")
    assert ran.out.endswith(
        f"the nodes hold {human_size(bank.nbytes)} together: int4, 11 experts of layers 0-3\n"
    )
    kept = cli("chat", str(models["folder"]), "--nodes", "nobody:1", "--local-layers", "1-2", "--estimate")
    assert line(kept.out, "experts").endswith("float32, layers 1-2")
    assert "of layers 0,3" in kept.out


def test_two_formats_of_a_tied_tensor(cli: Cli, models: dict[str, Path]) -> None:
    out = cli(
        "generate", "-m", str(models["folder"]), "--quant-embeddings", "bfloat16", "--quant-lm-head", "int8",
        "--estimate",
    ).out  # fmt: skip
    assert line(out, "embeddings").endswith("bfloat16")
    assert "int8, the embeddings' tensor once more" in line(out, "lm_head")


def test_keys_and_values_in_int8(cli: Cli, models: dict[str, Path]) -> None:
    asked = ("generate", "-m", str(models["folder"]), "--context", "400", "--estimate")
    wide, narrow = (line(cli(*asked, *more).out, "keys and values") for more in ((), ("--kv-cache", "int8")))
    assert narrow.endswith("one sequence of 400 tokens, int8")
    assert narrow.split()[0] != wide.split()[0]
