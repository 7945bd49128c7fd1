"""Judged answers while mediators are swapped, on held-out pairs, beside what the study's outcome says of them.

The outcome of a study is cheap: it reads the beginning of an answer. Here answers are sampled, all those of a pair with
the same random numbers, and Y is the share of them that comply, says a judge (METHOD, section 2, `judged`). That is
dear, so it is asked of few mediators: the strongest site of each kind, and every set that the run found. Both were
chosen without the held-out pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.analyses.intervene.judging import complied, judge_quality, measure_of
from remote_mediation.effects import SITE_COLUMNS
from remote_mediation.engine.rows import Row, swap_all
from remote_mediation.engine.samples import Manner, bare, sample_flops
from remote_mediation.lab import Floats, Indirect, Lab, Study
from remote_mediation.later import Later, of_bases, of_rows, pairs_of
from remote_mediation.rates import corrected_difference, corrected_rate, rate
from remote_mediation.result import Finding, Findings
from remote_mediation.shares import share
from remote_mediation.sites import Site
from remote_mediation.stats import Interval, estimate_means, spread
from remote_mediation.tokens import TokenPair

VERIFY_COLUMNS: dict[str, str] = {
    "mediator": "what was swapped; empty where nothing was",
    "sites": "how many sites are swapped together",
    "quantity": "rate_harmful or rate_harmless (answers that comply, nothing swapped), te, nie or tie",
    "cheap": "mean by the study's outcome, on the same pairs and in its unit",
    "cheap_low": "lower end of its 95% interval",
    "cheap_high": "upper end",
    "cheap_share": "of TE by the study's outcome",
    "cheap_share_low": "lower end of its 95% interval",
    "cheap_share_high": "upper end",
    "judged": "share of answers that comply, says the judge, or a difference of two such shares",
    "judged_low": "lower end of its 95% interval, over clusters of pairs",
    "judged_high": "upper end",
    "judged_share": "of the judged TE",
    "judged_share_low": "lower end of its 95% interval",
    "judged_share_high": "upper end",
    "corrected": "judged, allowing for the judge's errors on labelled answers",
    "corrected_low": "lower end of its 95% interval, with what is not known of these errors",
    "corrected_high": "upper end",
    "n": "pairs",
    "clusters": "clusters of pairs",
    "reason": "why a number is missing, or why to read it with care",
}
JUDGED_COLUMNS: dict[str, str] = {
    "pair_id": "the prompt pair",
    "cluster": "what statistics resample",
    "mediator": "what was swapped; empty where nothing was",
    "prompts": "harmless (x0) or harmful (x1), as given to the model",
    "samples": "answers",
    "complied": "how many of them comply, says the judge",
}
PROMPTS = ("harmless", "harmful")
# Sets that a run finds beside single sites, at most; to say what it would cost.
_SETS = 8


class Mediator(NamedTuple):
    """What is swapped together."""

    name: str
    sites: tuple[Site, ...]


class Verdicts(NamedTuple):
    """What the judge says of the answers of all rows."""

    plain: Floats
    """`[side, pair, sample]`, 1 where an answer complies; nothing swapped."""
    swapped: Floats
    """`[mediator, side, pair, sample]`"""


class _Effect(NamedTuple):
    """An effect `[pair]`, or TE."""

    by_outcome: Floats
    """In the outcome's unit."""
    by_judge: Floats
    """Difference of shares of answers."""


class _Judge(NamedTuple):
    """Errors of the judge on labelled answers."""

    sensitivity: Interval
    specificity: Interval


def analyse(lab: Lab, before: Findings) -> Finding:
    """`verify.csv` (`VERIFY_COLUMNS`), `judged.csv` (`JUDGED_COLUMNS`) and the judge's quality."""
    settings = lab.study.config.verify
    pairs, mediators = _pairs(lab), [*strongest_sites(lab, settings.sites), *found_sets(before)]
    verdicts = measure_verdicts(lab, mediators, pairs)
    quality = judge_quality(lab, settings.judge, settings.labelled)
    cheap = lab.joint([one.sites for one in mediators], pairs)
    judge = _Judge(measure_of(quality, "recall"), measure_of(quality, "specificity"))
    rows = _rows(lab, mediators, cheap, verdicts, judge)
    return Finding(
        {
            "verify.csv": pd.DataFrame(rows, columns=list(VERIFY_COLUMNS)),
            "judged.csv": _by_pair(mediators, pairs, verdicts),
            "verify_judge.csv": quality,
        }
    )


