"""Where an analysis gets its numbers: it asks for rows, effects or tasks; what the run folder lacks is measured.

An analysis is straight-line code over a `Lab`. The same code runs when a report is rebuilt; then nothing can be
measured, and an analysis that asks for what an unfinished run does not have ends there (`UnmeasuredError`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import TypeAdapter

from remote_mediation.config import StudyConfig
from remote_mediation.effects import EFFECT_COLUMNS, Request, effects_table
from remote_mediation.engine.answers import NOT_FINITE_LOGITS
from remote_mediation.engine.backend import Backend
from remote_mediation.engine.budget import Setting, batch_budget
from remote_mediation.engine.jobs import Context
from remote_mediation.engine.pathrows import Way, sender_row, way_row
from remote_mediation.engine.payload import digest
from remote_mediation.engine.rows import Row, RowMaker, direct_row, swap_all, swaps
from remote_mediation.engine.samples import Manner, bare, sample_key
from remote_mediation.engine.tasks import Intervention, direct_readouts, direct_task, generate_task, sharing_x0
from remote_mediation.errors import JobError
from remote_mediation.models import ends_of_answers
from remote_mediation.openings import longest_answer
from remote_mediation.outcomes import Outcome, RefusalOutcome
from remote_mediation.pairs import PromptPair, placebo_id
from remote_mediation.runner import Runner, Watch
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.stats import split_clusters
from remote_mediation.store import Store
from remote_mediation.tokens import Prepared, Refusal, TokenPair, fitting, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts that are continued together.
_TOGETHER = 16
Floats = npt.NDArray[np.float64]
_Token = TypeVar("_Token", int, float)
_Noted = TypeVar("_Noted")
_IDS, _INFO = TypeAdapter(list[int]), TypeAdapter(ModelInfo)


class UnmeasuredError(Exception):
    """An analysis asked for what this run has not measured (yet)."""


@dataclass(frozen=True)
class Study:
    """Everything that is fixed before the first row runs."""

    config: StudyConfig
    """Settings."""
    info: ModelInfo
    """Shape of the model."""
    outcome: Outcome
    """What Y is."""
    pairs: tuple[TokenPair, ...]
    """Pairs that can be run, with their answers."""
    refusals: tuple[Refusal, ...]
    """Pairs that cannot, and why."""
    placebos: tuple[TokenPair, ...] = ()
    """For pairs that have one, the harmless prompt (x0) against its placebo (as x1); see `placebo_id`."""

    @property
    def setting(self) -> Setting:
        """What all rows share."""
        return Setting(self.info, self.config.dtype, self.outcome, self.config.load.quantization)

    def with_openings(self, outcome: RefusalOutcome) -> Study:
        """The study with the openings of its outcome, which stand behind every prompt."""
        pairs, placebos = (
            tuple(replace(pair, openings=outcome.openings) for pair in group) for group in (self.pairs, self.placebos)
        )
        return replace(self, outcome=outcome, pairs=pairs, placebos=placebos)

    def splits(self) -> dict[str, str]:
        """Discovery or heldout, by pair id; whole clusters."""
        clusters = np.array([pair.cluster for pair in self.pairs])
        split = split_clusters(clusters, np.random.default_rng(self.config.seed))
        return dict(zip((pair.id for pair in self.pairs), map(str, split), strict=True))


class Indirect(NamedTuple):
    """Indirect effects of some sites on some pairs, in the outcome's unit."""

    nie: Floats
    """`[site, pair]`"""
    tie: Floats
    """`[site, pair]`"""
    te: Floats
    """`[pair]`"""
    clusters: npt.NDArray[np.str_]
    """`[pair]`"""

    def means(self) -> Floats:
        """`[site, (nie, tie)]`, over the pairs that have a value."""
        return np.stack([np.nanmean(table, axis=1) for table in (self.nie, self.tie)], axis=1)


