"""The program is what nnsight can ship: read from its syntax tree, because a trap is a wrong number and not an error.

Traps (nnsight 0.8.1, ndif 0.1.2): decorators are dropped, imports inside functions and objects of our own classes fail
on the server, `super()` without arguments loses its class, and on Python 3.12 a comprehension that shares a variable
with a `for` around a trace makes the trace see an earlier value.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from remote_mediation.engine import program

SOURCE = Path(program.__file__).read_text("utf-8")
ALLOWED_IMPORTS = {"__future__", "importlib", "sys", "typing", "nnsight", "torch", "transformers"}
# Made where the source runs, of one of torch's: none of its objects is sent.
ALLOWED_CLASSES = {"Frozen"}
TRACES = {"trace", "session", "generate"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def names(targets: list[ast.expr]) -> set[str]:
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def opens_trace(node: ast.AST) -> bool:
    """Whether a `with` inside opens one of nnsight's blocks."""
    calls = [item.context_expr for part in ast.walk(node) if isinstance(part, ast.With) for item in part.items]
    return any(isinstance(call, ast.Call) and getattr(call.func, "attr", "") in TRACES for call in calls)


def traps(source: str) -> list[str]:
    """What the source does that nnsight cannot ship, in words."""
    tree = ast.parse(source)
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name not in ALLOWED_CLASSES:
            found.append(f"class {node.name}")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super":
            found.append("super()")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            found += [f"imports {name}" for name in modules if name.split(".")[0] not in ALLOWED_IMPORTS]
    for function in functions(tree):
        inside = [node for node in ast.walk(function) if node is not function]
        found += [f"{function.name} is decorated" for _ in function.decorator_list]
        found += [f"{function.name} imports" for node in inside if isinstance(node, ast.Import | ast.ImportFrom)]
        if opens_trace(function):
            loops = names([node.target for node in inside if isinstance(node, ast.For)])
            shorts = [node for node in inside if isinstance(node, COMPREHENSIONS)]
            shared = loops & names([part.target for short in shorts for part in short.generators])
            found += [f"{function.name} shares {name} between a loop and a comprehension" for name in sorted(shared)]
            found += [f"{function.name} traces in a loop" for node in inside if _is_loop(node) and opens_trace(node)]
    return found


def _is_loop(node: ast.AST) -> bool:
    return isinstance(node, (ast.For, ast.While))


def test_the_program_has_no_trap() -> None:
    assert traps(SOURCE) == []
    assert sum(opens_trace(function) for function in functions(ast.parse(SOURCE))) >= 4


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("@functools.wraps(f)\ndef g(): pass", "g is decorated"),
        ("def g():\n    import os", "g imports"),
        ("import remote_mediation.engine.jobs", "imports remote_mediation.engine.jobs"),
        ("from remote_mediation.engine.jobs import Job", "imports remote_mediation.engine.jobs"),
        ("class Result(NamedTuple): pass", "class Result"),
        ("def g(self):\n    return super().g()", "super()"),
        (
            "def g(m):\n    a = [x for x in r]\n    for x in r:\n        f(x)\n    with m.trace(): pass",
            "g shares x between a loop and a comprehension",
        ),
        ("def g(m):\n    for x in r:\n        with m.trace(): f(x)", "g traces in a loop"),
    ],
)
def test_each_trap_would_be_found(source: str, found: str) -> None:
    assert found in traps(source)
