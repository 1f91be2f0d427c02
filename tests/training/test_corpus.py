from __future__ import annotations

from pathlib import Path

from training.corpus import HELD_OUT_PART, read_corpus


def _library(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_each_file_lands_in_one_part(tmp_path: Path) -> None:
    text = "def f():\n    return 'text'\n" * 5
    modules = {f"module_{index}.py": text for index in range(400)}
    root = _library(
        tmp_path,
        modules
        | {
            "test/test_a.py": text,
            "site-packages/other.py": text,
            "encodings/cp1.py": text,
            "table.py": "1234567890, " * 50,
            "pydoc_data/topics.py": "# made\ntopics = {'if': 'The if statement " + "is prose. " * 20 + "'}\n",
        },
    )
    corpus = read_corpus(root)
    trained, held_out = ({document.name for document in part} for part in (corpus.modules, corpus.held_out))
    assert not trained & held_out
    assert (trained | held_out) - {"pydoc_data/topics.py#if"} == set(modules)
    assert abs(len(held_out) / len(modules) - HELD_OUT_PART) < 0.04
    assert [document.name for document in corpus.tests] == ["test/test_a.py"]


def test_the_split_depends_on_the_name_only(tmp_path: Path) -> None:
    names = [f"m{index}.py" for index in range(60)]
    first = read_corpus(_library(tmp_path / "a", dict.fromkeys(names, "import os\n" * 20)))
    second = read_corpus(_library(tmp_path / "b", dict.fromkeys(names, "import re\n" * 30)))
    assert [d.name for d in first.held_out] == [d.name for d in second.held_out]
    assert first.held_out
