"""Is what a run folder was begun with still what it was? Models and files are known by content, not by name.

A folder goes on only with the same model, and with the same other files that its analyses read: hard negatives,
checkpoints, judges, and a hub's model on this machine. Folders of older versions hold less; what they hold is compared,
and a line says so where that leaves a change possible that nobody would see.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from remote_mediation.config import StudyConfig
from remote_mediation.digests import content, sampled
from remote_mediation.errors import ModelError, StoreError
from remote_mediation.judges.embedding import EMBEDDING, ENCODER, OPENINGS_AND_EMBEDDING
from remote_mediation.models import dated_fingerprint, fingerprint, hub_contents
from remote_mediation.pairs import load_pairs
from remote_mediation.paths import expanded
from remote_mediation.sites import ModelInfo
from remote_mediation.subspaces import Direction
from remote_mediation.texts import load_texts

Hashed = Callable[[Path], str]
# Kinds of judges that are models.
_JUDGE_MODELS = ("classifier", "model", EMBEDDING, OPENINGS_AND_EMBEDDING)
_BY_SAMPLES = (
    "%s was begun by a version that looked at samples of files of more than 2 GB: those of %s are as they were, and a "
    "change between them would not be seen"
)
_log = logging.getLogger(__name__)
# How the name of a local folder begins that can be nothing else.
LOCAL = ("/", "./", "../", "~")


def look_at(config: StudyConfig) -> None:
    """Read every file that a study names, before anything runs.

    Raises:
        PairsError, SettingsError, ModelError, SiteError: one of them cannot be used.
    """
    load_texts(config)
    config.prompt.form()
    if "monitor" in config.analyses and config.monitor.hard_negatives:
        load_pairs(config.monitor.hard_negatives)
    if config.directions.basis:
        Direction.load(Path(config.directions.basis))
    for setting, names in config.checkpoints.items():
        for name in names:
            if name.startswith(LOCAL) and not Path(name).is_dir():
                raise ModelError(f"{setting} names {name!r}, and there is no such folder; give one, or a hub id")


def as_begun(info: ModelInfo, begun: dict[str, Any], folder: Path) -> ModelInfo:
    """A model as a run folder names it in its row keys, so that what older versions measured stays valid.

    begun: what `run.json` holds; empty for a new run.

    Raises:
        StoreError: the files of the model have changed since.
    """
    if not begun:
        return info
    named: str = begun["model"].get("weights", "")
    same = info.weights in (named, begun.get("content", named))
    if not same and "content" not in begun:
        # Older versions noted names, sizes and times of some files, or nothing at all where there were none of these.
        same = named in ("", dated_fingerprint(info.name))
    if not same and begun.get("content") == fingerprint(info.name, sampled):
        _log.warning(_BY_SAMPLES, folder, repr(info.name))
        same = True
    if not same:
        raise StoreError(
            f"{folder} holds a run on other files of {info.name!r}: its weights, configuration or tokenizer have "
            "changed since; choose another --out"
        )
    return replace(info, weights=named)


def unchanged_files(config: StudyConfig, begun: dict[str, Any], folder: Path) -> dict[str, str]:
    """Hashes of the other files that a study reads, by setting and name, and those of earlier runs.

    Of a hub's model these are its own files too, as far as they are on this machine.

    Raises:
        StoreError: one of them has changed since the run was begun.
    """
    known: dict[str, str] = begun.get("files", {})
    found = _files(config, content)
    others = [name for name, digest in found.items() if known.get(name, digest) != digest]
    by_samples = _files(config, sampled) if others else {}
    for name in others:
        if known[name] != by_samples.get(name):
            raise StoreError(
                f"{folder} holds a run with another {name}: its content has changed since; choose another --out"
            )
        _log.warning(_BY_SAMPLES, folder, name)
    return {**known, **found}


def _files(config: StudyConfig, hashed: Hashed) -> dict[str, str]:
    """Those that are there, by setting and name. hashed: gives the hash of a file that may be large."""
    return {name: digest for name, digest in _every_file(config, hashed).items() if digest}


def _every_file(config: StudyConfig, hashed: Hashed) -> dict[str, str]:
    found: dict[str, str] = {}
    if config.backend == "local":
        contents = hub_contents(config.model, config.revision, hashed)
        found |= {f"{name} of {config.model!r}": digest for name, digest in contents.items()}
    if config.prompt.template:
        found[f"prompt.template {config.prompt.template!r}"] = _file(config.prompt.template)
    if "monitor" in config.analyses and config.monitor.hard_negatives:
        found[f"monitor.hard_negatives {config.monitor.hard_negatives!r}"] = _file(config.monitor.hard_negatives)
    if config.directions.basis:
        found[f"directions.basis {config.directions.basis!r}"] = _file(config.directions.basis)
    for setting, names in config.checkpoints.items():
        found |= {f"{setting} {name!r}": fingerprint(name, hashed) for name in names}
    if "intervene" in config.analyses or "attacks" in config.analyses:
        found |= _judge("intervene", config.intervene.judge, hashed)
    for name, settings in (("verify", config.verify), ("ablation", config.ablation)):
        if name in config.analyses:
            found |= _judge(name, settings.judge, hashed)
            found[f"{name}.labelled {settings.labelled!r}"] = _file(settings.labelled)
    return found


def _judge(section: str, spec: str, hashed: Hashed) -> dict[str, str]:
    """What a judge is made of, by its setting and its spec; nothing of one that is code of ours."""
    kind, _, rest = spec.partition(":")
    if kind == "python":
        return {f"{section}.judge {spec!r}": _judge_module(rest)}
    if kind not in _JUDGE_MODELS:
        return {}
    name = rest or ENCODER
    return {f"{section}.judge {f'{kind}:{name}'!r}": _judge_model(name, hashed)}


def _file(name: str) -> str:
    path = expanded(name)
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if path.is_file() else ""


def _judge_model(name: str, hashed: Hashed) -> str:
    """Of a judge's folder; the label of a classifier may stand behind it."""
    return fingerprint(name, hashed) or fingerprint(name.rpartition(":")[0] or name, hashed)


def _judge_module(rest: str) -> str:
    origin: str | None = None
    with contextlib.suppress(ImportError, ValueError):  # the judge's own loader says so
        found = find_spec(rest.partition(":")[0])
        origin = found.origin if found else None
    return _file(origin) if origin else ""
