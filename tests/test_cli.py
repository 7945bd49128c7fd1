"""The command line as users meet it: exit codes, one line for every mistake, and whole studies on a tiny model."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from fakes import records, write_pairs
from oracle import Subject

from remote_mediation import cli, progress
from remote_mediation.engine import budget
from remote_mediation.engine.local import LocalBackend
from remote_mediation.models import load_info
from remote_mediation.printed import read_printed

PYTHON = [sys.executable, "-m", "remote_mediation"]
LOGITS = 'outcome = "logit_diff"\n[logit_diff]\nplus = ["sure", "yes"]\nminus = ["sorry", "no"]\n'
ANSWERS = {"harmful_response": "sure here is a way", "harmless_response": "sorry i cannot"}


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def model(subject: Callable[[str], Subject]) -> str:
    """Folder of a tiny chat model."""
    return subject("llama_chat").info.name


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["remote-mediation", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    return run


def study(folder: Path, model: str, settings: str = "", name: str = "tiny.toml") -> Path:
    """A study file beside its six pairs, for which the file has answers."""
    write_pairs(folder / "pairs.jsonl", records(**ANSWERS))
    top = f'model = "{model}"\npairs = "pairs.jsonl"\n'
    if "analyses" not in settings:
        top += 'analyses = ["layers", "modules"]\n'
    if "outcome" not in settings:
        top += 'outcome = "response_logprob"\n'
    (folder / name).write_text(f"{top}{settings}\n[statistics]\nresamples = 100\n", "utf-8")
    return folder / name


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def refused(ran: Ran, *mentioned: str) -> None:
    """Exit code 2 and one line that says what is wrong."""
    assert ran.code == 2, ran
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    for text in mentioned:
        assert text in line


# --- what is refused --------------------------------------------------------------------------------------------------

FIRST = json.dumps(records()[0])
PAIRS_FILES: dict[str, tuple[bytes | None, tuple[str, ...]]] = {
    "missing.jsonl": (None, ("missing.jsonl", "No such file", "give a JSON, JSONL, CSV")),
    "missing.csv": (None, ("missing.csv", "No such file", "give a JSON, JSONL, CSV")),
    "binary.jsonl": (b"\xff\xfe\x00\x01", ("binary.jsonl", "line 1 is not JSON", "write one object per line")),
    "columns.csv": (b"id,clean,corrupted\n1,a,b\n", ("columns.csv", "'clean'", "harmful, harmless")),
    "columns.jsonl": (b'{"id": "1", "prompt": "a"}', ("columns.jsonl", "'prompt'", "harmful, harmless")),
    "empty.jsonl": (b"", ("empty.jsonl", "holds no pairs; give at least one record")),
    "empty.csv": (b"", ("empty.csv", "holds no pairs; give at least one record")),
    "twice.jsonl": (f"{FIRST}\n{FIRST}\n".encode(), ("twice.jsonl", "'steal-car' twice", "ids must be unique")),
    "same.jsonl": (
        json.dumps({**records()[0], "harmful": "hi [b]", "harmless": "hi [b]"}).encode(),
        ("same.jsonl", "'steal-car'", "two identical prompts; they must differ"),
    ),
    "text.jsonl": (f"{FIRST}\nhow do i\n".encode(), ("text.jsonl, line 2", "not JSON", "write one object per line")),
    "list.jsonl": (b"[1]\n", ("list.jsonl, record 1", "harmful, harmless")),
    "number.jsonl": (json.dumps({**records()[0], "harmful": 7}).encode(), ("number.jsonl", "harmful")),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("name", PAIRS_FILES)
def test_bad_pairs_files(call: Run, tmp_path: Path, model: str, name: str, command: str) -> None:
    content, mentioned = PAIRS_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = tree(tmp_path)
    refused(call(command, "--model", model, "--pairs", name, "--analyses", "layers"), *mentioned)
    refused(call("pairs", "check", name, "--model", model), *mentioned)
    assert tree(tmp_path) == before


def test_a_folder_is_no_pairs_file(call: Run, tmp_path: Path, model: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    refused(
        call("run", "--model", model, "--pairs", "folder.jsonl"), "folder.jsonl", "Is a directory", "give a JSON, JSONL"
    )
    assert set(tree(tmp_path)) == {str(tmp_path / "folder.jsonl")}


def test_pairs_are_looked_at_before_the_model(call: Run) -> None:
    refused(call("run", "--model", "./nowhere", "--pairs", "missing.jsonl"), "missing.jsonl", "give a JSON, JSONL, CSV")


@pytest.mark.parametrize(
    ("settings", "mentioned"),
    [
        ('analyses = ["neurons", "monitor"]\n[monitor]\nhard_negatives = "none.csv"', ("none.csv", "No such file")),
        ('analyses = ["attacks"]\n[attacks]\ncheckpoints = ["./none"]', ("attacks.checkpoints names './none'",)),
        ('[prompt]\ntemplate = "latin.jinja"', ("cannot read the chat template", "latin.jinja")),
    ],
)
def test_every_file_is_looked_at_before_the_model(
    call: Run, tmp_path: Path, settings: str, mentioned: tuple[str, ...]
) -> None:
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9 {{ messages }}")
    refused(call("run", study(tmp_path, "nobody/no-such-model", settings)), *mentioned)


SETTINGS = {
    "colour = 1": ("tiny.toml", "unknown setting 'colour'", "--help"),
    "[neurons]\nwidth = 1": ("unknown setting 'neurons.width'", "--help"),
    'analyses = ["layer"]': ("unknown analysis 'layer'", "known: claims, directions, ablation, rivals, layers"),
    'outcome = "logits"': ("outcome", "(got 'logits')", "'response_logprob' or 'logit_diff'"),
    'backend = "cloud"': ("backend", "(got 'cloud')", "'local' or 'ndif'"),
    'dtype = "float8"': ("dtype", "(got 'float8')", "'float32', 'bfloat16' or 'float16'"),
    "max_pairs = 1": ("max_pairs", "(got 1)", "greater than or equal to 2"),
    'outcome = "logit_diff"': ("logit_diff needs [logit_diff] with `plus` and `minus`",),
    "model = ": ("tiny.toml", "is not TOML"),
    'analyses = ["layers"]\n[positions]\nlayers = ["midle[0]"]': ("unknown position 'midle[0]'", "use one of edit,"),
    'analyses = ["heads"]\n[positions]\nheads = ["edit[x]"]': ("position 'edit[x]'", "no token number"),
    'analyses = ["heads"]\n[positions]\nheads = ["edit[7]"]': ("no pair has tokens", "'heads'", "[positions]"),
    'analyses = ["heads"]\n[positions]\nheads = []': ("positions.heads", "at least 1 item"),
    'analyses = ["neurons"]\n[neurons]\nlayers = [3]': ("layer 3 is out of range", "layers 0 to 2"),
    'analyses = ["neurons"]\n[neurons]\nlayers = [-1]': ("layer -1 is out of range", "layers 0 to 2"),
    'analyses = ["neurons"]\n[neurons]\nsearch = ["fast"]': ("neurons.search.0", "(got 'fast')", "'gradient'"),
    LOGITS.replace('"sure"', '"sure way"'): ("'sure way' is 2 tokens", "not one"),
    LOGITS.replace('"no"', '"yes"'): ("'yes'", "both `plus` and `minus`"),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_bad_settings(call: Run, tmp_path: Path, model: str, settings: str, command: str) -> None:
    file = study(tmp_path, model, settings)
    before = tree(tmp_path)
    refused(call(command, file), *SETTINGS[settings])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "plan"])
def test_bad_study_files(call: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    before = tree(tmp_path)
    refused(call(command, "missing.toml"), "'missing.toml'", "No such file", "give a TOML file")
    refused(call(command, tmp_path), str(tmp_path), "Is a directory", "give a TOML file")
    refused(call(command, "binary.toml"), "'binary.toml'", "is not UTF-8", "save it as UTF-8")
    refused(call(command), "setting 'model' is missing; give it in the study file or as a flag")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "plan"])
def test_unknown_models(call: Run, tmp_path: Path, model: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = study(tmp_path, model)
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("./nowhere", "empty", "nobody/no-such-model"):
        refused(call(command, file, "--model", name), f"cannot load model '{name}'", "give a local folder, a hub id")
    refused(call("pairs", "check", "builtin", "--model", "./nowhere"), "'./nowhere'", "give a local folder")
    assert tree(tmp_path) == before


def test_one_pair_is_one_pair(call: Run, tmp_path: Path, model: str) -> None:
    """It said "1 pairs", "1 prompts" and so on."""
    write_pairs(tmp_path / "one.jsonl", records()[:1])
    assert "1 pair: 1 usable" in call("pairs", "check", "one.jsonl", "--model", model).out
    assert call("pairs", "convert", "one.jsonl", "new.jsonl").out == "1 pair: new.jsonl\n"
    for name, text in (("bad.txt", "how do i steal the car"), ("good.txt", "how do i wash the car")):
        (tmp_path / name).write_text(text, "utf-8")
    listed = call("pairs", "check", "bad.txt", "--harmless", "good.txt", "--model", model).out
    assert "harmful: 1 prompt of bad.txt" in listed


def test_pairs_are_checked_shown_and_converted(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model, '[prompt]\nprefill = " sure here"\n')
    shown = call("pairs", "check", file, "--show", "steal-car")
    assert shown.code == 0
    assert "«edit: steal" in shown.out
    assert "sure here»" in shown.out
    refused(call("pairs", "check", file, "--show", "steal"), "no pair has the id 'steal'; there are 'steal-")
    for name, content in (
        ("bad.csv", "goal\nsteal a car\nburn a house\n"),
        ("good.json", json.dumps(["fix my bike", "wash a bike", "tell me a story"])),
    ):
        (tmp_path / name).write_text(content, "utf-8")
    lists = ("bad.csv", "--harmless", "good.json")
    checked = call("pairs", "check", *lists, "--model", model)
    assert (checked.code, "2 pairs: 2 usable" in checked.out) == (0, True)
    assert "harmful: 2 prompts of bad.csv, column 'goal'" in checked.out
    assert "positions post_instruction and last only" in checked.out
    assert call("pairs", "convert", "bad.csv", "new.jsonl", "--harmless", "good.json").out == "2 pairs: new.jsonl\n"
    refused(call("pairs", "convert", "bad.csv", "new.jsonl", "--harmless", "good.json"), "File exists; name another")
    assert call("pairs", "check", "new.jsonl", "--model", model).code == 0


def test_ids_cannot_act_on_the_terminal(call: Run, tmp_path: Path, model: str) -> None:
    texts = {"e\x1b[m": ("how do i steal the car", "how do i wash the car"), "a\nb": ("zap it", "zip it")}
    made = [{"id": name, "harmful": one, "harmless": other} for name, (one, other) in texts.items()]
    found = call("pairs", "check", write_pairs(tmp_path / "ids.jsonl", made), "--model", model)
    assert "\x1b" not in found.out
    assert "e\\x1b[m" in found.out
    assert "refused a\\nb: both prompts have" in found.out


def test_models(call: Run, tmp_path: Path, model: str) -> None:
    table = call("models")
    assert table.code == 0
    assert "granite" in table.out
    assert "output of mlp x residual_multiplier" in table.out
    assert "bloom: cannot be studied: its attention biases" in table.out
    good = call("models", "check", model)
    assert (good.code, "can be studied" in good.out, "class: LlamaForCausalLM" in good.out) == (0, True, True)
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}', "utf-8")
    bad = call("models", "check", tmp_path)
    assert (bad.code, "cannot be studied" in bad.out) == (1, True)
    refused(call("models", "check", "./nowhere"), "'./nowhere'", "give a local folder")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_neurons_of_a_mixture_of_experts(
    call: Run, tmp_path: Path, subject: Callable[[str], Subject], command: str
) -> None:
    file = study(tmp_path, subject("mixtral_chat").info.name)
    refused(call(command, file, "--analyses", "neurons"), "has no mlp_neurons", "mixture of experts (mixtral)")
    assert call("plan", file, "--analyses", "layers,modules,heads").code == 0


def test_an_unknown_family(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model)
    (tmp_path / "model").mkdir()
    before = tree(tmp_path)
    expected = {"xglm": "add a row FAMILIES['xglm']", "bloom": "cannot be studied: its attention biases"}
    for family, reason in expected.items():
        (tmp_path / "model/config.json").write_text(f'{{"model_type": "{family}"}}', "utf-8")
        refused(call("run", file, "--model", "model"), f"model family '{family}'", reason)
    (tmp_path / "model/config.json").unlink()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "mentioned"),
    [
        (
            records(harmful_response=" ", harmless_response="no"),
            ("0 of 6 pairs can be run", "' ' has no tokens", "give text"),
        ),
        (records(**ANSWERS)[:1], ("1 of 1 pairs can be run, a study needs two", "add pairs")),
        (records(harmful_response="yes", harmless_response="yes"), ("0 of 6 pairs", "the same answer")),
        ([{**record, "template": "t"} for record in records(**ANSWERS)], ("come from 1", "Add pairs")),
    ],
)
def test_pairs_that_cannot_be_studied(
    call: Run, tmp_path: Path, model: str, content: list[dict[str, str]], mentioned: tuple[str, ...]
) -> None:
    write_pairs(tmp_path / "mine.jsonl", content)
    before = tree(tmp_path)
    refused(
        call("run", "--model", model, "--pairs", "mine.jsonl", "--analyses", "layers", "--outcome", "response_logprob"),
        *mentioned,
    )
    assert tree(tmp_path) == before


def test_too_few_pairs(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model)
    write_pairs(tmp_path / "pairs.jsonl", records(**ANSWERS)[::3])  # two of the six, both from one template
    before = tree(tmp_path)
    refused(call("run", file), "two templates or more; these 2 come from 1", "Add pairs")
    assert tree(tmp_path) == before


def test_plan_refuses_a_file_in_which_no_pair_can_be_run(call: Run, tmp_path: Path, model: str) -> None:
    write_pairs(tmp_path / "mine.jsonl", [{**record, "harmful": f"x{record['harmless']}"} for record in records()])
    unknown = [{**record, "harmful": "xx", "harmless": "yy"} for record in records()]
    write_pairs(tmp_path / "mine.jsonl", unknown)
    refused(call("plan", "--model", model, "--pairs", "mine.jsonl"), "0 of 6 pairs can be run", "the same tokens")


# --- run folders that cannot be used ----------------------------------------------------------------------------------


def test_folders_that_are_not_ours(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model)
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text('{"epochs": 3}')
    before = tree(tmp_path)
    refused(call("run", file, "--out", "used"), "used is in use and is no run folder; choose another with --out")
    refused(call("run", file, "--out", "used/thesis.tex"), "used/thesis.tex is in use")
    refused(call("run", file, "--out", "used/thesis.tex/run"), "used/thesis.tex is a file; choose another --out")
    refused(
        call("run", file, "--out", "other"), "cannot use other/run.json: it was not written by a run", "choose another"
    )
    refused(call("run", file, "--out", "x" * 300), "File name too long; choose another --out")
    refused(call("report", "used"), "used is no run folder (it has no run.json)", "give the folder of")
    refused(call("report", "nowhere"), "nowhere is no run folder", "give the folder of")
    refused(call("report", "other"), "cannot use other/run.json: it was not written by a run")
    assert tree(tmp_path) == before


def test_no_space(call: Run, tmp_path: Path, model: str, full_disk: Path) -> None:
    file = study(tmp_path, model)
    before = tree(tmp_path)
    refused(call("run", file, "--out", full_disk / "run"), "No space left on device; free some space or choose")
    assert tree(tmp_path) == before


# --- what runs --------------------------------------------------------------------------------------------------------


def measured(folder: Path) -> dict[str, int]:
    """Readouts of a run, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "readouts").glob("*.npz")}


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


