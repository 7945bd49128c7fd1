"""What another needs to run a study again: its settings, prompts and openings, and the versions that it ran with.

Prompts are given away here, answers are not: neither those that a pairs file gives, nor labelled ones. Models stay
where they are, too. The settings name every file from the folder that they lie in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from remote_mediation.config import StudyConfig
from remote_mediation.contents import LOCAL
from remote_mediation.errors import PairsError, SettingsError, StoreError
from remote_mediation.judges import BUILTIN
from remote_mediation.models import load_tokenizer
from remote_mediation.openings import given_openings
from remote_mediation.outcomes import RefusalOutcome, outcome_from
from remote_mediation.pairs import GivenOpenings, PromptPair, load_openings, load_pairs
from remote_mediation.paths import expanded, renamed
from remote_mediation.records import STANDARD_INPUT
from remote_mediation.store import Store
from remote_mediation.study import prompts_of, select, texts_digest
from remote_mediation.texts import load_texts, texts_lines
from remote_mediation.toml import toml_text

_STUDY, _PAIRS, _HARD, _TEMPLATE = "study.toml", "pairs.jsonl", "hard_negatives.jsonl", "template.jinja"
# Settings that say where a run lies, or which pairs it took: these are the ones in the folder.
_NOT_SETTINGS = ("out", "harmful", "harmless", "harmful_column", "harmless_column", "max_pairs")


def replica(store: Store) -> dict[str, str]:
    """The files of such a folder, by name.

    Raises:
        StoreError: the outcome compares answers of the pairs file, or the pairs are not those of the run.
        ModelError: the model chose its openings, and its tokenizer cannot be had.
    """
    record = store.record()
    config = store.config()
    pairs = select(_texts(config, record), config.max_pairs)
    if config.outcome == "response_logprob" and any(one.harmful_response or one.harmless_response for one in pairs):
        raise StoreError(
            f"{store.folder} compares answers that {config.source} gives, and answers are not exported: without them "
            "it cannot be run again; export without --replicate"
        )
    lacking: dict[str, str] = {}
    found = {
        _STUDY: toml_text(_settings(config, lacking)),
        _PAIRS: "".join(texts_lines(_without_answers(pairs), _openings(config, record))),
        "requirements.txt": _requirements(record),
    }
    if hard := _hard_negatives(config):
        found[_HARD] = "".join(texts_lines(_without_answers(load_pairs(hard))))
    if config.prompt.template and Path(config.prompt.template).is_file():
        found[_TEMPLATE] = config.prompt.form().template
    return {**found, "README.md": _readme(record, lacking)}


def _texts(config: StudyConfig, record: Mapping[str, Any]) -> Sequence[PromptPair]:
    """The pairs of a run as text, which the run folder does not hold."""
    if STANDARD_INPUT in (config.pairs, config.harmful, config.harmless):
        raise StoreError("the pairs of this run came from standard input and are gone; export without --replicate")
    try:
        texts, digest = load_texts(config), texts_digest(config)
    except PairsError as error:
        raise StoreError(f"{error}; export from the folder in which the run was begun") from error
    if digest != record.get("texts", digest):
        raise StoreError(f"{config.source} has changed since the run was begun; put it back as it was")
    return texts


def _hard_negatives(config: StudyConfig) -> str | None:
    return config.monitor.hard_negatives if "monitor" in config.analyses else None


def _without_answers(pairs: Iterable[PromptPair]) -> list[PromptPair]:
    return [replace(pair, harmful_response="", harmless_response="", notes=()) for pair in pairs]


def _openings(config: StudyConfig, record: Mapping[str, Any]) -> GivenOpenings | None:
    """Openings that the settings do not have: of the pairs file, or those that the model chose, as text.

    None where the text would give other tokens than the model's, so that they have to be chosen again.
    """
    outcome = outcome_from(record["outcome"])
    if not isinstance(outcome, RefusalOutcome) or config.refusal.compliant or config.refusal.openings != "own":
        return None
    if given := load_openings(config.pairs):
        return given
    if not outcome.openings:
        return None
    tokenizer = load_tokenizer(config.model, config.revision)
    compliant, refusing = (
        tuple(str(tokenizer.decode(opening)) for opening in side) for side in (outcome.compliant, outcome.refusing)
    )
    try:
        again = given_openings(compliant, refusing, tokenizer, prompts_of(config, tokenizer))
    except SettingsError:
        return None
    same = set(again.compliant) == set(outcome.compliant) and set(again.refusing) == set(outcome.refusing)
    return GivenOpenings(compliant, refusing) if same else None


def _settings(config: StudyConfig, lacking: dict[str, str]) -> dict[str, Any]:
    """Settings that name files from the folder they lie in. lacking: takes those that stay here, by their new name."""

    def aside(name: str) -> str:
        stem, number = Path(name).name, 2
        new = f"./{stem}"
        while lacking.get(new, name) != name:
            new, number = f"./{stem}-{number}", number + 1
        lacking[new] = name
        return new

    def perhaps(name: str) -> str:
        path = expanded(name)
        if path.is_file():
            return _TEMPLATE
        return aside(name) if path.is_dir() or name.startswith(LOCAL) else name

    left_out = dict.fromkeys((*_NOT_SETTINGS, "pairs"), True) | {"monitor": {"hard_negatives"}}
    settings = config.model_dump(mode="json", exclude=left_out, exclude_none=True)
    found = renamed(settings, lambda name: name if name == BUILTIN else aside(name), perhaps)
    hard = {"hard_negatives": _HARD} if _hard_negatives(config) else {}
    return {"pairs": _PAIRS, **found, "monitor": {**found["monitor"], **hard}}


def _requirements(record: Mapping[str, Any]) -> str:
    """Versions as pip takes them, without what tells builds of one version apart (`+cpu`)."""
    versions, commit = record["versions"], (record.get("git") or {}).get("commit", "no checkout")
    ours = f"# Python {versions['python']}; remote-mediation {versions['remote-mediation']}, commit {commit}"
    others = {name: version for name, version in versions.items() if name not in ("python", "remote-mediation")}
    pinned = [f"{name}=={version.partition('+')[0]}" for name, version in others.items() if version]
    return "\n".join([ours, *pinned]) + "\n"


def _readme(record: Mapping[str, Any], lacking: Mapping[str, str]) -> str:
    named = [f"- `{new}`, which was `{Path(old).name}`" for new, old in sorted(lacking.items())]
    kept = [
        "What the settings name and is not here is to be put beside them (a model goes with `--model FOLDER`, too);",
        "`content` and `files` in `run.json`, its and that of the new run, tell whether it is the same:",
        "",
        *named,
        "",
    ]
    lines = [
        "# To run this study again",
        "",
        "    pip install -r requirements.txt    # and remote-mediation, of the commit that it names",
        f"    remote-mediation run {_STUDY}",
        "",
        "The prompts are in here, some of them harmful, and no answers. What was measured before is in `effects.csv`, "
        "one folder up.",
        "",
        *(kept if named else []),
        f"Seed {record['config']['seed']}; it ran on the backend `{record['config']['backend']}`, in "
        f"{record['config']['dtype']}.",
    ]
    return "\n".join(lines) + "\n"
