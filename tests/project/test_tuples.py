"""No tuple is built from a generator that runs Python code.

CPython fills such a tuple in place. If another thread walks `gc.get_objects()` in the meantime, as the model loader of
reForge does, it refers to the unfinished tuple, and building it fails with a SystemError. A list is safe.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "facesnap_ext").rglob("*.py")), ROOT / "scripts/facesnap.py", ROOT / "preload.py"]


def generator_functions(tree: ast.AST) -> set[str]:
    """The names of functions that contain a `yield` of their own."""
    names = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and any(
            isinstance(node, ast.Yield | ast.YieldFrom) for node in own(function)
        ):
            names.add(function.name)
    return names


def own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from own(node)


GENERATORS = set().union(*(generator_functions(ast.parse(path.read_text("utf-8"))) for path in FILES))


def unsafe(source: str) -> list[str]:
    """The calls of `tuple` in Python code that run Python code while the tuple is filled."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and is_unsafe(node)]


def is_unsafe(call: ast.Call) -> bool:
    if not (isinstance(call.func, ast.Name) and call.func.id == "tuple" and call.args):
        return False
    (argument,) = call.args
    if isinstance(argument, ast.GeneratorExp):
        return True
    if not isinstance(argument, ast.Call):
        return False
    name = argument.func.id if isinstance(argument.func, ast.Name) else getattr(argument.func, "attr", "")
    if name in ("map", "filter"):
        applied = argument.args[0]
        return not (isinstance(applied, ast.Name) and hasattr(builtins, applied.id))
    return name in GENERATORS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tuples_are_not_filled_by_generators(path: Path):
    found = unsafe(path.read_text("utf-8"))
    assert found == [], "use tuple([…])"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("tuple(read(p) for p in paths)", 1),
        ("tuple(map(read, paths))", 1),
        ("tuple(filter(Path.is_file, paths))", 1),
        ("tuple(_links(unet))", 1),
        ("tuple([read(p) for p in paths])", 0),
        ("(*_links(unet),)", 0),
        ("tuple(map(int, shape))", 0),
        ("tuple(sorted(names))", 0),
        ("tuple(), tuple(shape)", 0),
    ],
)
def test_the_check_finds_the_form(source: str, count: int):
    assert len(unsafe(source)) == count