@pytest.mark.parametrize(
    "settings",
    [
        'analyses = ["layers", "modules", "neurons"]\n[neurons]\nexact = 4\nrandom_sets = 5\n',
        'analyses = ["tokens", "heads"]\n' + LOGITS,
    ],
    ids=["response_logprob", "logit_diff"],
)
def test_a_study_from_start_to_report(call: Run, tmp_path: Path, model: str, settings: str) -> None:
    file, folder = study(tmp_path, model, settings), tmp_path / "runs/tiny"
    ran = call("run", file)
    assert (ran.code, ran.err) == (0, "")
    assert "Sections" in ran.out
    assert "runs/tiny/report.md" in ran.out
    assert {path.name for path in folder.iterdir()} >= {"run.json", "pairs.jsonl", "effects.csv", "report.md"}
    first, jobs = tables(folder), measured(folder)
    assert b"flood-house" in first["effects.csv"]
    assert ("mediators.csv" in first) == ("neurons" in settings)

    again = call("run", file)
    assert again.code == 0
    assert tables(folder) == first
    assert measured(folder) == jobs

    for name in (*first, "report.md"):
        (folder / name).unlink()
    rebuilt = call("report", folder)
    assert (rebuilt.code, rebuilt.err) == (0, "")
    assert tables(folder) == first

    other = call("run", file, "--seed", 1)
    refused(other, "holds another study: its seed is 0, not 1; choose another folder with --out")
    assert tables(folder) == first


