"""Every remedy in the source is a sentence for a person: it begins with a capital and has its full stop."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "splitinfer"
MODULES = sorted(PACKAGE.rglob("*.py"))
VALUE = "\0"  # stands for what a placeholder will hold


def texts(node: ast.expr, names: dict[str, list[ast.expr]]) -> Iterator[str]:
    """What an expression may say, with VALUE for what is known only at run time."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body, names)
        yield from texts(node.orelse, names)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts(value, names)
    elif isinstance(node, ast.BinOp):
        for left in texts(node.left, names):
            yield from (left + right for right in texts(node.right, names))
    elif isinstance(node, ast.Name) and node.id in names:
        for value in names[node.id]:
            yield from texts(value, names)
    else:
        yield VALUE


def assigned(tree: ast.Module) -> dict[str, list[ast.expr]]:
    """Names and what is assigned to them anywhere in the module, tuples taken apart."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found.setdefault(node.target.id, []).append(node.value)
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs: list[tuple[ast.expr, ast.expr]] = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, []).append(value)
    return found


def remedies(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each `remedy=` of a call or of a parameter's default."""
    tree = ast.parse(path.read_text("utf-8"))
    names = assigned(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "remedy":
                    yield from ((keyword.value.lineno, text) for text in texts(keyword.value, names))
        elif isinstance(node, ast.FunctionDef):
            pairs = zip(reversed(node.args.args), reversed(node.args.defaults), strict=False)
            keyword_only = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            for argument, default in (*pairs, *keyword_only):
                if argument.arg == "remedy" and default is not None:
                    yield from ((default.lineno, text) for text in texts(default, names))


def is_sentence(text: str) -> bool:
    if text in ("", VALUE):  # nothing to say, or said elsewhere
        return True
    return (text[0].isupper() or text[0] == VALUE) and text[-1] in (".", "?", VALUE)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_remedies_are_sentences(path: Path) -> None:
    wrong = [f"line {line}: {text!r}" for line, text in remedies(path) if not is_sentence(text)]
    assert not wrong, "\n".join(wrong)


def test_the_walk_sees_them() -> None:
    """It is no use if it finds none."""
    assert sum(len(list(remedies(path))) for path in MODULES) > 150
