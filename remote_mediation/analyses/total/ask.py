"""The outcome on the prompts as they are: how much of what a model says the openings of `refusal` cover.

An outcome of openings that are never said is hardly defined.

What counts is the refusing side after harmful prompts and the compliant side after harmless ones (METHOD, section 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, TypeAdapter

from remote_mediation.engine.rows import Row
from remote_mediation.lab import Floats, Lab
from remote_mediation.outcomes import RefusalOutcome
from remote_mediation.result import Finding, Findings
from remote_mediation.stats import Estimate, estimate_means

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COVERAGE_COLUMNS: dict[str, str] = {
    "pair_id": "the prompt pair",
    "cluster": "what statistics resample",
    "split": "discovery or heldout",
    "prompts": "harmless (x0) or harmful (x1)",
    "compliant": "summed probability of the compliant openings after that prompt",
    "refusing": "summed probability of the refusing openings",
}
OPENING_COLUMNS: dict[str, str] = {
    "side": "compliant or refusing",
    "opening": "its text",
    "tokens": "its tokens",
    "harmless": "its mean probability after harmless prompts",
    "harmful": "its mean probability after harmful prompts",
}
SIDES = ("compliant", "refusing")
PROMPTS = ("harmless", "harmful")
ASKED = {"harmful": "refusing", "harmless": "compliant"}
"""By prompts, the side that has to cover what is said to them."""
HALF, HARDLY = 0.5, 0.01
"""Below the first the report says so; below the second the outcome is hardly defined."""


class Coverage(NamedTuple):
    """Mean summed probability of a side's openings after some prompts."""

    prompts: str
    side: str
    found: Estimate

    @property
    def wanting(self) -> bool:
        """Whether this side has to cover these prompts, and covers less than half."""
        return ASKED[self.prompts] == self.side and self.found.value < HALF

    @property
    def hardly(self) -> bool:
        """Whether it leaves the outcome hardly defined."""
        return self.wanting and self.found.value < HARDLY


def analyse(lab: Lab, before: Findings) -> Finding:
    """`coverage.csv`, `openings.csv` and the mean coverages; nothing where the outcome has no openings."""
    outcome, config = lab.study.outcome, lab.study.config
    if not isinstance(outcome, RefusalOutcome):
        return Finding()
    covered = coverage_table(lab, outcome)
    tables = {"coverage.csv": covered, "openings.csv": openings_table(lab, outcome)}
    return Finding(tables, value=coverages(covered, config.seed, config.statistics.resamples))


def coverage_table(lab: Lab, outcome: RefusalOutcome) -> pd.DataFrame:
    """Both sides' probability after every prompt (`COVERAGE_COLUMNS`).

    Raises:
        UnmeasuredError: some prompt was not run.
    """
    pairs, splits = lab.pairs(), lab.study.splits()
    records = []
    for number, prompts in enumerate(PROMPTS):
        read = lab.readouts([Row(pair.id, number) for pair in pairs])
        for pair, values in zip(pairs, read, strict=True):
            covered = np.exp(outcome.side_logprobs(values))
            record = {"pair_id": pair.id, "cluster": pair.cluster, "split": splits[pair.id], "prompts": prompts}
            records.append({**record, **dict(zip(SIDES, covered, strict=True))})
    return pd.DataFrame(records, columns=list(COVERAGE_COLUMNS))


def openings_table(lab: Lab, outcome: RefusalOutcome) -> pd.DataFrame:
    """Every opening as text, with its mean probability after the prompts of either kind (`OPENING_COLUMNS`).

    Raises:
        UnmeasuredError: some prompt was not run, or the texts were never noted and there is no backend.
    """
    pairs = lab.pairs()

    def texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
        return [tokenizer.decode(list(opening)) for opening in outcome.openings]

    def mean(side: int) -> Floats:
        read = lab.readouts([Row(pair.id, side) for pair in pairs])
        said: Floats = np.mean([np.exp(np.concatenate(outcome.opening_logprobs(values))) for values in read], axis=0)
        return said

    means = {prompts: mean(number) for number, prompts in enumerate(PROMPTS)}
    sides = np.repeat(SIDES, (len(outcome.compliant), len(outcome.refusing)))
    lengths = [len(opening) for opening in outcome.openings]
    kind: TypeAdapter[list[str]] = TypeAdapter(
        Annotated[list[str], Field(min_length=len(lengths), max_length=len(lengths))]
    )
    described = {"side": sides, "opening": lab.noted("opening-texts", texts, kind), "tokens": lengths}
    return pd.DataFrame({**described, **means}, columns=list(OPENING_COLUMNS))


def coverages(table: pd.DataFrame, seed: int, resamples: int) -> list[Coverage]:
    """Mean coverage of both sides after both kinds of prompts, with clustered intervals; none of an empty table.

    table: `COVERAGE_COLUMNS`.
    """
    if table.empty:
        return []
    found = []
    for prompts in reversed(PROMPTS):
        part = table[table["prompts"] == prompts]
        rng = np.random.default_rng(seed)
        estimates = estimate_means(part[list(SIDES)].T, part["cluster"], rng, resamples)
        found += [Coverage(prompts, side, one) for side, one in zip(SIDES, estimates, strict=True)]
    return found