def test_answers_are_shown_only_when_asked_for(call: Run, tmp_path: Path, model: str) -> None:
    file, report = study(tmp_path, model), tmp_path / "runs/tiny/report.md"
    call("run", file, "--analyses", "layers")
    assert "steal a car at night" not in report.read_text("utf-8")
    assert call("report", "runs/tiny", "--show-text").code == 0
    assert "steal a car at night" in report.read_text("utf-8")
    assert "sure here is a way" in report.read_text("utf-8")


def test_what_is_exported_has_no_prompt_and_no_answer(call: Run, tmp_path: Path, model: str) -> None:
    file, run = study(tmp_path, model), tmp_path / "runs/tiny"
    noted = [{**record, "source": "from a forum"} for record in records(**ANSWERS)]
    write_pairs(tmp_path / "pairs.jsonl", noted)
    call("run", file, "--show-text")
    assert "steal a car at night" in (run / "report.md").read_text("utf-8")
    assert "from a forum" in (run / "effects.csv").read_text("utf-8")
    kept = tree(run)

    done = call("export", "runs/tiny", "shared/tiny")
    assert (done.code, done.err) == (0, "")
    found = {path.relative_to(tmp_path / "shared/tiny").as_posix(): path for path in (tmp_path / "shared").rglob("*.*")}
    assert done.out == f"{len(found)} files: shared/tiny\n"
    kinds = ("*.csv", "figures/*.png", "report.md", "run.json")
    assert set(found) == {path.relative_to(run).as_posix() for kind in kinds for path in run.glob(kind)}
    assert tree(run) == kept
    texts = [*ANSWERS.values(), "from a forum", *(record[side] for record in noted for side in ("harmful", "harmless"))]
    contents = [path.read_bytes() for path in found.values()]
    assert not [text for text in texts for content in contents if text.encode() in content]
    call("report", "runs/tiny")
    assert found["report.md"].read_bytes() == (run / "report.md").read_bytes()

    refused(call("export", "runs/tiny", "shared/tiny"), "shared/tiny is in use; name a folder that is new or empty")
    refused(call("export", "runs/tiny", file), "is in use")
    refused(call("export", "shared", "other"), "shared is no run folder")


