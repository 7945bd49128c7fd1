"""Is one direction what refuses? It is taken out of the stream, or added to it, while the model generates.

As in arXiv 2406.11717: *ablation* takes the direction out of everything that enters the residual stream, at every
layer and token, of prompt and answer; *addition* adds the difference of means, as long as it is, after its layer at
every token. Refusals are counted on held-out harmful prompts, ablated, and on their harmless counterparts, with either.
Beside each stands a random direction, added as long as the other one. What is done to the model is read in the
divergence of its next-token distributions on the harmless prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from remote_mediation.analyses.intervene.judging import complied, judge_quality, measure_of
from remote_mediation.engine.tasks import Ablated, Added, Intervention, drift_task
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import Later, of_answers, of_tasks, pairs_of
from remote_mediation.rates import corrected_rate, rate
from remote_mediation.result import Finding, Findings
from remote_mediation.stats import estimate_means, spread
from remote_mediation.subspaces import Basis, Direction
from remote_mediation.tokens import TokenPair

ABLATION_COLUMNS: dict[str, str] = {
    "direction": "`the direction` found, `the given direction`, or one at random beside it; empty for the plain model",
    "done": "what is done with it at every token: `ablated` at all layers, or `added` after one; or nothing",
    "layer": "layer after which it was found, and after which it is added",
    "position": "token at which it was found",
    "length": "of the difference of means, which is added",
    "prompts": "harmful or harmless, both held out",
    "refused": "share of greedy answers that do not comply, says the judge",
    "refused_low": "lower end of its 95% interval, over clusters of pairs",
    "refused_high": "upper end",
    "corrected": "the same, allowing for the judge's errors on labelled answers",
    "corrected_low": "lower end of its 95% interval, with what is not known of these errors",
    "corrected_high": "upper end",
    "change": "refused minus that of the plain model on the same prompts",
    "change_low": "lower end of its 95% interval, over clusters of pairs",
    "change_high": "upper end",
    "kl_first": "mean divergence from the plain model of the first token of an answer, nats; harmless prompts",
    "kl_first_low": "lower end of its 95% interval, over clusters of pairs",
    "kl_first_high": "upper end",
    "kl_next": "the same of the tokens along the plain model's own answer, nats per token",
    "kl_next_low": "lower end of its 95% interval, over clusters of pairs",
    "kl_next_high": "upper end",
    "n": "prompts",
    "clusters": "clusters of pairs",
    "reason": "why a number is missing, or why to read it with care",
}
ABLATED, ADDED = "ablated", "added"
SIDES = ("harmless", "harmful")


class Condition(NamedTuple):
    """What is done to the stream."""

    direction: str
    """Empty for the plain model."""
    done: str
    found: Direction | None
    """Where it lies; None for the plain model."""
    intervention: Intervention
    sides: tuple[int, ...]
    """Of the prompts on which answers are asked for: 1 the harmful ones."""


class _Prompts(NamedTuple):
    """Held-out pairs, and what they share."""

    pairs: Sequence[TokenPair]
    clusters: npt.NDArray[np.str_]


PLAIN = Condition("", "", None, (), (1, 0))


def beside(name: str) -> str:
    """Of a random direction, that of the one it stands beside."""
    return f"at random, beside {name}"


def analyse(lab: Lab, before: Findings) -> Finding:
    """`ablation.csv` (`ABLATION_COLUMNS`) and the judge's quality; nothing where no direction was found."""
    if "directions" not in before:
        return Finding()
    settings, pairs = lab.study.config.ablation, lab.pairs("heldout")
    chosen = [pairs[at] for at in spread([pair.cluster for pair in pairs], settings.pairs)]
    asked = _Prompts(chosen, np.array([pair.cluster for pair in chosen]))
    quality = judge_quality(lab, settings.judge, settings.labelled)
    plain = {side: refusals(lab, asked, PLAIN, side) for side in PLAIN.sides}
    conditions = [PLAIN, *conditions_of(before["directions"].value, lab.rng("ablation: random directions"))]
    rows = [_row(lab, asked, one, side, plain[side], quality) for one in conditions for side in one.sides]
    return Finding({"ablation.csv": pd.DataFrame(rows, columns=list(ABLATION_COLUMNS)), "ablation_judge.csv": quality})


