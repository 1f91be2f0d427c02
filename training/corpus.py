"""The training text: this interpreter's own standard library, split by file into training and held-out
documents.

Every Python installation carries these files, so anybody can repeat the training without a download.
Modules are held out by a seeded hash of their path; the library's test suite only ever adds training text.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HELD_OUT_PART", "Corpus", "Document", "read_corpus"]

HELD_OUT_PART = 0.06  # of the library's modules, by count
_SEED = "splitinfer-demo-1"
_TABLES = 0.12  # a file with a larger share of digits than this is a table, not a text
_WITHOUT_DIGITS = dict.fromkeys(map(ord, "0123456789"))
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings"})


@dataclass(frozen=True)
class Document:
    """One text: its path inside the standard library, with a suffix where one file yields several."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """`modules` and `tests` are trained on, `held_out` never is."""

    modules: tuple[Document, ...]
    tests: tuple[Document, ...]
    held_out: tuple[Document, ...]


def read_corpus(folder: Path | None = None) -> Corpus:
    """Read the standard library under `folder` (default: this interpreter's own), in a fixed order."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    modules: list[Document] = []
    tests: list[Document] = []
    held_out: list[Document] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        if not _SKIPPED_FOLDERS.isdisjoint(parts) or parts[0].startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # the test suite keeps a few broken files on purpose
        if len(text) < 64 or _digits(text) > _TABLES:
            continue
        if name == "pydoc_data/topics.py":
            modules.extend(_topics(name, text))
        elif not _TEST_FOLDERS.isdisjoint(parts):
            tests.append(Document(name, text))
        elif _is_held_out(name):
            held_out.append(Document(name, text))
        else:
            modules.append(Document(name, text))
    return Corpus(tuple(modules), tuple(tests), tuple(held_out))


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(f"{_SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_PART * 2**64


def _digits(text: str) -> float:
    return 1 - len(text.translate(_WITHOUT_DIGITS)) / len(text)


def _topics(name: str, text: str) -> list[Document]:
    """The language reference as `help()` shows it: one document per topic."""
    value = ast.parse(text).body[-1]
    assert isinstance(value, ast.Assign)
    topics: dict[str, str] = ast.literal_eval(value.value)
    return [Document(f"{name}#{topic}", body) for topic, body in sorted(topics.items())]