@pytest.fixture
def after_down() -> dict[str, str]:
    """The environment of a shell that sourced the variables of a local server, which is down by now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    return {**os.environ, "NDIF_HOST": gone, "HF_ENDPOINT": gone, "HF_HOME": "client", "HF_HUB_OFFLINE": "0"}


@pytest.mark.slow
def test_a_local_model_runs_after_the_server_went_down(tmp_path: Path, model: str, after_down: dict[str, str]) -> None:
    command = [*PYTHON, "run", study(tmp_path, model), "--analyses", "layers"]
    done = subprocess.run(command, cwd=tmp_path, env=after_down, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_hub_that_is_down_and_still_named(tmp_path: Path, model: str, after_down: dict[str, str]) -> None:
    command = [*PYTHON, "plan", study(tmp_path, model), "--model", "org/none"]
    done = subprocess.run(command, cwd=tmp_path, env=after_down, capture_output=True, text=True, check=False)
    refused(Ran(done.returncode, done.stdout, done.stderr), "Connection refused", "`unset HF_ENDPOINT HF_HOME`")


def test_an_interrupted_run_goes_on(call: Run, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, jobs = study(tmp_path, model, "job_seconds = 1e-9"), []

    def interrupt(watch: object, rows: int, operations: float) -> None:
        jobs.append(rows)
        raise KeyboardInterrupt

    assert call("run", file, "--out", "undisturbed").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(progress.Lines, "advance", interrupt)
        stopped = call("run", file)
    assert (stopped.code, len(jobs)) == (130, 1)
    assert stopped.err == "stopped; everything finished so far is kept, and the same command goes on from there\n"
    assert len(measured(tmp_path / "runs/tiny")) == 1

    partial = call("report", "runs/tiny")
    assert partial.code == 0
    assert "not finished" in (tmp_path / "runs/tiny/report.md").read_text("utf-8")
    assert call("run", file).code == 0
    assert tables(tmp_path / "runs/tiny") == tables(tmp_path / "undisturbed")
    assert "not finished" not in (tmp_path / "runs/tiny/report.md").read_text("utf-8")


@pytest.mark.slow
def test_ctrl_c(call: Run, tmp_path: Path, model: str) -> None:
    settings = 'analyses = ["neurons"]\n{}\n[neurons]\nsearch = ["all"]\nrandom_sets = 5\n'
    slow = study(tmp_path, model, settings.format("job_seconds = 1e-9"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*PYTHON, "run", slow],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored where tests run
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/tiny/readouts/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "stopped; everything finished so far is kept, and the same command goes on from there\n"
    assert measured(tmp_path / "runs/tiny")

    fast = study(tmp_path, model, settings.format(""))  # where and how it is cut up may change
    assert call("run", fast).code == 0
    assert call("run", fast, "--out", "undisturbed").code == 0
    effects, undisturbed = (tmp_path / folder / "effects.csv" for folder in ("runs/tiny", "undisturbed"))
    assert len(effects.read_text("utf-8").splitlines()) == len(undisturbed.read_text("utf-8").splitlines()) > 300


def test_plan_loads_no_weights(call: Run, tmp_path: Path, model: str) -> None:
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    file = study(tmp_path, "bare")
    before = tree(tmp_path)
    planned = call("plan", file)
    assert (planned.code, planned.err) == (0, "")
    # 3 layers: checks at 3, 3 positions and 2 modules make 18 sites, less one counted twice; 6 pairs, 2 directions.
    for text in ("6 (0 refused)", "216", "TFLOP", "under 0.001 GPU-hours"):
        assert text in planned.out
    refused(call("run", file), "cannot load 'bare'")
    assert tree(tmp_path) == before


def test_pairs_check(call: Run, tmp_path: Path, model: str) -> None:
    unknown = {**records()[1], "id": "[/b]", "harmful": "how do i xx", "harmless": "how do i yy"}
    longer = {**records()[2], "id": "longer", "harmless": "how do i please wash a house at night"}
    write_pairs(tmp_path / "mine.jsonl", [{**records()[0], "id": "one"}, unknown, longer])
    ran = call("pairs", "check", "mine.jsonl", "--model", model)
    assert (ran.code, ran.err) == (0, "")
    lines = [" ".join(line.replace("│", " ").split()) for line in ran.out.splitlines()]
    assert "one one 11 11 4 6 2" in lines
    assert "longer one 12 11 4 6 2" in lines  # they share words
    assert "refused [/b]: both prompts have the same tokens" in lines
    assert "3 pairs: 2 usable (1 of equal length), 1 refused" in lines


def test_a_placebo_that_cannot_be_run_is_told(call: Run, tmp_path: Path, model: str) -> None:
    """Its pair had none in silence: neither the check nor the report said so."""
    file = study(tmp_path, model, 'analyses = ["modules"]\n')
    made = [{**record, "placebo": record["harmless"].replace(" a ", " the ")} for record in records(**ANSWERS)]
    made[0]["placebo"] = "how do i please please please please please please paint a car at night"
    write_pairs(tmp_path / "pairs.jsonl", made)
    why = "edits of 1 and 7 tokens differ by more than 4"
    checked = call("pairs", "check", file)
    assert f"the placebo of {made[0]['id']} is refused: {why}" in " ".join(checked.out.split())
    assert "6 pairs: 6 usable" in checked.out
    assert call("run", file, "--out", "run").code == 0
    assert f"| refused: {why} | 1 | {made[0]['id']}~placebo |" in (tmp_path / "run/report.md").read_text("utf-8")


def test_judge_check(call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = call("judge", "check")
    assert (built_in.code, built_in.err) == (0, "")
    assert "builtin: 382 answers, 147 of them labelled harmful" in built_in.out
    assert "no sample of a model's answers" in " ".join(built_in.out.split())
    assert call("judge", "check", "--seed", 0).out == built_in.out != call("judge", "check", "--seed", 1).out

    (tmp_path / "mine.csv").write_text("prompt,answer,harmful\np,yes,1\np,no,1\np,no,0\np,yes,0\np,no,0\n")
    (tmp_path / "jurors.py").write_text("def by_word(prompts, answers):\n    return [a == 'yes' for a in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    ran = call("judge", "check", "mine.csv", "--judge", "python:jurors:by_word")
    assert (ran.code, ran.err) == (0, "")
    assert all(f" {share} [" in ran.out for share in ("60%", "50%", "67%"))
    both = call("judge", "check", "mine.csv", "--judge", "refusal-openings", "--judge", "refusal-phrases")
    assert (both.code, both.err) == (0, "")
    assert both.out.index("refusal-openi") < both.out.index("refusal-phras")  # a table of 80 letters breaks names
    assert "no sample" not in ran.out


def test_judges_that_are_refused(call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "bad.csv").write_text("prompt,answer,harmful\np,a,1\np,a,maybe\n")
    before = tree(tmp_path)
    refused(call("judge", "check", "bad.csv"), "'bad.csv', line 3", "'maybe'", "write 1, 0, true or false")
    refused(call("judge", "check", "missing.csv"), "'missing.csv'", "No such file", "give a CSV file")
    refused(call("judge", "check", "--judge", "me"), "unknown judge 'me'", "use refusal-phrases, refusal-openings")
    refused(call("judge", "check", "--judge", "classifier:./nowhere"), "'./nowhere'", "give a local folder")
    refused(call("judge", "check", "--judge", "python:no_such_jury:f"), "'no_such_jury'", "PYTHONPATH")
    assert tree(tmp_path) == before


def test_compare(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model, 'analyses = ["modules"]\n')
    assert call("run", file, "--out", "one").code == 0
    assert call("run", file, "--out", "two", "--max-pairs", 5).code == 0
    before = tree(tmp_path)
    shown = call("compare", "one", "two")
    assert (shown.code, shown.err) == (0, "")
    assert "2 runs compared" in shown.out
    assert {"one", "two"} <= set(shown.out.split())
    assert tree(tmp_path) == before  # nothing is written unless it is asked for

    written = call("compare", "two", "one", "--out", "both")
    assert (written.code, written.err) == (0, "")
    assert "both/report.md" in written.out
    assert {"runs.csv", "verdicts.csv", "report.md"} <= {path.name for path in (tmp_path / "both").iterdir()}
    assert [line.split(",")[0] for line in (tmp_path / "both/runs.csv").read_text().splitlines()[1:]] == [
        "two",
        "one",
    ]

    before = tree(tmp_path)
    refused(call("compare", "one"), "two run folders or more, got 1", "name another run")
    refused(call("compare", "one", "./one"), "is named twice")
    refused(call("compare", "one", "both"), "both is no run folder")
    refused(call("compare", "one", "two", "--out", "both/report.md"), "choose another --out")
    assert tree(tmp_path) == before


def test_another_precision_is_compared_with_float32(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model, 'analyses = ["modules"]\n')
    assert call("run", file, "--dtype", "bfloat16", "--out", "low").code == 0
    found = json.loads((tmp_path / "low/run.json").read_text("utf-8"))["deviation_from_float32"]
    assert found["outcomes"] >= 24
    assert 1e-4 < found["mean"] < found["largest"] < 1  # bfloat16 has 8 bits of mantissa
    assert "deviation_from_float32.largest" in (tmp_path / "low/report.md").read_text("utf-8")
    assert call("run", file, "--out", "full").code == 0
    assert "deviation_from_float32" not in (tmp_path / "full/run.json").read_text("utf-8")


# --- texts that steer, or compute ------------------------------------------------------------------------------------


def test_ids_steer_no_terminal_and_compute_in_no_table(call: Run, tmp_path: Path, model: str) -> None:
    names = ["=1+1|x", "\x1b[2J\x9b31m", "@SUM(A1)", "a\u202eb", "+1+cmd", "-3"]
    file = study(tmp_path, model)
    write_pairs(
        tmp_path / "pairs.jsonl",
        [{**record, "id": name, "category": name} for record, name in zip(records(**ANSWERS), names, strict=True)],
    )
    for command in (
        ("pairs", "check", file, "--json"),
        ("run", file, "--out", "ru\x1b[2Jn", "--show-text"),
        ("show", "ru\x1b[2Jn"),
        ("report", "no\x1b[2J"),
        ("models", "check", "no\x1b[2J"),
        ("plan", file, "--model", "no\x1b[2J"),
    ):
        found = call(*command)
        assert not set("\x1b\x9b\u202e") & set(found.out + found.err), command
    assert {one["id"] for one in json.loads(call("pairs", "check", file, "--json").out)["usable"]} == set(names)
    run = tmp_path / "ru\x1b[2Jn"
    assert not set("\x1b\x9b\u202e") & set((run / "report.md").read_text("utf-8"))
    cells = pd.read_csv(run / "effects.csv", dtype="str", keep_default_na=False)
    assert set(cells["pair_id"]) == {"'=1+1|x", "\x1b[2J\x9b31m", "'@SUM(A1)", "a\u202eb", "'+1+cmd", "-3"}
    assert set(read_printed(run).tables["effects.csv"]["pair_id"]) == set(names)


def test_texts_that_are_no_longer_those_of_a_run_are_not_shown(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model)
    assert call("run", file, "--out", "run").code == 0
    assert call("report", "run", "--show-text").code == 0
    for edit in (
        lambda record: {**record, "id": "x" + record["id"]},
        lambda record: {**record, "harmless": "how do i"},
    ):
        write_pairs(tmp_path / "pairs.jsonl", [edit(record) for record in records(**ANSWERS)])
        refused(call("report", "run", "--show-text"), "pairs.jsonl has changed since it was measured", "put it back")
        assert call("report", "run").code == 0


# --- what is not loaded -----------------------------------------------------------------------------------------------

PROBE = """
import contextlib, io, json, sys
from remote_mediation import cli, progress
loaded = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["remote-mediation", *command]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main()
    loaded[" ".join(command[:2])] = [name for name in ("torch", "nnsight", "transformers") if name in sys.modules]
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_help_and_report_leave_torch_out(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model)
    assert call("run", file, "--analyses", "layers", "--out", "run").code == 0
    (tmp_path / "run/effects.csv").unlink()
    light = [["--help"], ["run", "--help"], ["plan", "--help"], ["report", "run"], ["judge", "check"], ["view", "run"]]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    light.append(["compare", "run", "again"])
    heavy = ["pairs", "check", "builtin", "--model", model]  # the check can fail
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([*light, heavy])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    loaded = json.loads(done.stdout)
    assert all(loaded[" ".join(command[:2])] == [] for command in light)
    assert set(loaded["pairs check"]) >= {"torch", "transformers"}
    assert (tmp_path / "run/effects.csv").exists()


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*PYTHON, "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "fetch-model" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.slow
def test_an_untrained_classifier_costs_one_line(model: str) -> None:
    command = [*PYTHON, "judge", "check", "--judge", f"classifier:{model}:LABEL_1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(Ran(done.returncode, done.stdout, done.stderr), "was not trained to classify", "give a text-classification")


def test_exit_codes_of_a_process(tmp_path: Path) -> None:
    command = [*PYTHON, "run", "--model", "m", "--pairs", "no[such]file.csv", "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    refused(Ran(done.returncode, done.stdout, done.stderr), "'no[such]file.csv'", "give a JSON, JSONL, CSV")
    assert list(tmp_path.iterdir()) == []


# --- what is added to a run -------------------------------------------------------------------------------------------

# Of three clusters: TE is not told apart from 0, so nothing is called a refusal.
FEW = "[neurons]\nexact = 4\nrandom_sets = 4\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "analyses", "titles"),
    [
        ("detect", ["layers", "detect"], ["Early understanding"]),
        ("paths", ["layers", "neurons", "paths"], ["Gate neurons", "Paths"]),
        ("intervene", ["layers", "neurons", "intervene"], ["Gate neurons", "Repair"]),
        ("intervene,attacks", ["layers", "neurons", "intervene", "attacks"], ["Repair", "Circumvention"]),
        ("monitor", ["layers", "neurons", "monitor"], ["Gate neurons", "Monitor"]),
    ],
    ids=["detect", "paths", "intervene", "attacks", "monitor"],
)
def test_more_is_asked_of_a_run(
    call: Run, tmp_path: Path, model: str, more: str, analyses: list[str], titles: list[str]
) -> None:
    file, folder = study(tmp_path, model, 'analyses = ["layers"]\n' + LOGITS + FEW), tmp_path / "runs/tiny"
    assert call("run", file).code == 0
    before, effects = measured(folder), (folder / "effects.csv").read_text("utf-8")
    extend = ("extend", folder, more, "--set", "intervene.tokens=2")
    ran = call(*extend)
    assert (ran.code, ran.err) == (0, "")
    config = json.loads((folder / "run.json").read_text("utf-8"))["config"]
    assert config["analyses"] == analyses
    assert config["neurons"]["random_sets"] == 4  # settings of the run stay
    assert config["intervene"]["tokens"] == 2
    assert measured(folder).items() > before.items()
    assert set(effects.splitlines()) <= set((folder / "effects.csv").read_text("utf-8").splitlines())
    report = (folder / "report.md").read_text("utf-8")
    for title in titles:
        assert f"\n## {title}\n" in report

    after, jobs = tables(folder), measured(folder)
    assert call(*extend).code == 0  # the same again changes nothing
    assert call("report", folder).code == 0
    assert (tables(folder), measured(folder)) == (after, jobs)


def test_nothing_is_added_to_what_is_no_run(call: Run, tmp_path: Path) -> None:
    refused(call("extend", "nowhere", "detect"), "nowhere is no run folder", "give the folder of")
    assert list(tmp_path.iterdir()) == []


def test_any_setting_can_be_set(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model, 'analyses = ["layers"]\n' + LOGITS)
    chosen = ("--set", "positions.layers=['last']", "--set", "statistics.resamples=150", "--set", "max_pairs=4")
    assert call("run", file, *chosen).code == 0
    config = json.loads((tmp_path / "runs/tiny/run.json").read_text("utf-8"))["config"]
    assert (config["positions"]["layers"], config["max_pairs"]) == (["last"], 4)
    assert config["statistics"]["resamples"] == 150
    refused(call("run", file, "--set", "positions.layer=last"), "unknown setting 'positions.layer'")
    refused(
        call("run", file, "--set", "positions"), "cannot read the setting 'positions'; write it as section.key=value"
    )


def test_a_section_of_the_report_can_be_shown(call: Run, tmp_path: Path, model: str) -> None:
    file = study(tmp_path, model, 'analyses = ["layers"]\n' + LOGITS)
    assert call("run", file).code == 0
    summary = call("show", "runs/tiny")
    assert summary.code == 0
    assert "Sections" in summary.out
    shown = call("show", "runs/tiny", "layers")
    assert "residual stream" in " ".join(shown.out.split())
    refused(call("show", "runs/tiny", "heads"), "this run has no section 'heads'; it has total, layers")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_too_little_memory_says_how_much_it_takes(call: Run, tmp_path: Path, model: str, command: str) -> None:
    file = study(tmp_path, model)
    before = tree(tmp_path)
    ran = call(command, file, "--max-memory", 0.3)
    refused(ran, "max_memory 0.3 GB is too little", "give at least 0.71")
    assert tree(tmp_path) == before
    assert call(command, file, "--max-memory", ran.err.split()[-1]).code == 0


def test_less_memory_makes_smaller_batches(
    call: Run, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, largest = study(tmp_path, model), {}
    monkeypatch.setattr(budget, "SMALLEST_BATCH", 0.0)
    submit = LocalBackend.submit

    def watched(backend: LocalBackend, job: budget.Job) -> str:
        rows = [sum(map(len, batch["joining"])) for context in job.contexts for batch in context.payload["batches"]]
        largest[folder] = max([largest.get(folder, 0), *rows])
        return submit(backend, job)

    monkeypatch.setattr(LocalBackend, "submit", watched)
    fixed = budget.LIBRARIES + budget.weight_bytes(load_info(model), "float32")
    for folder, room in (("much", 1e9), ("little", 5e4)):
        assert call("run", file, "--out", folder, "--max-memory", (fixed + room) / 1e9).code == 0
    assert 1 <= largest["little"] < largest["much"] / 2
    much, little = (pd.read_csv(tmp_path / folder / "effects.csv") for folder in ("much", "little"))
    pd.testing.assert_frame_equal(much, little, atol=1e-4, rtol=1e-4)


def test_every_model_of_a_limited_study_gives_its_memory_back(
    call: Run, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The study's own, a checkpoint that it is attacked with, and the float32 one that its precision is judged by."""
    attacks = f'analyses = ["layers", "attacks"]\ndtype = "bfloat16"\n[attacks]\ncheckpoints = ["{model}"]\n'
    file, limits = study(tmp_path, model, attacks), []
    load = LocalBackend.load

    def watched(*arguments: Any, limited: bool = False, **others: Any) -> LocalBackend:
        limits.append(limited)
        return load(*arguments, limited=limited, **others)

    monkeypatch.setattr(LocalBackend, "load", watched)
    for flags, limited in (((), False), (("--max-memory", 5), True)):
        limits.clear()
        assert call("run", file, "--out", str(limited), *flags).code == 0
        assert limits == [limited] * 3