class Lab:
    """A study with its run folder and, while it is being measured, a backend."""

    def __init__(
        self,
        study: Study,
        store: Store,
        backend: Backend | None = None,
        watch: Watch | None = None,
        variants: Mapping[str, Backend] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        """Without a backend only what is in the run folder can be had.

        variants: other checkpoints of the model. splits: the study's own by default.
        """
        self.study, self.variants = study, variants or {}
        self._store, self._backend, self._watch = store, backend, watch
        self._splits = splits or study.splits()
        self._effects: list[pd.DataFrame] = []
        config, every = study.config, {pair.id: pair for pair in (*study.pairs, *study.placebos)}
        room = batch_budget(study.setting, config.max_memory, config.backend == "local")
        self._runner = Runner(study.setting, every, store, backend, watch, config.seconds_per_job, room)

    @property
    def can_measure(self) -> bool:
        """Whether there is a backend."""
        return self._backend is not None

    @property
    def known(self) -> int:
        """How many values are measured and at hand."""
        return len(self._runner.values)

    @property
    def effects(self) -> pd.DataFrame:
        """All effects measured so far, in the order in which they were asked for (columns: `EFFECT_COLUMNS`)."""
        frames = [frame for frame in self._effects if not frame.empty]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(EFFECT_COLUMNS))

    def pairs(self, split: str = "all") -> tuple[TokenPair, ...]:
        """Pairs of a split (`all`, `discovery`, `heldout`) whose jobs have not failed."""
        failed = self._store.failures()
        return tuple(
            pair for pair in self.study.pairs if pair.id not in failed and split in ("all", self._splits[pair.id])
        )

    def placebos(self, pairs: Sequence[TokenPair]) -> tuple[TokenPair, ...]:
        """The placebo pairs, x0 against xp, of those pairs that have one; asked for as pairs are."""
        failed, known = self._store.failures(), {pair.id: pair for pair in self.study.placebos}
        wanted = [placebo_id(pair.id) for pair in pairs]
        return tuple(known[name] for name in wanted if name in known and name not in failed)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of the study's seed, another one for every purpose."""
        return np.random.default_rng([self.study.config.seed, *purpose.encode()])

    def measure(self, requests: Sequence[Request]) -> pd.DataFrame:
        """Effects of sites on pairs, which become part of the study's effects.

        Raises:
            UnmeasuredError: some were not measured; those that were have become part of the study's effects.
        """
        rows = [row for request in requests for row in request.rows(self.study.info)]
        found = self.measured(requests)
        self._effects.append(found)
        pairs = {pair.id for pair in self.pairs()}
        if any(self._runner.key(row) not in self._runner.values for row in rows if row.pair in pairs):
            raise UnmeasuredError
        return found

    def measured(self, requests: Sequence[Request]) -> pd.DataFrame:
        """Effects of sites on pairs, which do not become part of the study's (columns: `EFFECT_COLUMNS`)."""
        study = self.study
        self._runner.run_rows(row for request in requests for row in request.rows(study.info))
        return effects_table(requests, self._runner.values, self._runner.key, study.outcome, study.info, self._splits)

    def measure_sites(self, analysis: str, sites: Iterable[Site], split: str = "all") -> pd.DataFrame:
        """Effects of the same sites on every pair of a split that has their positions."""
        asked, pairs = list(sites), self.pairs(split)
        return self.measure(
            [Request(analysis, pair, site) for pair in pairs for site in asked if pair.places(site.position).x0]
        )

    def tell_ahead(self, operations: float) -> None:
        """Tell who watches that so many operations are left of the study, at most."""
        self._runner.watch.ahead(operations)

    def outcomes(self, rows: Sequence[Row]) -> Floats:
        """Y of each row; NaN where the row's pair failed.

        Raises:
            UnmeasuredError: a row was not measured.
        """
        self._runner.run_rows(rows)
        pairs = self._runner.runnable
        there = [row for row in rows if row.pair in pairs]
        found = np.full(len(rows), np.nan)
        found[[row.pair in pairs for row in rows]] = self.study.outcome.each(
            [pairs[row.pair] for row in there], self._stored(there)
        )
        return found

    def measure_ahead(self, rows: Callable[[], Iterable[Row]]) -> None:
        """Measure rows before they are asked for, together: every wave measures its base prompts anew.

        rows: makes them; not called where nothing can be measured.
        """
        if self.can_measure:
            self._runner.run_rows(rows())

    def readouts(self, rows: Sequence[Row]) -> list[npt.NDArray[np.float32]]:
        """What was read of each row, of pairs whose jobs have not failed; the outcome makes Y of it.

        Raises:
            UnmeasuredError: a row was not measured.
        """
        self._runner.run_rows(rows)
        return self._stored(rows)

    def _stored(self, rows: Sequence[Row]) -> list[npt.NDArray[np.float32]]:
        """What was read of each row. Raises: UnmeasuredError: a row was not measured."""
        keys, values = list(map(self._runner.key, rows)), self._runner.values
        if any(key not in values for key in keys):
            raise UnmeasuredError
        return [values[key] for key in keys]

    def indirect(self, sites: Sequence[Site], pairs: Sequence[TokenPair]) -> Indirect:
        """Effects of single sites, which may be any sets of units, on pairs; not part of the study's effects.

        Raises:
            UnmeasuredError: a row was not measured.
        """
        return self.joint([[site] for site in sites], pairs)

    def joint(self, sets: Sequence[Sequence[Site]], pairs: Sequence[TokenPair]) -> Indirect:
        """Joint effects (METHOD, section 3): all sites of a set swapped together in one run, in both directions.

        Raises:
            SiteError: a site of a set is wholly covered by another one of it.
            UnmeasuredError: a row was not measured.
        """
        return self._both_ways(swap_all, sets, pairs)

    def direct(self, sets: Sequence[Sequence[Site]], pairs: Sequence[TokenPair]) -> Indirect:
        """Direct effects (METHOD, section 3): at `last` all that layers add is held, only S is as on the other prompt.

        sets: sites at `last`. Of whole contributions no layer is run (`program.direct`); sets with neurons take a run,
        in which the contribution is what it is when only they change, through a post-norm too. Y of the base prompts is
        read beside whole contributions, and x0 runs once for all pairs that share it.

        Raises:
            JobError, UnmeasuredError: as `run`.
        """
        if any(site.component == "mlp_neurons" for sites in sets for site in sites):
            return self._both_ways(direct_row, sets, pairs)
        groups = sharing_x0(pairs)
        found = self.run([direct_task(group, sets, self.study.setting) for group in groups])
        numbers = {pair.id: number for number, pair in enumerate(pairs)}
        y = np.empty((2, 1 + len(sets), len(pairs)))
        for group, values in zip(groups, found, strict=True):
            for pair, readouts in zip(group, direct_readouts(values, len(group), len(sets)), strict=True):
                each = [read for side in readouts for read in side]
                y[..., numbers[pair.id]] = self.study.outcome.each([pair] * len(each), each).reshape(2, -1)
        return _effects(y[:, 1:], y[:, 0], pairs)

    def through(self, ways: Sequence[Way], pairs: Sequence[TokenPair]) -> Indirect:
        """Path effects (`pathrows`): what heads do by way of receivers alone; without any, straight to the answer.

        Raises:
            SiteError: sites that paths cannot begin at, or lead to.
            UnmeasuredError: a row was not measured.
        """
        info, sides = self.study.info, (0, 1)
        alone = {
            (heads, pair.id, side): sender_row(pair, heads, side, info)
            for heads in {way.heads for way in ways}
            for pair in pairs
            for side in sides
        }
        rows = [
            way_row(pair, alone[way.heads, pair.id, side], way, info)
            for side in sides
            for way in ways
            for pair in pairs
        ]
        return self._against_bases(self.outcomes(rows).reshape(2, len(ways), len(pairs)), pairs)

    def _both_ways(self, make: RowMaker, sets: Sequence[Sequence[Site]], pairs: Sequence[TokenPair]) -> Indirect:
        rows = swaps(make, sets, pairs, self.study.info)
        return self._against_bases(self.outcomes(rows).reshape(2, len(sets), len(pairs)), pairs)

    def _against_bases(self, swapped: Floats, pairs: Sequence[TokenPair]) -> Indirect:
        """Effects from Y(x0, M(x1)), then Y(x1, M(x0)): `[side, set, pair]`."""
        bases = [self.outcomes([Row(pair.id, side) for pair in pairs]) for side in (0, 1)]
        return _effects(swapped, np.stack(bases), pairs)

    def run(self, tasks: Sequence[Context]) -> list[npt.NDArray[np.float32]]:
        """Values of tasks, in their order.

        Raises:
            JobError: one of them failed.
            UnmeasuredError: one was not run, and there is no backend.
        """
        keys = [task.keys[0] for task in tasks]
        self._runner.run_tasks(tasks)
        values = self._runner.values
        if any(key not in values for key in keys):
            raise UnmeasuredError
        return [values[key] for key in keys]

    def read(self, task: Context) -> npt.NDArray[np.float32]:
        """Values of a task that are not kept in the run folder.

        Raises:
            JobError: it failed.
            UnmeasuredError: there is no backend.
        """
        self._present()
        return self._runner.read(task)

    def generate(
        self, prompts: Sequence[tuple[int, ...]], tokens: int, held: Intervention = ()
    ) -> list[tuple[int, ...]]:
        """Greedy answers of at most so many tokens, up to the token that ends them, while held or steered.

        Raises:
            JobError: some could not be generated, or not from finite logits.
            UnmeasuredError: some were not, and there is no backend.
        """
        found = [answer for answer in self.generate_where_finite(prompts, tokens, held) if answer is not None]
        if len(found) < len(prompts):
            raise JobError(f"{len(prompts) - len(found)} of {len(prompts)} answers are {NOT_FINITE_LOGITS}")
        return found

    def generate_where_finite(
        self, prompts: Sequence[tuple[int, ...]], tokens: int, held: Intervention = ()
    ) -> list[tuple[int, ...] | None]:
        """The same, with None for an answer that is not made of finite logits up to its end.

        Raises:
            JobError: some could not be generated, or none is finite.
            UnmeasuredError: some were not, and there is no backend.
        """
        parts = [prompts[start : start + _TOGETHER] for start in range(0, len(prompts), _TOGETHER)]
        found = self.run([generate_task(part, tokens, held, self.study.setting) for part in parts])
        ended = self._ended([answer for values in found for answer in values.reshape(-1, tokens).tolist()])
        whole = [tuple(map(int, answer)) if np.isfinite(answer).all() else None for answer in ended]
        if whole and not any(answer is not None for answer in whole):
            raise JobError(f"every answer is {NOT_FINITE_LOGITS}")
        return whole

    def sample(self, rows: Sequence[Row], manner: Manner) -> list[list[tuple[int, ...]]]:
        """By row the sampled answers to its base prompt, each up to the token that ends it, while its writes are made.

        rows: of `bare` pairs, behind whose prompts nothing is fed. All rows of a pair share their random numbers.

        Raises:
            JobError: some could not be generated.
            UnmeasuredError: some were not, and there is no backend.
        """
        seed, pairs = self.study.config.seed, {name: bare(pair) for name, pair in self._runner.runnable.items()}
        keys = [sample_key(row, pairs[row.pair], manner, seed, self.study.setting) for row in rows]
        self._runner.run_samples(dict(zip(keys, rows, strict=True)), pairs, manner, seed)
        if any(key not in self._runner.values for key in keys):
            raise UnmeasuredError
        found = [self._runner.values[key].reshape(2, manner.samples, manner.tokens)[0] for key in keys]
        return [self._ended(ids.astype(int).tolist()) for ids in found]

    def _ended(self, answers: Sequence[Sequence[_Token]]) -> list[tuple[_Token, ...]]:
        """Answers up to the token that ends them."""
        info, form = self.study.info, self.study.config.prompt.form()

        def declared(tokenizer: PreTrainedTokenizerBase) -> list[int]:
            return ends_of_answers(info.name, info.revision, tokenizer, form)

        noted = self.noted("special-tokens", declared, _IDS)
        ends = set(noted)
        return [tuple(takewhile(lambda token: token not in ends, answer)) for answer in answers]

    def tokenised(self, name: str, texts: Callable[[], Sequence[PromptPair]]) -> Prepared:
        """Other pairs than the study's, without answers, by a name of their own.

        Raises:
            PairsError: they cannot be read.
            UnmeasuredError: they were never tokenised, and there is no backend.
        """
        prepared = self._store.prepared(name)
        if prepared is None:
            config = self.study.config
            found = tokenise(texts(), self._present().tokenizer, config.prompt.form())
            prepared = fitting(found, self.study.info, longest_answer(config))
            self._store.save_prepared(prepared, name)
        return prepared

    def noted(self, name: str, make: Callable[[PreTrainedTokenizerBase], _Noted], kind: TypeAdapter[_Noted]) -> _Noted:
        """What takes a tokenizer to make and is kept as JSON, made once; anew where what was kept is of another kind.

        Raises:
            UnmeasuredError: it was never made, and there is no backend.
        """
        content = self._store.note(name, kind)
        if content is None:
            content = make(self._present().tokenizer)
            self._store.save_note(name, kind.dump_python(content, mode="json"))
        return content

    def _present(self) -> Backend:
        if self._backend is None:
            raise UnmeasuredError
        return self._backend

    def beside(
        self, pairs: Sequence[TokenPair] | None = None, info: ModelInfo | None = None, backend: Backend | None = None
    ) -> Lab:
        """The same study on other pairs of the same ids, or on another model, in the same run folder and splits."""
        study = replace(self.study, pairs=tuple(pairs or self.study.pairs), info=info or self.study.info)
        return Lab(study, self._store, backend if info else self._backend, self._watch, splits=self._splits)

    def on_checkpoint(self, name: str) -> Lab:
        """The same study on one of its `variants`; its shape is noted, so that reports need no model."""
        info = self.noted(f"checkpoint-{digest(name)}", lambda _: self.variants[name].info, _INFO)
        return self.beside(info=info, backend=self.variants.get(name))


def _effects(swapped: Floats, bases: Floats, pairs: Sequence[TokenPair]) -> Indirect:
    """Of Y with sets swapped, `[side, set, pair]`, and Y without, `[side, pair]`."""
    clusters = np.array([pair.cluster for pair in pairs])
    return Indirect(nie=swapped[0] - bases[0], tie=bases[1] - swapped[1], te=bases[1] - bases[0], clusters=clusters)