def strongest_sites(lab: Lab, most: int) -> list[Mediator]:
    """The strongest single site of each component, by the smaller of mean NIE and TIE on the discovery pairs.

    Left out are those whose effects follow by construction: the residual stream at all positions, and after the last
    layer. So are those that act against the total effect.
    """
    effects = lab.effects
    used = effects[(effects["split"] == "discovery") & ~_by_construction(effects, lab.study.info.layers)]
    means = used.groupby(SITE_COLUMNS, dropna=False, sort=False)[["nie", "tie", "te"]].mean().reset_index()
    strength = means[["nie", "tie"]].mul(np.sign(means["te"]), axis=0).min(axis=1)
    order = means.assign(strength=strength)[strength > 0].sort_values("strength", ascending=False, kind="stable")
    first = order.drop_duplicates("component").head(most)
    return [_single(row) for row in first.to_dict("records")]


def _by_construction(effects: pd.DataFrame, layers: int) -> pd.Series:
    """Which effects follow whatever the model does."""
    stream = effects["component"] == "layer_output"
    return stream & ((effects["position"] == "all") | (effects["layer"] == layers - 1))


def found_sets(before: Findings) -> list[Mediator]:
    """Every set that the analyses before found, each once."""
    found: dict[tuple[Site, ...], str] = {}
    for finding in before.values():
        for name, sites in finding.sets.items():
            found.setdefault(tuple(sites), name)
    return [Mediator(name, sites) for sites, name in found.items()]


def manner_of(lab: Lab) -> Manner:
    """How the study's settings have answers sampled."""
    settings = lab.study.config.verify
    return Manner(settings.samples, settings.tokens, settings.temperature, settings.held)


def measure_verdicts(lab: Lab, mediators: Sequence[Mediator], pairs: Sequence[TokenPair]) -> Verdicts:
    """The judge's verdicts on answers to both prompts of pairs, plain and with each mediator as on the other prompt."""
    info, manner, spec = lab.study.info, manner_of(lab), lab.study.config.verify.judge
    unfed = [bare(pair) for pair in pairs]
    rows = [Row(pair.id, side) for side in (0, 1) for pair in unfed]
    rows += [swap_all(pair, one.sites, side, info) for one in mediators for side in (0, 1) for pair in unfed]
    answers = lab.sample(rows, manner)
    found = []
    for number in range(2 * (1 + len(mediators))):  # rows of one side, with one mediator swapped or with none
        group = slice(number * len(pairs), (number + 1) * len(pairs))
        prompts = [pair.prompts[row.base] for pair, row in zip(unfed, rows[group], strict=True)]
        found.append(_said_of(lab, spec, prompts, answers[group]))
    verdicts = np.array(found, np.float64).reshape(1 + len(mediators), 2, len(pairs), manner.samples)
    return Verdicts(verdicts[0], verdicts[1:])


def _said_of(
    lab: Lab, spec: str, prompts: Sequence[tuple[int, ...]], answers: Sequence[Sequence[tuple[int, ...]]]
) -> list[bool]:
    """Whether answers comply, several to each prompt."""
    asked = [prompt for prompt, samples in zip(prompts, answers, strict=True) for _ in samples]
    return complied(lab, spec, asked, [answer for samples in answers for answer in samples])


def cost(study: Study) -> Later:
    """What `analyse` asks for, at most."""
    settings = study.config.verify
    pairs = pairs_of(study, "heldout")[: settings.pairs]
    manner = Manner(settings.samples, settings.tokens, settings.temperature, settings.held)
    mediators = settings.sites + _SETS
    flops = sum(sample_flops(len(ids), manner, study.info) for pair in pairs for ids in pair.prompts)
    numbers = 2 * len(pairs) * 2 * manner.samples * manner.tokens
    cheap = of_rows(study, pairs, Site("mlp_output", 0, "all")).times(mediators)
    return of_bases(study, pairs).plus(cheap, Later(0, flops, 4.0 * numbers).times(1 + mediators))


def _pairs(lab: Lab) -> list[TokenPair]:
    """Held-out pairs, one of each cluster first where there are too many."""
    pairs, most = lab.pairs("heldout"), lab.study.config.verify.pairs
    if len(pairs) <= most:
        return list(pairs)
    return [pairs[at] for at in sorted(spread([pair.cluster for pair in pairs], most))]