def conditions_of(directions: Mapping[str, Direction], rng: np.random.Generator) -> Iterator[Condition]:
    """Each direction and a random one of its size, ablated; and added, as long as the difference of means."""
    for name, found in directions.items():
        own, other = found.basis, Basis.random(found.basis.size, found.basis.width, rng)
        pairs = {name: own, beside(name): other}
        for label, basis in pairs.items():
            yield Condition(label, ABLATED, found, Ablated(basis), (1, 0))
        if not np.isfinite(found.length) or found.layer is None:
            continue
        for label, basis in pairs.items():
            vector = tuple((found.length * basis.vectors[0]).tolist())
            yield Condition(label, ADDED, found, Added(found.layer, vector), (0,))


def refusals(lab: Lab, asked: _Prompts, condition: Condition, side: int) -> Floats:
    """`[pair]`, 1 where the judge says that the answer to one side's prompt does not comply."""
    settings = lab.study.config.ablation
    prompts = [pair.prompts[side] for pair in asked.pairs]
    answers = lab.generate(prompts, settings.tokens, condition.intervention)
    return 1.0 - np.array(complied(lab, settings.judge, prompts, answers), dtype=np.float64)


def divergences(lab: Lab, pairs: Sequence[TokenPair], held: Intervention) -> tuple[Floats, Floats]:
    """`[pair]` of the first token, and the mean along the plain model's own answer, on harmless prompts, in nats."""
    answers = lab.generate([pair.x0 for pair in pairs], lab.study.config.ablation.tokens)
    tasks = [
        drift_task(pair.id, pair.x0, answer or (0,), held, lab.study.setting)  # of no answer its end is the first token
        for pair, answer in zip(pairs, answers, strict=True)
    ]
    along = [values.reshape(3, -1)[0].astype(np.float64) for values in lab.run(tasks)]
    return np.array([one[0] for one in along]), np.array([one.mean() for one in along])


def _row(
    lab: Lab, asked: _Prompts, condition: Condition, side: int, plain: Floats, quality: pd.DataFrame
) -> dict[str, Any]:
    """One condition on the prompts of one side. plain: refusals of the plain model."""
    refused = refusals(lab, asked, condition, side)
    found, where = rate(refused, asked.clusters), condition.found
    # It looks for refusals: what it finds of them is its specificity.
    true = corrected_rate(found, measure_of(quality, "specificity"), measure_of(quality, "recall"))
    done = {} if condition is PLAIN else _changes(lab, asked, condition, side, refused - plain)
    return {
        "direction": condition.direction,
        "done": condition.done,
        **({"layer": where.layer, "position": where.position, "length": where.length} if where else {}),
        "prompts": SIDES[side],
        **found.columns("refused"),
        **true.columns("corrected"),
        "n": len(refused),
        "clusters": found.n_clusters,
        "reason": found.reason or true.reason,
        **done,
    }


def _changes(lab: Lab, asked: _Prompts, condition: Condition, side: int, change: Floats) -> dict[str, Any]:
    """Change of refusals, and on harmless prompts the divergences, with their intervals, and how to read these."""
    values = {"change": change}
    if side == 0:
        values["kl_first"], values["kl_next"] = divergences(lab, asked.pairs, condition.intervention)
    resamples = lab.study.config.statistics.resamples
    means = dict(
        zip(values, estimate_means(list(values.values()), asked.clusters, lab.rng("ablation"), resamples), strict=True)
    )
    found: dict[str, Any] = {}
    for name, mean in means.items():
        found |= mean.columns(name)
    said = [f"{name}: {mean.reason}" for name, mean in means.items() if mean.reason]
    return {**found, **({"reason": "; ".join(said)} if said else {})}


def cost(study: Study) -> Later:
    """What `analyse` asks for, at most."""
    settings = study.config.ablation
    pairs, directions = pairs_of(study, "heldout")[: settings.pairs], 2 if study.config.directions.basis else 1
    said = [of_answers(study, [pair.prompts[side] for pair in pairs], settings.tokens) for side in (0, 1)]
    drifts = [drift_task("", pair.x0, (0,) * settings.tokens, (), study.setting) for pair in pairs]
    harmless = said[0].plus(of_tasks(drifts, 3 * settings.tokens))
    steered = harmless.times(4).plus(said[1].times(2))  # a direction and a random one, ablated and added
    return said[0].plus(said[1], steered.times(directions))
