"""No code of a checkpoint is run: whoever loads a model, a tokenizer or a configuration says so, and is obeyed."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from oracle import Subject

import remote_mediation
from remote_mediation.engine.remote import NdifBackend
from remote_mediation.engine.server import Server
from remote_mediation.errors import MediationError, PreflightError
from remote_mediation.judges import load_judge

PACKAGE = Path(remote_mediation.__file__).parent
SCRIPTS = Path(__file__).parents[1] / "scripts"
SAFE = {"GenerationConfig", "PeftModel", "type(module)"}
"""Settings, weights on a model that is there, and a class that is already chosen: none of them takes code."""


def sources() -> Iterator[Path]:
    """Python files of the package and of the scripts, which have no suffix."""
    yield from PACKAGE.rglob("*.py")
    for path in SCRIPTS.rglob("*"):
        if path.is_file() and (path.suffix == ".py" or path.read_bytes().startswith(b"#!/usr/bin/env python")):
            yield path


def loads(source: str) -> list[ast.Call]:
    """Calls that load by name, of Hugging Face or of nnsight."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if (isinstance(call.func, ast.Name) and call.func.id in ("TransformersModel", "LanguageModel", "pipeline"))
        or (
            isinstance(call.func, ast.Attribute)
            and call.func.attr in ("from_pretrained", "from_config")
            and ast.unparse(call.func.value) not in SAFE
        )
    ]


def refuses(call: ast.Call) -> bool:
    said = {keyword.arg: keyword.value for keyword in call.keywords}
    value = said.get("trust_remote_code")
    # A pipeline of a model that is there loads nothing, nor does nnsight of a module.
    there = isinstance(call.func, ast.Name) and (
        (call.func.id == "pipeline" and {"model", "tokenizer"} <= said.keys())
        or (call.func.id == "TransformersModel" and ast.unparse(call.args[0]) == "module")
    )
    return there or (isinstance(value, ast.Constant) and value.value is False)


def test_whatever_loads_refuses_code() -> None:
    found = {path: loads(path.read_text("utf-8")) for path in sources()}
    assert sum(map(len, found.values())) >= 15
    bad = [f"{path.name}:{call.lineno}" for path, calls in found.items() for call in calls if not refuses(call)]
    assert bad == []


def test_what_does_not_refuse_is_found() -> None:
    for source in (
        "AutoModel.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "TransformersModel(name)",
        "AutoModelForCausalLM.from_config(config)",
        "pipeline('text-classification', model)",
    ):
        (call,) = loads(source)
        assert not refuses(call), source


@pytest.fixture
def hostile(subject: Callable[[str], Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that asks for its own code, and a user who says yes to every question."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in Path(subject("llama").info.name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    settings |= {"model_type": "mine", "auto_map": dict.fromkeys(kinds, "mine.Mine")}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "mine.py").write_text("raise AssertionError('this was run')\n", "utf-8")
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    return folder


@pytest.mark.parametrize("kind", ["classifier:{}:unsafe", "embedding:{}", "openings+embedding:{}", "model:{}"])
def test_a_judge_runs_no_code_of_its_model(hostile: Path, kind: str) -> None:
    with pytest.raises(MediationError, match="contains custom code") as found:
        load_judge(kind.format(hostile))(["how"], ["so"])
    assert "this was run" not in str(found.value)


def test_a_remote_study_runs_no_code_of_its_model(hostile: Path) -> None:
    with pytest.raises(MediationError, match="contains custom code") as found:
        NdifBackend(str(hostile), "", Server("http://127.0.0.1:1", ""), lambda line: None)
    assert "this was run" not in str(found.value)


def test_a_model_that_no_server_can_run_is_refused(subject: Callable[[str], Subject], tmp_path: Path) -> None:
    source = Path(subject("llama").info.name)
    settings = json.loads((source / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "return_dict": False}), "utf-8")
    with pytest.raises(
        PreflightError, match=r"has return_dict = false in its config.json, with which a server can run"
    ):
        NdifBackend(str(tmp_path), "", Server("http://127.0.0.1:1", ""), lambda line: None)
