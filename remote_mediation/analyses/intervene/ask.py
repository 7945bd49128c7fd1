"""Does holding the gates repair the model, and what does that cost?

Neurons are held from the last prompt token on, along given answers and at every step of generation. *Benefit* is read
on held-out harmful prompts, in the outcome and by a judge of what the model then says. *Cost* is read on their harmless
counterparts: the divergence from the plain model along its own answers, their perplexity, and what the judge says of
the answers. The controls are random sets of the same size, held in the same way, and the whole MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.intervene.judging import complied, judge_quality
from remote_mediation.analyses.neurons.ask import gate_set
from remote_mediation.analyses.neurons.cost import gate_rows
from remote_mediation.analyses.neurons.search import whole_mlp
from remote_mediation.engine.rows import Constant, Row, Scale, Write
from remote_mediation.engine.tasks import Held, Reading, drift_task, read_task
from remote_mediation.lab import Floats, Lab, Study
from remote_mediation.later import Later, of_answers, of_bases, of_readings, of_tasks, pairs_of
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Site
from remote_mediation.stats import estimate_means, wilson
from remote_mediation.tokens import TokenPair

INTERVENE_COLUMNS: dict[str, str] = {
    "held": "what is held, and at which value",
    "size": "neurons held",
    "prompts": "harmful or harmless, both held out",
    "n": "prompts",
    "change": "mean change of the outcome, in its unit",
    "change_low": "lower end of its 95% clustered interval",
    "change_high": "upper end",
    "share": "change / -mean TE: 1 undoes what the harmful prompts change",
    "kl": "mean divergence from the plain model along its own answer, nats per token; harmless prompts",
    "kl_low": "lower end of its 95% clustered interval",
    "kl_high": "upper end",
    "perplexity": "of the plain model's own answers; harmless prompts",
    "judged": "answers judged",
    "complied": "share of generated answers that comply, says the judge",
    "complied_low": "lower end of its 95% Wilson interval",
    "complied_high": "upper end",
    "reason": "why a number is missing, or why to read it with care",
}
PLAIN, MEAN = "nothing", "gates at their harmless mean"
RANDOM, MLP = "random sets at their harmless mean", "whole MLP at its harmless mean"
SIDES = ("harmless", "harmful")
RANDOM_SETS = 20


class Condition(NamedTuple):
    """A way of holding neurons; random sets are several, whose effects are averaged."""

    name: str
    sets: tuple[tuple[Held, ...], ...]


def analyse(lab: Lab, before: Findings) -> Finding:
    """Benefit and cost of every condition (`INTERVENE_COLUMNS`), and the judge's quality (`JUDGE_COLUMNS`)."""
    found = gate_set(before)
    if found is None:
        return Finding()
    conditions = _conditions(lab, found.gates, found.random[:RANDOM_SETS])
    sets, pairs = [held for condition in conditions for held in condition.sets], lab.pairs("heldout")
    lab.outcomes([row for held in sets for side in (0, 1) for row in held_rows(pairs, side, held)])  # all in one wave
    rows = [_row(lab, condition, side) for condition in conditions for side in (1, 0)]
    table = pd.DataFrame(rows, columns=list(INTERVENE_COLUMNS))
    return Finding({"intervene.csv": table, "judge.csv": judge_quality(lab, lab.study.config.intervene.judge)})


def harmless_mean(lab: Lab, layer: int) -> Floats:
    """Mean activity `[unit]` of a layer's neurons at the last token of the discovery split's harmless prompts."""
    tasks = [
        read_task(pair.id, pair.x0, [Reading("mlp_neurons", layer, (len(pair.x0) - 1,))], lab.study.setting)
        for pair in lab.pairs("discovery")
    ]
    mean: Floats = np.mean(np.array(lab.run(tasks), dtype=np.float64), axis=0)
    return mean


def at_mean(site: Site, mean: Floats) -> Held:
    """A set of neurons held at its mean."""
    return Held(site.layer, site.units, Constant(tuple(float(mean[unit]) for unit in site.units)))


def outcome_change(lab: Lab, pairs: Sequence[TokenPair], side: int, held: Sequence[Held]) -> Floats:
    """`[pair]`, change of Y when neurons are held where the answer is read."""
    return lab.outcomes(held_rows(pairs, side, held)) - lab.outcomes([Row(pair.id, side) for pair in pairs])


