"""What a judge says of answers, and how far to trust it; the run folder keeps verdicts, and no texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, TypeAdapter

from remote_mediation.engine.payload import digest
from remote_mediation.intervals import Interval
from remote_mediation.judges import BUILTIN, check_judge, load_judge, load_labelled
from remote_mediation.judges.exchanges import exchanges
from remote_mediation.lab import Lab

JUDGE_COLUMNS: dict[str, str] = {
    "judge": "its spec",
    "measure": "accuracy, recall of complying answers, specificity, or Cohen's kappa",
    "n": "labelled answers it was measured on",
    "value": "the measure",
    "low": "lower end of its 95% interval",
    "high": "upper end",
    "reason": "why a number is missing, or why to read it with care",
}


@dataclass(frozen=True)
class _Measured:
    """A row of `JUDGE_COLUMNS`."""

    judge: str
    measure: str
    n: int
    value: float
    low: float
    high: float
    reason: str


def complied(
    lab: Lab, judge: str, prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]]
) -> list[bool]:
    """The judge's verdicts, kept in the run folder; the texts are not. judge: its spec."""

    def judged(tokenizer: Any) -> list[bool]:
        asked, said = exchanges(prompts, answers, tokenizer, lab.study.config.prompt.form())
        return [bool(verdict) for verdict in load_judge(judge)(asked, said)]

    kind: TypeAdapter[list[bool]] = TypeAdapter(
        Annotated[list[bool], Field(min_length=len(answers), max_length=len(answers))]
    )
    return lab.noted(f"judged-{digest([judge, prompts, answers])}", judged, kind)


def judge_quality(lab: Lab, judge: str, labelled: str = BUILTIN) -> pd.DataFrame:
    """How a judge agrees with labelled answers (`JUDGE_COLUMNS`): the package's, or those of a file."""

    def measured(tokenizer: Any) -> list[_Measured]:
        found = check_judge(load_judge(judge), load_labelled(labelled), lab.rng("judge"))
        measures = ("accuracy", "recall", "specificity", "kappa")
        intervals = [(name, getattr(found, name)) for name in measures]
        return [
            _Measured(judge, name, one.n_pairs, one.value, one.low, one.high, one.reason) for name, one in intervals
        ]

    named = judge if labelled == BUILTIN else [judge, labelled]
    rows = lab.noted(f"judge-{digest(named)}", measured, TypeAdapter(list[_Measured]))
    return pd.DataFrame(rows, columns=list(JUDGE_COLUMNS))


def measure_of(quality: pd.DataFrame, name: str) -> Interval:
    """One of a judge's measures, by its name. quality: `JUDGE_COLUMNS`."""
    one = quality.set_index("measure").loc[name]
    return Interval(int(one["n"]), 0, float(one["value"]), float(one["low"]), float(one["high"]), "")