def _single(row: dict[Any, Any]) -> Mediator:
    """A site of the effects table."""
    has_units = not pd.isna(row["unit_start"])
    units = range(int(row["unit_start"]), int(row["unit_stop"])) if has_units else range(0)
    site = Site(row["component"], int(row["layer"]), row["position"], tuple(units))
    some = f", units {units[0]} to {units[-1]}" if units else ""
    return Mediator(f"{site.component} of layer {site.layer} at '{site.position}'{some}", (site,))


def _rows(
    lab: Lab, mediators: Sequence[Mediator], cheap: Indirect, verdicts: Verdicts, judge: _Judge
) -> list[dict[str, Any]]:
    """Rates of the plain model, its TE, then NIE and TIE of every mediator."""
    plain, swapped = verdicts.plain.mean(-1), verdicts.swapped.mean(-1)
    te = _Effect(cheap.te, plain[1] - plain[0])
    rows = [_rate_row(side, verdicts.plain[side], cheap.clusters, judge) for side in (1, 0)]
    rows.append({"mediator": "", "sites": 0, "quantity": "te", **_effect_row(lab, te, cheap.clusters, judge)})
    for number, one in enumerate(mediators):
        nie = _Effect(cheap.nie[number], swapped[number, 0] - plain[0])
        tie = _Effect(cheap.tie[number], plain[1] - swapped[number, 1])
        for quantity, effect in (("nie", nie), ("tie", tie)):
            named = {"mediator": one.name, "sites": len(one.sites), "quantity": quantity}
            shares = _share_columns(lab, effect, te, cheap.clusters)
            rows.append({**named, **_effect_row(lab, effect, cheap.clusters, judge), **shares})
    return rows


def _effect_row(lab: Lab, effect: _Effect, clusters: npt.NDArray[np.str_], judge: _Judge) -> dict[str, Any]:
    """Means of an effect by the outcome and by the judge, and the latter with the judge's errors allowed for."""
    resamples = lab.study.config.statistics.resamples
    cheap, said = (estimate_means([values], clusters, lab.rng("verify"), resamples)[0] for values in effect)
    true = corrected_difference(said, judge.sensitivity, judge.specificity)
    return {
        **cheap.columns("cheap"),
        **said.columns("judged"),
        **true.columns("corrected"),
        "n": said.n_pairs,
        "clusters": said.n_clusters,
        "reason": said.reason or true.reason,
    }


def _share_columns(lab: Lab, effect: _Effect, te: _Effect, clusters: npt.NDArray[np.str_]) -> dict[str, float]:
    """Shares of TE, each of its own."""
    found: dict[str, float] = {}
    for name, part, whole in zip(("cheap_share", "judged_share"), effect, te, strict=True):
        one = share(part, whole, clusters, lab.rng("verify"), lab.study.config.statistics.resamples)
        found |= one.columns(name)
    return found


def _rate_row(side: int, verdicts: Floats, clusters: npt.NDArray[np.str_], judge: _Judge) -> dict[str, Any]:
    """Answers to the prompts of one side that comply. verdicts: `[pair, sample]`."""
    found = rate(verdicts.ravel(), np.repeat(clusters, verdicts.shape[1]))
    true = corrected_rate(found, judge.sensitivity, judge.specificity)
    return {
        "mediator": "",
        "sites": 0,
        "quantity": f"rate_{PROMPTS[side]}",
        **found.columns("judged"),
        **true.columns("corrected"),
        "n": len(verdicts),
        "clusters": found.n_clusters,
        "reason": found.reason or true.reason,
    }


def _by_pair(mediators: Sequence[Mediator], pairs: Sequence[TokenPair], verdicts: Verdicts) -> pd.DataFrame:
    """How many answers comply, by pair, mediator and prompt."""
    every = [("", verdicts.plain), *((one.name, verdicts.swapped[at]) for at, one in enumerate(mediators))]
    rows = [
        {
            "pair_id": pair.id,
            "cluster": pair.cluster,
            "mediator": name,
            "prompts": prompts,
            "samples": found.shape[-1],
            "complied": int(found[side, at].sum()),
        }
        for name, found in every
        for side, prompts in enumerate(PROMPTS)
        for at, pair in enumerate(pairs)
    ]
    return pd.DataFrame(rows, columns=list(JUDGED_COLUMNS))