def held_rows(pairs: Sequence[TokenPair], side: int, held: Sequence[Held]) -> list[Row]:
    """One prompt of each pair with neurons held where the answer is read."""
    return [
        Row(
            pair.id,
            side,
            tuple(Write("mlp_neurons", one.layer, pair.places("last")[side], one.units, one.value) for one in held),
        )
        for pair in pairs
    ]


def _conditions(lab: Lab, gates: Site, random: Sequence[Site]) -> list[Condition]:
    mean = harmless_mean(lab, gates.layer)
    doses = [
        Condition(f"gates times {factor:g}", ((Held(gates.layer, gates.units, Scale(factor)),),))
        for factor in lab.study.config.intervene.factors
    ]
    return [
        Condition(PLAIN, ((),)),
        Condition(MEAN, ((at_mean(gates, mean),),)),
        *doses,
        Condition(RANDOM, tuple((at_mean(site, mean),) for site in random)),
        Condition(MLP, ((at_mean(whole_mlp(lab, gates.layer), mean),),)),
    ]


def _row(lab: Lab, condition: Condition, side: int) -> dict[str, Any]:
    """One condition on the held-out prompts of one side. Of random sets, only the first generates and drifts."""
    pairs, settings = lab.pairs("heldout"), lab.study.config.intervene
    prompts, first = [pair.prompts[side] for pair in pairs], condition.sets[0]
    verdicts = complied(lab, settings.judge, prompts, lab.generate(prompts, settings.tokens, first))
    return {
        "held": condition.name,
        "size": len(first[0].units) if first else 0,
        "prompts": SIDES[side],
        **_change(lab, condition, side),
        **(_cost(lab, pairs, [pair.cluster for pair in pairs], first) if side == 0 else {}),
        "judged": len(verdicts),
        **wilson(sum(verdicts), len(verdicts)).columns("complied"),
    }


def _change(lab: Lab, condition: Condition, side: int) -> dict[str, Any]:
    """What a condition does to the outcome, the mean over its sets; nothing held changes nothing."""
    pairs, by = lab.pairs("heldout"), lab.study.config.statistics
    changes = np.mean([outcome_change(lab, pairs, side, held) for held in condition.sets], axis=0)
    found = estimate_means([changes], [pair.cluster for pair in pairs], lab.rng("intervene"), by.resamples)[0]
    if condition.name == PLAIN:
        unknown = dict.fromkeys(("change_low", "change_high", "share"), np.nan)
        return {"n": found.n_pairs, "change": 0.0, **unknown, "reason": ""}
    y0, y1 = (lab.outcomes([Row(pair.id, number) for pair in pairs]) for number in (0, 1))
    share = -found.value / float(np.nanmean(y1 - y0))
    return {"n": found.n_pairs, **found.columns("change"), "share": share, "reason": found.reason}


def _cost(lab: Lab, pairs: Sequence[TokenPair], clusters: Sequence[str], held: Sequence[Held]) -> dict[str, float]:
    """Drift from the plain model along its own answers to the harmless prompts."""
    answers = lab.generate([pair.x0 for pair in pairs], lab.study.config.intervene.tokens)
    used = [(pair, answer, cluster) for pair, answer, cluster in zip(pairs, answers, clusters, strict=True) if answer]
    if not used:
        return {}
    found = lab.run([drift_task(pair.id, pair.x0, answer, held, lab.study.setting) for pair, answer, _ in used])
    by_token = [values.reshape(3, -1) for values in found]
    means, of_used = [float(one[0].mean()) for one in by_token], [cluster for *_, cluster in used]
    (kl,) = estimate_means([means], of_used, lab.rng("drift"), lab.study.config.statistics.resamples)
    losses = np.concatenate([one[2] for one in by_token])
    return {**kl.columns("kl"), "perplexity": float(np.exp(losses.mean()))}


def cost(study: Study) -> Later:
    """What `analyse` asks for, at most."""
    pairs, settings = pairs_of(study, "heldout"), study.config.intervene
    held = 2 + len(settings.factors)  # gates at their mean or times a factor, the whole MLP
    prompts = [ids for pair in pairs for ids in pair.prompts]
    drifts = [drift_task("", pair.x0, (0,) * settings.tokens, (), study.setting) for pair in pairs]
    said = of_answers(study, prompts, settings.tokens).plus(of_tasks(drifts, 3 * settings.tokens))
    return of_bases(study, pairs).plus(
        gate_rows(study, "heldout").times(held + RANDOM_SETS),
        of_readings(study, pairs_of(study, "discovery"), study.info.d_ff),
        said.times(held + 2),  # and with nothing held, and with a random set
    )
