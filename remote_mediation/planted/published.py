"""`selfcheck --published`: numbers that others published of circuits in real models, measured anew.

What is planted has a truth, and is small. Of a few circuits in real models others have printed
numbers, which another tool measured. A folder each (`reports/published`) has a study, its pairs, and
`expected.csv`, one number a row. The study runs as any does, and each number is read of its effects, but for
how well screens agree with them: an analysis of this module asks for that.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from remote_mediation.config import Screen, StudyConfig, load_config
from remote_mediation.door import open_lab
from remote_mediation.engine.tasks import screen_tasks
from remote_mediation.errors import ModelError, SettingsError
from remote_mediation.lab import Floats, Lab
from remote_mediation.models import folder_at_hand, why_no_hub
from remote_mediation.records import read_records
from remote_mediation.result import Analysis, Finding, Findings, Result
from remote_mediation.runner import Watch
from remote_mediation.sites import Component, Site
from remote_mediation.tokens import TokenPair

STUDIES = Path(__file__).parents[2] / "reports" / "published"
"""Where the studies are in a checkout; an installed package has none."""
STUDY, EXPECTED = "study.toml", "expected.csv"
WHOLE = -1
"""In place of a unit where the whole tensor is swapped."""

Quantity = Literal["y_base", "y_source", "year_difference", "nie_share", "nie_place", "atp_pearson", "relp_pearson"]
PEARSON: dict[str, Screen] = {"atp_pearson": "atp", "relp_pearson": "relp"}
"""Quantities of a screen."""
SCREENED_PARTS: tuple[Component, ...] = ("layer_output", "attention_output", "mlp_output")
SCREENED_AT = ("edit", "last")
"""Tokens whose modules are screened: where the prompts differ, and where the answer is read."""
AGREEMENT_FILE = "screens_agree.csv"


class Published(BaseModel):
    """A number that was published; a row of `expected.csv`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """What it is of, in words."""
    quantity: Quantity
    """What it is (`measured`)."""
    component: str = ""
    """Of a site: the tensor that is swapped; empty where the number is of no site."""
    layer: int = 0
    """Of a site."""
    unit: int = WHOLE
    """Of a site: the head; none where the whole tensor is swapped."""
    position: str = ""
    """Of a site."""
    value: float
    """As it was published."""
    tolerance: float
    """How far ours may be from it."""
    source: str
    """Where it was published."""


@dataclass(frozen=True)
class Compared:
    """A published number and ours."""

    published: Published
    found: float
    """NaN: the study measured no such site."""

    @property
    def agrees(self) -> bool:
        """Whether ours is within the tolerance."""
        return abs(self.found - self.published.value) <= self.published.tolerance

    def line(self) -> str:
        """Both, in one line."""
        number = self.published
        found = "was not measured" if math.isnan(self.found) else f"is {self.found:.4g}"
        return f"{number.name} {found}, published {number.value:g} ± {number.tolerance:g} ({number.source})"


@dataclass(frozen=True)
class Checked:
    """What became of one study."""

    study: str
    """Its folder's name."""
    model: str
    """The model that the numbers are of."""
    absent: str = ""
    """Why the model could not be had; empty: the study was run."""
    numbers: tuple[Compared, ...] = ()
    """All that were published of it."""

    @property
    def passed(self) -> bool:
        """No number is off, as far as any could be measured."""
        return all(number.agrees for number in self.numbers)

    def lines(self) -> list[str]:
        """For the terminal: what became of it, and each number that is off."""
        if self.absent:
            return [f"not run {self.study}: {self.model} cannot be had: {self.absent}"]
        off = [number.line() for number in self.numbers if not number.agrees]
        agreeing = f"{len(self.numbers) - len(off)} of {len(self.numbers)} numbers of {self.model} as published"
        return [f"{'passed' if self.passed else 'FAILED'}  {self.study}: {agreeing}", *(f"  {line}" for line in off)]

    def as_data(self) -> dict[str, Any]:
        """JSON data."""
        numbers = [{**one.published.model_dump(), "found": one.found, "agrees": one.agrees} for one in self.numbers]
        told = {"study": self.study, "model": self.model, "absent": self.absent, "passed": self.passed}
        return {**told, "numbers": numbers}


def published_studies() -> list[Path]:
    """The folders of all studies with published numbers.

    Raises:
        SettingsError: there are none.
    """
    found = sorted(file.parent for file in STUDIES.glob(f"*/{EXPECTED}"))
    if not found:
        raise SettingsError(
            f"no study with published numbers in {STUDIES}; they come with the repository, not with the installed "
            "package: run this from a checkout that was installed with `pip install -e .`"
        )
    return found


def check_published(folder: Path, watch: Watch | None = None) -> Checked:
    """Run the study of a folder, where its model can be had, and compare.

    Raises:
        SettingsError: `expected.csv` or the study file cannot be used.
        MediationError: the study could not be run, for another reason than that there is no model.
    """
    numbers, config = read_published(folder / EXPECTED), load_config(folder / STUDY, {})
    here = folder_at_hand(config.model, config.revision)
    reason = "" if here else why_no_hub(config.model, config.revision)
    if reason:
        return Checked(folder.name, config.model, absent=reason)
    # Files in the hub's cache are read as a folder: a hub that is gone is then never asked for newer ones.
    run = config.model_copy(update={"model": str(here), "revision": ""}) if here else config
    try:
        result = _result(run, numbers, watch)
    except ModelError as error:
        return Checked(folder.name, config.model, absent=str(error))
    compared = tuple(Compared(number, _found(number, result)) for number in numbers)
    return Checked(folder.name, config.model, numbers=compared)


