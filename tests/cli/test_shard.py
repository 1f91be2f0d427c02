from __future__ import annotations

from pathlib import Path

from splitinfer.model.shard import MANIFEST, Manifest
from tests.cli.conftest import Cli, listening


def test_dry_run_writes_nothing(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    ran = cli("shard", str(tiny), "--experts", "0-3", "--quant", "int4", "--dry-run")
    assert ran.code == 0
    *files, total = ran.out.splitlines()
    assert [line.split()[1] for line in files] == [f"experts-{n:05d}.safetensors" for n in range(4)]
    assert total.endswith("bytes in all")
    assert set(tmp_path.iterdir()) == before


def test_a_node_and_a_client_on_shards(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Both halves from disk give what the whole model gives when it is quantised as it is loaded."""
    formats = ("--quant", "int4", "--quant-lm-head", "bfloat16")
    prompt = ("--token-ids", "5,6,7", "--max-tokens", "8")
    ran = cli("shard", str(tiny), "--client", *formats, "-o", "client")
    assert (ran.code, ran.err) == (0, "")
    assert cli("shard", str(tiny), "--experts", "0-10", "--quant", "int4", "-o", "experts").code == 0
    manifest = Manifest.read(tmp_path / "client" / MANIFEST)
    assert (manifest.quant.attention, manifest.quant.lm_head) == ("int8", "bfloat16")
    whole = cli("generate", "--model", str(tiny), *prompt, *formats)
    with listening(tmp_path / "experts") as (_, address, lines):
        assert "(int4)" in lines[0]
        split = cli("generate", "--model", "client", "--nodes", address, *prompt)
    assert (split.code, whole.code) == (0, 0)
    assert split.out == whole.out


def test_a_whole_model_and_what_verify_says(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert cli("shard", str(tiny), "-o", "all").code == 0
    ran = cli("verify", "all")
    assert ran.code == 0
    assert ran.out.startswith("all: 10 files, ")
    file = tmp_path / "all" / "client-00001.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-5] ^= 4
    file.write_bytes(contents)
    ran = cli("verify", "all")
    assert ran.code == 1
    assert "client-00001.safetensors is damaged" in ran.err


def test_wrong_usage(cli: Cli, tiny: Path) -> None:
    for arguments, message in (
        (("shard", str(tiny)), "there is no place to write to"),
        (("shard", str(tiny), "--quant", "int5", "--dry-run"), "--quant must be one of float32"),
        (("shard", str(tiny), "--experts", "9-12", "--dry-run"), "out of bounds"),
        (("verify", str(tiny)), "is not a shard"),
    ):
        ran = cli(*arguments)
        assert ran.code == (1 if arguments[0] == "verify" else 2)
        assert message in ran.err
