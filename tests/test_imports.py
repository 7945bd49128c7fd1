"""Imports point one way (LAYOUT.md): read from the syntax tree, lazy imports and those for type checkers included."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from inspect import isfunction, ismodule, signature
from pathlib import Path
from typing import NamedTuple

import pytest

import remote_mediation

ROOT = Path(remote_mediation.__file__).parent
# From the ground up: a module imports from rows above its own in this table, never from its own row or below.
# `analyses.*` stands for all modules of the analyses, whose own order is below. A new module needs a place here.
ORDER = (
    ("kinds", "saving"),
    ("dequantise", "engine", "engine.heap", "engine.program", "engine.stored"),
    ("engine.copies", "errors", "forms", "loading", "meter", "paths", "toml", "unseen"),
    (
        "engine.deadline",
        "planted",
        "planted.words",
        "prompts",
        "provenance",
        "records",
        "screen",
        "show",
        "show.embed",
        "show.serve",
    ),
    ("engine.exchange", "lock", "planted.canvas", "wheels"),
    ("engine.server", "fetch", "intervals", "pairs", "planted.cases", "planted.gate", "sites"),
    ("digests", "lists", "placebo", "rates", "shares", "stats", "subspaces"),
    ("judges.base", "judges.labelled", "judges.openings", "judges.phrases"),
    ("judges.chat", "judges.classifier", "judges.embedding", "judges.function", "judges.quality"),
    ("judges", "judges.exchanges", "models", "probes", "show.tables", "tokens"),
    ("outcomes", "show.section", "rendering"),
    ("config", "engine.coverage", "engine.rows", "engine.unfold", "engine.weights"),
    ("engine.budget", "engine.pathrows", "openings", "show.made", "texts"),
    ("contents", "engine.fit"),
    ("engine.payload",),
    ("engine.jobs",),
    ("engine.answers", "engine.backend", "engine.samples", "engine.tasks"),
    ("engine.learning", "runfiles"),
    ("effects", "store"),
    ("checkup", "runner", "summary"),
    ("lab", "printed", "progress"),
    ("later", "show.figures", "show.markup"),
    ("result",),
    ("show.charts", "show.words"),
    ("show.sites",),
    ("show.maps",),
    ("show.map_chart",),
    ("analyses.*",),
    ("analyses",),
    ("study",),
    ("cost", "engine.local", "engine.remote", "reference", "replicate", "report"),
    ("compare", "door", "export", "planted.selfcheck", "terminal"),
    ("planted.published", "show.views"),
    ("show.page",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Analyses that others build on, from the ground up; every other one imports its own modules alone, and these.
GROUND = ("analyses.neurons", "analyses.intervene", "analyses.claims", "analyses.rivals")
# What estimates; those that only show take types and words from there, no function but the one that reads two tables.
ESTIMATING = ("intervals", "probes", "rates", "shares", "stats")
JUDGING = ("probes.earlier",)
SHOWING = ("report", "rendering", "terminal")
# Parameters by which a function draws random numbers, wherever it stands.
DRAWS = {"by", "resamples", "rng", "seed"}
# Who may import what is slow to load: as the module is loaded, or only inside functions.
HEAVY = ("nnsight", "torch", "transformers")
AT_ONCE = {
    "engine.copies": {"torch"},
    "engine.program": {"nnsight", "torch", "transformers"},
    "engine.local": {"nnsight", "torch", "transformers"},
    "engine.remote": {"nnsight", "torch"},
    "engine.stored": {"torch"},
    "engine.weights": {"torch", "transformers"},
    "planted.canvas": {"torch", "transformers"},
    "planted.cases": {"torch", "transformers"},
    "planted.gate": {"torch", "transformers"},
    "planted.words": {"torch", "transformers"},
}
LAZILY = {
    "cost": {"torch"},
    "dequantise": {"torch", "transformers"},
    "engine.coverage": {"torch"},
    "engine.fit": {"torch"},
    "fetch": {"transformers"},
    "engine.server": {"nnsight"},
    "judges.base": {"transformers"},
    "judges.chat": {"torch", "transformers"},
    "judges.classifier": {"transformers"},
    "judges.embedding": {"torch", "transformers"},
    "models": {"transformers"},
    "reference": {"torch"},
    "subspaces": {"torch"},
    "cli": {"transformers"},
}


class Import(NamedTuple):
    target: str
    lazy: bool
    typing: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    """All imports in a syntax tree."""
    for node in ast.iter_child_nodes(tree):
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        checked = typing or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, inside, checked) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            for alias in node.names:
                submodule = (ROOT / _file(f"{node.module}.{alias.name}")).is_file()
                yield Import(f"{node.module}.{alias.name}" if submodule else str(node.module), inside, checked)
        yield from imports(node, inside, checked)


def internal_imports(name: str) -> set[str]:
    """Modules of ours that a module imports."""
    found = {entry.target for entry in imports(TREES[name]) if entry.target.split(".")[0] == "remote_mediation"}
    return {target.removeprefix("remote_mediation").removeprefix(".") for target in found}


def room(name: str) -> str:
    """The analysis that a module belongs to."""
    return ".".join(name.split(".")[:2])


def _file(module: str) -> str:
    return "/".join(module.split(".")[1:]) + ".py"


def place(name: str) -> str:
    return "analyses.*" if name.startswith("analyses.") and name not in RANK else name


TREES = {name_of(path): ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def test_every_module_has_a_place_and_every_place_a_module() -> None:
    assert {place(name) for name in TREES if name} == set(RANK)


@pytest.mark.parametrize("name", [name for name in TREES if name])
def test_imports_come_from_below(name: str) -> None:
    own = RANK[place(name)]
    internal = internal_imports(name)
    within = {target for target in internal if place(target) == place(name) == "analyses.*"}
    assert [target for target in sorted(internal - within) if RANK.get(place(target), own) >= own] == []


@pytest.mark.parametrize("name", [name for name in TREES if place(name) == "analyses.*"])
def test_an_analysis_builds_on_few_others(name: str) -> None:
    allowed = {room(name), *GROUND[: GROUND.index(room(name))]} if room(name) in GROUND else {room(name), *GROUND}
    others = {room(target) for target in internal_imports(name) if place(target) == "analyses.*"}
    assert others <= allowed


@pytest.mark.parametrize("name", [name for name in TREES if place(name) == "analyses.*"])
def test_what_is_asked_knows_nothing_of_how_it_is_shown(name: str) -> None:
    shown = {target for target in internal_imports(name) if target.startswith("show") or target.endswith(".show")}
    assert not shown or name.endswith((".show", ".figures")) or name == room(name)


def shows(name: str) -> bool:
    """Whether a module is there to show what others have measured and estimated."""
    return name.startswith("show.") or name.endswith((".show", ".figures")) or name in SHOWING


def imported_names(name: str) -> dict[str, object]:
    """What a module imports from ours, by its full name without that of the package."""
    found: dict[str, object] = {}
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("remote_mediation"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                home = import_module(full if (ROOT / _file(full)).is_file() else str(node.module))
                found[full.removeprefix("remote_mediation.")] = getattr(home, alias.name, home)
    return found


@pytest.mark.parametrize("name", [name for name in TREES if shows(name)])
def test_nothing_is_estimated_where_it_is_shown(name: str) -> None:
    called = {full: one for full, one in imported_names(name).items() if isfunction(one) or ismodule(one)}
    estimating = [full for full in called if full.split(".")[0] in ESTIMATING and full not in JUDGING]
    drawing = [full for full, one in called.items() if isfunction(one) and DRAWS & set(signature(one).parameters)]
    assert estimating == drawing == []


def test_modules_of_an_analysis_have_no_circles() -> None:
    rooms = {name: internal_imports(name) & set(TREES) - {name} for name in TREES if place(name) == "analyses.*"}
    assert list(TopologicalSorter(rooms).static_order())


def test_errors_import_nothing_and_the_program_nothing_of_ours() -> None:
    assert {entry.target for entry in imports(TREES["errors"])} == {"__future__"}
    assert not [entry for entry in imports(TREES["engine.program"]) if entry.target.startswith("remote_mediation")]


@pytest.mark.parametrize("name", [name for name in TREES if name])
def test_slow_libraries_stay_where_they_are_needed(name: str) -> None:
    found = [entry for entry in imports(TREES[name]) if entry.target.split(".")[0] in HEAVY and not entry.typing]
    at_once = {entry.target.split(".")[0] for entry in found if not entry.lazy}
    lazily = {entry.target.split(".")[0] for entry in found if entry.lazy}
    assert at_once <= AT_ONCE.get(name, set())
    assert lazily <= LAZILY.get(name, set())


def test_the_package_itself_imports_nothing_at_once() -> None:
    internal = [entry for entry in imports(TREES[""]) if entry.target.startswith("remote_mediation")]
    assert internal
    assert all(entry.typing for entry in internal)


def test_public_names_are_sorted_and_resolve() -> None:
    names = remote_mediation.__all__
    assert names == sorted(set(names))
    assert 5 <= len(names) <= 12
    assert all(getattr(remote_mediation, name).__name__ == name for name in names)
    assert set(names) == set(remote_mediation._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'Sight'"):
        _ = remote_mediation.Sight


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("__main__")])
def test_every_module_says_why_it_exists(name: str) -> None:
    docstring = ast.get_docstring(TREES[name])
    assert docstring
    assert docstring.splitlines()[0].endswith((".", "?", ","))
    assert import_module(f"remote_mediation.{name}".rstrip(".")).__doc__
