"""Gets values: submits jobs, collects them, retries what is lost, finds out which pair is to blame, keeps the rest.

Values go into the run folder job by job, so that whatever stops a run loses one job at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Protocol

import numpy as np
import numpy.typing as npt

from remote_mediation.engine.answers import (
    NOT_FINITE,
    ContradictionError,
    check_answer,
    check_tokens,
    lengths_of,
    not_finite,
    rows_of,
)
from remote_mediation.engine.backend import Backend
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Context, Job, Keys, Readout, plan_jobs, with_sources
from remote_mediation.engine.rows import Row
from remote_mediation.engine.samples import Manner, plan_samples
from remote_mediation.engine.tasks import plan_tasks
from remote_mediation.errors import JobError, LostJobError
from remote_mediation.store import Store, Submitted
from remote_mediation.tokens import TokenPair

# First guess of a backend's speed, operations per second; jobs are cut anew once it is measured.
FIRST_RATE = 2e10
# So often a job is handed over before its loss ends the study; what is measured is kept.
MOST_TRIES = 4
# So many pairs fail one after the other before it is asked whether anything can be measured still.
MOST_SUSPECTS = 3


class Watch(Protocol):
    """Sees how far a study is."""

    def ahead(self, operations: float) -> None:
        """So many operations are left of all steps of the study, at most."""
        ...

    def total(self, rows: int) -> None:
        """So many rows are to be measured from here on."""
        ...

    def advance(self, rows: int, operations: float) -> None:
        """So many more are done, which took so many operations."""
        ...


class Unwatched:
    """Nobody watches."""

    def ahead(self, operations: float) -> None:
        """Nothing."""

    def total(self, rows: int) -> None:
        """Nothing."""

    def advance(self, rows: int, operations: float) -> None:
        """Nothing."""


class Runner:
    """A run folder and, while a study is being measured, the backend that fills it."""

    def __init__(
        self,
        setting: Setting,
        pairs: Mapping[str, TokenPair],
        store: Store,
        backend: Backend | None,
        watch: Watch | None,
        seconds: float,
        batch_bytes: float,
    ) -> None:
        """pairs: by id. seconds: aimed at for a job. batch_bytes: most memory of a batch's activations."""
        self.values: dict[str, npt.NDArray[np.float32]] = store.values()
        """What is measured, by key."""
        self.key = Keys(setting, pairs.values())
        """Names rows."""
        self._setting, self._pairs, self._store, self._backend = setting, pairs, store, backend
        self.watch = watch or Unwatched()
        """Sees how far it is."""
        self._seconds, self._batch_bytes, self._rate = seconds, batch_bytes, FIRST_RATE
        self._asked: Sequence[Row] = ()  # the rows of this step, measured or not
        self._suspects: dict[str, str] = {}  # pairs that failed since the last job that did not, and why
        self._failed: set[str] = set()  # all that failed in this step

    @property
    def runnable(self) -> dict[str, TokenPair]:
        """Pairs whose jobs have not failed, by id."""
        failed = self._store.failures()
        return {name: pair for name, pair in self._pairs.items() if name not in failed}

    def run_rows(self, rows: Iterable[Row]) -> None:
        """Run the rows that are not in the run folder yet, job by job, and keep each job's values as it ends."""
        if not self._backend:
            return
        self._collect_submitted(self._backend)
        pairs = self.runnable
        self._asked = [row for row in dict.fromkeys(rows) if row.pair in pairs]
        missing = [row for row in self._asked if self.key(row) not in self.values]
        if missing:
            count = sum(bool(row.writes) for row in with_sources(missing))
            self._work(count, partial(self._jobs, missing), self._backend)

    def run_tasks(self, tasks: Sequence[Context]) -> None:
        """The same of tasks that are not made of rows."""
        if not self._backend:
            return
        self._collect_submitted(self._backend)
        missing = {task.keys: task for task in tasks if task.keys[0] not in self.values}
        if missing:
            plan = partial(plan_tasks, missing.values(), self._setting)
            self._work(len(missing), plan, self._backend)

    def read(self, task: Context) -> npt.NDArray[np.float32]:
        """Values of a task that are not kept, as they are large and soon had again.

        Raises:
            JobError: it failed.
        """
        assert self._backend
        (job,) = plan_tasks([task], self._setting, Budget(lambda: inf, self._batch_bytes))
        readout = self._backend.collect(self._backend.submit(job))
        self._check(job, lengths_of(job), readout)
        return readout.values[0]

    def run_samples(self, rows: Mapping[str, Row], pairs: Mapping[str, TokenPair], manner: Manner, seed: int) -> None:
        """The same of sampled answers, by key. pairs: `bare`, by id. seed: of the uniform numbers."""
        if not self._backend:
            return
        self._collect_submitted(self._backend)
        missing = [row for key, row in rows.items() if key not in self.values]
        if missing:
            plan = partial(plan_samples, missing, pairs, manner, seed, self._setting)
            self._work(len(missing), plan, self._backend)

    def _jobs(self, rows: Sequence[Row], budget: Budget) -> Iterator[Job]:
        return plan_jobs(rows, self._pairs, self._setting, budget, self.key)

    def _work(self, count: int, plan: Callable[[Budget], Iterator[Job]], backend: Backend) -> None:
        """Run planned jobs, cut by the speed of those before."""
        if count:
            self.watch.total(count)
        self._suspects, self._failed = {}, set()
        for job in plan(self._budget()):
            seconds = self._run(job, backend)
            self._rate = job.flops / seconds if seconds else self._rate
            self.watch.advance(job.rows, job.flops)
        self._settle(backend)

    def _budget(self) -> Budget:
        """Of a job."""
        return Budget(lambda: self._seconds * self._rate, self._batch_bytes)

    def _run(self, job: Job, backend: Backend) -> float:
        """Run one job and keep its values; where rows fail, find out of which pairs. Returns the seconds it took."""
        if job.task == "measure" and self._failed.issuperset(job.pairs):
            return 0.0
        try:
            readout = self._collected(job, backend)
        except JobError as error:
            if job.task != "measure":
                raise
            if len(job.pairs) > 1:
                return sum(self._run(one, backend) for one in self._apart(job))
            self._suspect(job.pairs, str(error))
            self._settle(backend, MOST_SUSPECTS)
            return 0.0
        bad = not_finite(job, readout)
        if bad:
            self._keep_finite(job, readout, bad, backend)
        else:
            self._keep(job, readout)
            self._leave_out()
        return readout.seconds

    def _collected(self, job: Job, backend: Backend, tries: int = MOST_TRIES) -> Readout:
        """What a job brings back. It is sent again when it is lost, and once when one pair's fails or has no numbers.

        A pair is left out of the study for good, so it is not left out for what happened once.

        Raises:
            JobError: it failed.
            LostJobError: it was lost again and again.
        """
        ticket = backend.submit(job)
        self._store.save_ticket(ticket, job)
        try:
            readout = backend.collect(ticket)
            self._check(job, lengths_of(job), readout)
        except LostJobError as error:
            self._store.forget(job.id)
            if tries == 1:
                raise self._blaming(error) from error
            return self._collected(job, backend, tries - 1)
        except JobError:
            self._store.forget(job.id)
            if tries < MOST_TRIES or job.task != "measure" or len(job.pairs) > 1:
                raise
            return self._collected(job, backend, tries - 1)
        if tries == MOST_TRIES and not_finite(job, readout):
            return self._collected(job, backend, tries - 1)
        return readout

    def _suspect(self, pairs: Iterable[str], reason: str) -> None:
        """Note pairs that failed. Whose fault it is shows when another one is measured, or does not (`_settle`)."""
        self._suspects |= dict.fromkeys(pairs, reason)
        self._failed.update(self._suspects)

    def _leave_out(self) -> None:
        """Let the pairs that failed be left out: what runs the jobs works, as another one shows."""
        for pair, reason in self._suspects.items():
            self._store.save_failure(pair, reason)
        self._suspects = {}

    def _settle(self, backend: Backend, least: int = 1) -> None:
        """Tell pairs that fail from a server that does, by what was measured before: it is measured once more.

        least: so many pairs have to have failed in a row.

        Raises:
            JobError: that fails too, or nothing has been measured so far. No pair is left out for it.
        """
        if len(self._suspects) < least:
            return
        job = self._known_job()
        if job is None:
            (*_, reason), tried = self._suspects.values(), ", ".join(list(self._suspects)[:MOST_SUSPECTS])
            raise JobError(f"no pair could be measured so far ({tried} failed): {reason}")
        try:
            reason = NOT_FINITE if not_finite(job, self._collected(job, backend)) else ""
        except JobError as error:
            reason = str(error)
        self._store.forget(job.id)
        if reason:
            raise JobError(
                "what was measured before fails now, too, so no pair is to blame; what is measured is kept, run the "
                f"same command again once this is mended: {reason}"
            )
        self._leave_out()

    def _known_job(self) -> Job | None:
        """A job of rows that are measured, of one pair that did not fail; of this step's rows where some are."""
        rows = [*(Row(pair, 0) for pair in self._pairs), *self._asked]
        known = [row for row in rows if row.pair not in self._failed and self.key(row) in self.values]
        return next(self._jobs([row for row in known if row.pair == known[-1].pair], self._budget()), None)

    def _check(self, job: Job | Submitted, lengths: Sequence[int | None], readout: Readout) -> None:
        """Refuse what is not the answer to a job. Raises: as `check_answer`."""
        check_answer(job.id, job.keys, lengths, readout, self.values, self._setting.dtype)
        check_tokens(job.task, readout, self._setting.info.vocab)

    def _blaming(self, error: LostJobError) -> LostJobError:
        """The same, with the file to delete where what was measured before may be what is wrong."""
        path = self._store.holding(error.key) if isinstance(error, ContradictionError) else None
        if path is None:
            return error
        return LostJobError(f"{error}, or delete {path} if that is what is wrong: it is then measured anew")

    def _keep_finite(self, job: Job, readout: Readout, bad: set[str], backend: Backend) -> None:
        """Keep what a job brought back of its other pairs; those whose values are no numbers failed.

        Raises:
            JobError: the job is of a task other than `measure`; as `_settle`.
        """
        self._store.forget(job.id)
        if job.task != "measure":
            raise JobError(f"{job.task} brought back values that are not finite; try bfloat16")
        self._suspect(sorted(bad), NOT_FINITE)
        rows = rows_of(job)
        good = [index for index, row in enumerate(rows) if row.pair not in bad]
        if good:
            keys, values = [job.keys[index] for index in good], [readout.values[index] for index in good]
            written = sum(bool(rows[index].writes) for index in good)
            self._keep(Submitted(job.id, "", keys, written, job.flops, task=job.task), Readout(values, readout.seconds))
            self._leave_out()
        self._settle(backend, MOST_SUSPECTS)

    def _apart(self, job: Job) -> Iterator[Job]:
        """The rows of a job as one job per pair, so that one pair's failure is its own."""
        whole = Budget(lambda: inf, self._batch_bytes)
        for pair in job.pairs:
            yield from self._jobs([row for context in job.contexts for row in context.rows if row.pair == pair], whole)

    def _collect_submitted(self, backend: Backend) -> None:
        """Fetch what an earlier process handed over and did not live to see; what is lost will be planned anew."""
        for job in self._store.submitted():
            try:
                readout = backend.collect(job.ticket)
                self._check(job, job.lengths or [None] * len(job.keys), readout)
            except (JobError, LostJobError):
                self._store.forget(job.id)
                continue
            if all(np.isfinite(value).all() for value in readout.values):
                self._keep(job, readout)
            else:
                self._store.forget(job.id)

    def _keep(self, job: Job | Submitted, readout: Readout) -> None:
        """A job's values, first in the run folder, then at hand.

        Base prompts that run again in a later job keep their first values, as do rows that run in several batches: in
        another batch the last digits may be others, and a report that is made again would not be the same.
        """
        first = {key: place for place, key in reversed(list(enumerate(job.keys)))}
        new = sorted(place for key, place in first.items() if key not in self.values)
        if not new:
            self._store.forget(job.id)
            return
        keys, values = [job.keys[place] for place in new], [readout.values[place] for place in new]
        self._store.save_readout(
            Submitted(job.id, "", keys, job.rows, job.flops, task=job.task), Readout(values, readout.seconds)
        )
        self.values.update(zip(keys, values, strict=True))
