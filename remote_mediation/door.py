"""The way in from Python: configuration, pairs, backend and run folder, made together and checked against each other.

    with open_lab("study.toml", out="runs/x") as lab:
        lab.effects([Site("mlp_output", 12, "all")])       # a table; stored, and free the second time
        lab.joint(band("mlp_output", range(20, 30), "last"))
        result = lab.run()
    open_run("runs/x").report()

The command line goes through the same functions.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from remote_mediation.analyses import chosen
from remote_mediation.config import StudyConfig, load_config
from remote_mediation.effects import Request
from remote_mediation.engine.backend import Backend
from remote_mediation.engine.rows import Row
from remote_mediation.errors import SettingsError
from remote_mediation.lab import Indirect, Lab
from remote_mediation.reference import compare_with_float32
from remote_mediation.report import PairText, write_report
from remote_mediation.result import Analysis, Result
from remote_mediation.runner import Watch
from remote_mediation.sites import Site, check_site, family_of
from remote_mediation.store import Store
from remote_mediation.study import check_backend, prepared_lab, reread, run_study
from remote_mediation.tokens import TokenPair

if TYPE_CHECKING:
    from remote_mediation.engine.tasks import Held

SET_EFFECT_COLUMNS: dict[str, str] = {
    "pair_id": "the prompt pair",
    "cluster": "what statistics resample",
    "split": "discovery or heldout",
    "te": "total effect, in the outcome's unit",
    "nie": "natural indirect effect of the set: is it sufficient?",
    "nde": "natural direct effect, te - tie: how much bypasses it?",
    "tie": "total indirect effect of the set: is it necessary?",
    "int": "interaction, te - nde - nie",
}


def open_lab(
    study: str | Path | StudyConfig,
    *,
    out: str | Path | None = None,
    backend: Backend | None = None,
    analyses: Sequence[str | Analysis] | None = None,
    watch: Watch | None = None,
    note: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> OpenLab:
    """A study that can be asked questions, with its run folder.

    study: a study file, or settings. out: run folder; `runs/NAME` by default. backend: an object that runs the jobs,
    made from the settings by default. analyses: names, or analyses of your own, in place of those of the study. watch,
    note: are told how far it is. settings: go over those of the study.

    Raises:
        SettingsError: a setting that is not allowed, or a backend of another model, revision or precision.
        StoreError: the run folder holds something else.
        BackendError, ModelError: the model cannot be had.
    """
    more = [one for one in analyses or () if isinstance(one, Analysis)]
    if analyses is not None:
        settings["analyses"] = [one.name if isinstance(one, Analysis) else one for one in analyses]
    if isinstance(study, StudyConfig):
        config, name = StudyConfig(**{**study.model_dump(), **settings}), "study"
    else:
        config, name = load_config(Path(study), settings), study_name(Path(study))
    chosen(config.analyses, more)  # refuses unknown ones before a model is loaded
    folder = Path(out) if out else config.out or Path("runs") / name
    store = Store.create(folder, config.identity())
    if backend is not None:
        check_backend(config, backend)
    return OpenLab(config, store, backend or load_backend(config, note), watch, note, more)


def study_name(file: Path) -> str:
    """What a study file names its run folder: itself, or the folder of a `study.toml`."""
    return file.resolve().parent.name if file.name == "study.toml" else file.stem


def open_run(folder: str | Path, *, analyses: Sequence[Analysis] = ()) -> OpenRun:
    """A run folder, finished or not; no model is needed. analyses: those of your own that it was measured with.

    Raises:
        StoreError: there is none.
    """
    return OpenRun(Store.open(Path(folder)), analyses)


def load_backend(config: StudyConfig, note: Callable[[str], None] = lambda line: None) -> Backend:
    """Where a study's settings say that it runs: on this machine, or on an NDIF server. Never one for the other.

    Raises:
        BackendError, ModelError, SiteError: it cannot.
    """
    if config.backend == "ndif":
        from remote_mediation.engine.remote import NdifBackend
        from remote_mediation.engine.server import server_from_environment

        return NdifBackend(config.model, config.revision, server_from_environment(), note, dtype=config.dtype)
    note(f"loading {config.model}")
    return _local(config, config.model, config.revision)


def load_variants(config: StudyConfig, note: Callable[[str], None] = lambda line: None) -> dict[str, Backend]:
    """The other checkpoints that a study's analyses run on, by name.

    Raises:
        SettingsError: it runs on a server, which has no such model.
    """
    from remote_mediation.fetch import checkpoint
    from remote_mediation.models import fingerprint

    found: dict[str, Backend] = {}
    for setting, names in config.checkpoints.items():
        if names and config.backend == "ndif":
            raise SettingsError(f"{setting} run locally only; deploy the checkpoint and study it as a model")
        for name in names:
            if name not in found:
                note(f"loading {name}")
                found[name] = _local(config, checkpoint(name, config.model, fingerprint(config.model)), "")
    return found


def _local(config: StudyConfig, name: str, revision: str) -> Backend:
    """A model on this machine as the study has its own: precision, devices, and whether memory is limited."""
    from remote_mediation.engine.local import LocalBackend

    loading, limited = config.load.loading(), config.max_memory is not None
    return LocalBackend.load(name, revision, config.dtype, config.device, loading=loading, limited=limited)


class OpenRun:
    """What a run folder holds."""

    def __init__(self, store: Store, more: Sequence[Analysis] = ()) -> None:
        """Use `open_run`."""
        self._store, self._more = store, more

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._store.folder

    def result(self) -> Result:
        """Effects, tables and summary, from the values measured so far."""
        return reread(self._store, self._more)

    def report(self, texts: Sequence[PairText] = ()) -> Path:
        """Write tables, figures and `report.md` anew. texts: pairs to show as text."""
        return write_report(self._store, self.result(), texts)

    def __repr__(self) -> str:
        record = self._store.record()
        state = "finished" if record.get("finished") else "unfinished"
        return f"<run {self.folder}: {record['study']['model']}, {state}>"


class OpenLab:
    """A study with its model and run folder. What it measures is stored, and costs nothing the second time."""

    def __init__(
        self,
        config: StudyConfig,
        store: Store,
        backend: Backend,
        watch: Watch | None = None,
        note: Callable[[str], None] = lambda line: None,
        more: Sequence[Analysis] = (),
    ) -> None:
        """Use `open_lab`."""
        self.config, self._store, self._backend, self._watch, self._note = config, store, backend, watch, note
        self._more = more
        self._made: Lab | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._made = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._store.folder

    @property
    def _lab(self) -> Lab:
        if self._made is None:
            self._made = prepared_lab(self.config, self._backend, self._store, self._watch, more=self._more)
        return self._made

    def pairs(self, split: str = "all") -> pd.DataFrame:
        """Pairs that can be run: `pair_id`, `cluster`, `category`, `split`, tokens of both prompts. split: or one."""
        splits = self._lab.study.splits()
        rows = [
            {
                "pair_id": pair.id,
                "cluster": pair.cluster,
                "category": pair.category,
                "split": splits[pair.id],
                "tokens_x0": len(pair.x0),
                "tokens_x1": len(pair.x1),
            }
            for pair in self._lab.pairs(split)
        ]
        return pd.DataFrame(rows)

    def effects(self, sites: Sequence[Site], pairs: str | Sequence[str] = "all") -> pd.DataFrame:
        """Effects of single sites, a row per site and pair (columns: `effects.EFFECT_COLUMNS`).

        pairs: a split (`all`, `discovery`, `heldout`) or ids.

        Raises:
            SiteError: the model has no such site.
            BackendError: a job could not be run.
        """
        lab, chosen = self._lab, self._chosen(pairs)
        requests = [Request("asked", pair, site) for pair in chosen for site in sites if pair.places(site.position).x0]
        return lab.measured(requests)

    def joint(self, sites: Sequence[Site], pairs: str | Sequence[str] = "all") -> pd.DataFrame:
        """Effects of one mediator of many sites, swapped together, a row per pair (`SET_EFFECT_COLUMNS`)."""
        chosen = self._chosen(pairs)
        return self._table(self._lab.joint([sites], chosen), chosen)

    def direct(self, sites: Sequence[Site], pairs: str | Sequence[str] = "all") -> pd.DataFrame:
        """Direct effects of contributions at `last` on the answer alone, a row per pair (`SET_EFFECT_COLUMNS`)."""
        chosen = self._chosen(pairs)
        return self._table(self._lab.direct([sites], chosen), chosen)

    def outcomes(self, rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Y of rows of the engine, in the outcome's unit; NaN where a row's pair failed."""
        return self._lab.outcomes(rows)

    def generate(self, pair: str, side: int = 1, tokens: int = 24, held: Sequence[Held] = ()) -> str:
        """The greedy answer to a prompt of a pair (side 1: the harmful one) while neurons are held."""
        (chosen,) = self._chosen([pair])
        (answer,) = self._lab.generate([chosen.prompts[side]], tokens, held)
        return str(self._backend.tokenizer.decode(answer, skip_special_tokens=True))

    @property
    def model(self) -> Any:
        """The traced nnsight model, for traces of your own; local or remote as the study says."""
        return self._backend.model

    def site(self, site: Site) -> Any:
        """The nnsight envoy at which a site's tensor passes: its `output`, or `input` (`sites.Hook`).

        Of a mixture the module of all its experts, or of the shared one; of keys and values, where one module gives
        them with the queries, that one.

        Raises:
            SiteError: the model has no such site.
        """
        from remote_mediation.engine.program import module_at

        info = self._backend.info
        check_site(site, info)
        family = family_of(info.family)
        block = module_at(self.model, family.blocks)[site.layer]
        return module_at(block, family.module(site.component))

    def run(self, variants: Mapping[str, Backend] | None = None) -> Result:
        """Measure all analyses of the study, going on from what its folder holds.

        variants: backends of the checkpoints that the study names; loaded by default.
        """
        config = self.config
        found = load_variants(config, self._note) if variants is None else variants
        result = run_study(config, self._backend, self._store, self._watch, found, self._more)
        if config.dtype != "float32" or config.load.quantization:
            load = partial(load_backend, note=self._note)
            compare_with_float32(self._store, config, self._backend.info, load, self._watch, self._more)
        return result

    def report(self, texts: Sequence[PairText] = ()) -> Path:
        """Write tables, figures and `report.md` of what was run. texts: pairs to show as text."""
        return open_run(self.folder, analyses=self._more).report(texts)

    def _chosen(self, pairs: str | Sequence[str]) -> list[TokenPair]:
        if isinstance(pairs, str):
            return list(self._lab.pairs(pairs))
        known = {pair.id: pair for pair in self._lab.pairs()}
        unknown = [name for name in pairs if name not in known]
        if unknown:
            raise SettingsError(f"{self.folder} has no pair {unknown[0]!r} that can be run; `lab.pairs()` lists them")
        return [known[name] for name in pairs]

    def _table(self, found: Indirect, pairs: Sequence[TokenPair]) -> pd.DataFrame:
        splits, te, nie, tie = self._lab.study.splits(), found.te, found.nie[0], found.tie[0]
        return pd.DataFrame(
            {
                "pair_id": [pair.id for pair in pairs],
                "cluster": found.clusters,
                "split": [splits[pair.id] for pair in pairs],
                **{"te": te, "nie": nie, "nde": te - tie, "tie": tie, "int": tie - nie},
            },
            columns=list(SET_EFFECT_COLUMNS),
        )

    def __repr__(self) -> str:
        config = self.config
        return f"<lab {self.folder}: {config.model} ({config.dtype}, {config.backend}), outcome {config.outcome}>"

    def _repr_html_(self) -> str:
        return f"<code>{html.escape(repr(self))}</code>"