def read_published(file: Path) -> list[Published]:
    """The numbers in a CSV file with the fields of `Published` as columns; an empty cell is a field's default.

    Raises:
        SettingsError: a row is none, with what is amiss.
    """
    records: list[dict[str, str]] = read_records(str(file))
    found = []
    for number, record in enumerate(records, 1):
        try:
            found.append(Published(**{key: cell for key, cell in record.items() if cell}))  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            where = f"{file}, row {number}: {'.'.join(map(str, first['loc']))}"
            raise SettingsError(f"{where}: {first['msg']} (got {first['input']!r}); mend the row") from error
    return found


def measured(number: Published, effects: pd.DataFrame) -> float:
    """What a published number is in a study's effects (columns: `effects.EFFECT_COLUMNS`), over all pairs.

    `y_base`, `y_source`: mean of Y on the corrupted prompts, and on the clean ones (the outcome's unit).
    `year_difference`: mean of tanh(Y/2) on the clean prompts. Where Y is the log of a ratio of two
    probabilities, that is their difference over their sum.
    `nie_share`: mean NIE of the site over mean TE: what of the effect comes back when the clean
    activation is patched into the corrupted run.
    `nie_place`: the place of that share among all sites of this component and position; 1: the largest.

    NaN where the study has no such site.
    """
    pairs = effects.drop_duplicates("pair_id")
    match number.quantity:
        case "y_base" | "y_source":
            return float(pairs[number.quantity].mean())
        case "year_difference":
            return float(np.tanh(pairs["y_source"] / 2).mean())
    shares = _shares(effects, number.component, number.position)
    share = float(shares.get((number.layer, number.unit), np.nan))
    if number.quantity == "nie_share" or math.isnan(share):
        return share
    return 1.0 + float((shares > share).sum())


def _shares(effects: pd.DataFrame, component: str, position: str) -> pd.Series[float]:
    """Mean NIE over mean TE of every site of a component at a position, by layer and unit."""
    alike = effects[(effects["component"] == component) & (effects["position"] == position)]
    units = alike["unit_start"].fillna(WHOLE).astype(int).rename("unit")
    means = alike.groupby(["layer", units])[["nie", "te"]].mean()
    return means["nie"] / means["te"]


def _found(number: Published, result: Result) -> float:
    """What a published number is in a study's result; NaN where it has no such number."""
    if number.quantity not in PEARSON:
        return measured(number, result.effects)
    table = result.tables[AGREEMENT_FILE].set_index(["component", "screen"])["pearson"]
    return float(table.get((number.component, PEARSON[number.quantity]), np.nan))


def _result(config: StudyConfig, numbers: Sequence[Published], watch: Watch | None) -> Result:
    """The result of a study, run in a folder that does not last."""
    asked: list[str | Analysis] = [*config.analyses]
    if any(number.quantity in PEARSON for number in numbers):
        asked.append(AGREEMENT)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_lab(config, out=Path(scratch) / "run", watch=watch, analyses=asked) as lab,
    ):
        return lab.run()


def _agree(lab: Lab, before: Findings) -> Finding:
    """How well AtP and RelP estimate the NIE of whole modules: Pearson's correlation (arXiv 2508.21258, table 1).

    Over pairs, layers and `SCREENED_AT`; an estimate is the sum over a module's coordinates.
    """
    pairs, rows = lab.pairs(), []
    for component in SCREENED_PARTS:
        exact = np.stack([_exact(lab, pairs, component, position) for position in SCREENED_AT])
        for screen in PEARSON.values():
            estimated = np.stack([_estimated(lab, pairs, component, position, screen) for position in SCREENED_AT])
            pearson = float(np.corrcoef(exact.ravel(), estimated.ravel())[0, 1])
            rows.append({"component": component, "screen": screen, "pearson": pearson})
    return Finding({AGREEMENT_FILE: pd.DataFrame(rows)})


def _exact(lab: Lab, pairs: Sequence[TokenPair], component: Component, position: str) -> Floats:
    """NIE of every layer's module: `[pair, layer]`."""
    sites = [Site(component, layer, position) for layer in range(lab.study.info.layers)]
    found: Floats = lab.indirect(sites, pairs).nie.T
    return found


def _estimated(lab: Lab, pairs: Sequence[TokenPair], component: Component, position: str, screen: Screen) -> Floats:
    """What a screen says of the same: `[pair, layer]`."""
    tasks = [task for pair in pairs for task in screen_tasks([pair], component, position, lab.study.setting, screen)]
    scores = np.array(lab.run(tasks), dtype=np.float64).reshape(len(pairs), 2, lab.study.info.layers, -1)
    found: Floats = scores[:, 0].sum(-1)
    return found


AGREEMENT = Analysis("screens agree", analyse=_agree)
"""Beside a study's own analyses, where a number of a screen was published."""
