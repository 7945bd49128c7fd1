"""Which sets of mediators the five claims are put to, and the tables that they leave.

Everything is measured on held-out pairs and their placebos; what has to be chosen (how few neurons, which layer is
readable) is chosen on the discovery pairs. Sets are swapped together (`Lab.joint`) or take effect on the answer alone
(`Lab.direct`); effects of single sites are never added up, as they lie on the same paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims import sparse, understanding, verdicts
from remote_mediation.analyses.claims.handed import handed_on, handed_rows
from remote_mediation.analyses.claims.samples import Sample, failing
from remote_mediation.analyses.claims.specification import Compared, specification
from remote_mediation.analyses.claims.verdicts import ALL_LAYERS, FEWEST_LAYERS, Claim, Effect
from remote_mediation.engine.rows import Row
from remote_mediation.lab import Lab
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import Site, band, thirds

CLAIM_COLUMNS: dict[str, str] = {
    "number": "the claim, as in the method",
    "claim": "in words",
    "said": "the verdict as it is read, words of the gate first",
    "gate": "what has to be known before any verdict; empty if nothing",
    "verdict": "by the claim's own rule: supported, not supported, undecided, not tested",
    "specific": "whether `excess` is clear of 0 for all that decide; a supported claim that is not is one of any edit",
    "why": "the reason",
}
SET_COLUMNS: dict[str, str] = {
    "number": "the claim that it is a number of",
    "measure": "what was measured",
    "direction": "nie, tie, the mean of both, or neither",
    "of": "what it is a share of",
    "decides": "whether the verdict rests on it, or it stands beside it",
    "harm": "share on the held-out pairs, mean effect / mean TE; undefined where TE spans 0",
    "harm_low": "lower end of its 95% interval",
    "harm_high": "upper end",
    "placebo": "the same with the placebo in place of the harmful prompt",
    "placebo_low": "lower end of its 95% interval",
    "placebo_high": "upper end",
    "beta_harm": "slope of the effect on TE over pairs; of an accuracy the accuracy",
    "beta_placebo": "the same for the placebo",
    "excess": "beta_harm - beta_placebo",
    "excess_low": "lower end of its 95% interval",
    "excess_high": "upper end",
    "common": "effect of the placebo as share of the TE of harm; of an accuracy the placebo's",
    "common_low": "lower end of its 95% interval",
    "common_high": "upper end",
    "n": "pairs",
    "clusters": "components of pairs",
    "reason": "why a number is missing, or why to read it with care",
}
PAIR_COLUMNS: dict[str, str] = {
    "number": "the claim that it is a number of",
    "measure": "what was measured",
    "direction": "nie, tie, the mean of both, or neither",
    "pair_id": "pair, of the held-out ones",
    "cluster": "its component",
    "harm": "effect, in the outcome's unit; of an accuracy its gain",
    "placebo": "the same with the placebo in place of the harmful prompt; empty where the pair has none",
    "te_harm": "total effect of the harmful prompt, in the outcome's unit",
    "te_placebo": "that of the placebo",
}
_NO_EDIT = "no held-out pair has tokens of the edit on both sides"


class FiveClaims(NamedTuple):
    """The claims with the tables beside them."""

    claims: tuple[Claim, ...]
    tables: dict[str, pd.DataFrame]
    """By name of the CSV file."""
    sets: Mapping[str, tuple[Site, ...]] = MappingProxyType({})
    """What other analyses may put to further tests."""


def analyse(lab: Lab, before: Findings) -> Finding:
    """Verdicts, the numbers behind them, and the effects behind these; further tables where they were measured."""
    found = measure_claims(lab)
    tables = {
        "claims.csv": pd.DataFrame(map(_claim_row, found.claims), columns=list(CLAIM_COLUMNS)),
        "sets.csv": pd.DataFrame(_set_rows(found.claims), columns=list(SET_COLUMNS)),
        **found.tables,
    }
    return Finding(tables, found.sets)


def measure_claims(lab: Lab) -> FiveClaims:
    """All five claims."""
    heldout, edits = Sample.of(lab, "heldout"), Sample.of(lab, "heldout", "edit")
    found = _measured(Sample.of(lab, "discovery"), heldout, edits)
    rows = [*_pair_rows(heldout, found.claims[:3]), *_pair_rows(edits, found.claims[3:])]
    return found._replace(tables={**found.tables, "set_pairs.csv": pd.DataFrame(rows, columns=list(PAIR_COLUMNS))})


def _measured(discovery: Sample, heldout: Sample, edits: Sample) -> FiveClaims:
    """edits: the held-out pairs that have the edit on both sides, on which claims 4 and 5 rest."""
    lab, layers = heldout.lab, heldout.lab.study.info.layers
    deep = layers >= FEWEST_LAYERS
    if deep:
        lab.measure_ahead(lambda: _rows_ahead(heldout, edits))
    where, what, tables = _measure_direct_claims(discovery, heldout)
    if not deep:
        shallow = f"{layers} layers have no thirds to speak of, it takes {FEWEST_LAYERS}"
        which, early, handed = (verdicts.untested(number, shallow) for number in (3, 4, 5))
        return FiveClaims((where, what, which, early, handed), tables)
    gate = sparse.measure_gate(discovery, heldout)
    sets = {"late MLPs": tuple(band("mlp_output", thirds(layers).late, "all")), **gate.sets}
    if not edits.pairs:
        early, handed = (verdicts.untested(number, _NO_EDIT) for number in (4, 5))
        return FiveClaims((where, what, gate.claim, early, handed), {**tables, **gate.tables}, sets)
    early, readable = understanding.measure_understanding(Sample.of(lab, "discovery", "edit"), edits)
    claims = (where, what, gate.claim, early, handed_on(edits))
    return FiveClaims(claims, {**tables, **gate.tables, **readable}, sets)


def _rows_ahead(heldout: Sample, edits: Sample) -> list[Row]:
    """What the held-out pairs are asked whatever is found.

    edits: those that have the edit on both sides.
    """
    lab = heldout.lab
    rows = heldout.rows([[_before_late(lab)], *_late_bands(lab).values()])
    return [*rows, *edits.rows(understanding.stream(lab)), *handed_rows(edits)]


class _DirectClaims(NamedTuple):
    where: Claim
    what: Claim
    tables: dict[str, pd.DataFrame]


def _measure_direct_claims(discovery: Sample, heldout: Sample) -> _DirectClaims:
    """Claims 1 and 2, and `specification.csv` where the backend gives direct effects."""
    samples = {"discovery": discovery, "heldout": heldout}
    problem = failing(heldout.lab, "claims-direct", lambda: list(map(measure_direct, samples.values())))
    if problem:
        where, what = (verdicts.untested(number, f"no direct effects could be had: {problem}") for number in (1, 2))
        return _DirectClaims(where, what, {})
    direct = {name: measure_direct(sample) for name, sample in samples.items()}
    tables = {"specification.csv": _specified(heldout.lab, direct, samples)}
    what = _mlp_not_attention(heldout, direct["heldout"].differences)
    return _DirectClaims(_late(heldout, direct["heldout"].late), what, tables)


def layer_sets(layers: int) -> dict[str, range]:
    """All layers, all but the first (which re-embeds what was changed), those after the early third, and the late."""
    _, middle, late = thirds(layers)
    first = {start: range(start, layers) for start in (1, middle.start, late.start) if start < layers}
    return {
        ALL_LAYERS: range(layers),
        **{f"layers {at} to {layers - 1}": part for at, part in first.items()},
    }


class Direct(NamedTuple):
    """Direct effects at `last`."""

    differences: dict[str, Effect]
    """By layers, that of their MLPs minus that of their attention."""
    late: Effect
    """Of all that the late third adds; of a model without one, of nothing."""


def measure_direct(sample: Sample) -> Direct:
    """The direct effects of a sample, measured together."""
    layers = sample.lab.study.info.layers
    parts, late = layer_sets(layers), thirds(layers).late
    mlps = [band("mlp_output", part, "last") for part in parts.values()]
    attention = [band("attention_output", part, "last") for part in parts.values()]
    third = [*band("mlp_output", late, "last"), *band("attention_output", late, "last")]
    *found, of_late = sample.effects(sample.lab.direct, [*mlps, *attention, third])
    pairs = zip(parts, found[: len(parts)], found[len(parts) :], strict=True)
    return Direct({name: mlp.less(other) for name, mlp, other in pairs}, of_late)


def _late(heldout: Sample, decided: Effect) -> Claim:
    (arrived,) = heldout.effects(heldout.lab.joint, [[_before_late(heldout.lab)]])
    return verdicts.late(heldout.bench(), decided, arrived, heldout.reads_edit)


def _mlp_not_attention(heldout: Sample, differences: Mapping[str, Effect]) -> Claim:
    sets = _late_bands(heldout.lab)
    bands = dict(zip(sets, heldout.effects(heldout.lab.joint, list(sets.values())), strict=True))
    return verdicts.mlp_not_attention(heldout.bench(), differences, bands, heldout.reads_edit)


def _before_late(lab: Lab) -> Site:
    """The stream where the answer is read as the late third gets it."""
    return Site("layer_output", max(thirds(lab.study.info.layers).late.start - 1, 0), "last")


def _late_bands(lab: Lab) -> dict[str, Sequence[Site]]:
    """What stands beside claim 2; nothing in a model without a late third."""
    late = thirds(lab.study.info.layers).late
    if not late:
        return {}
    return {
        "late MLPs together, joint": band("mlp_output", late, "all"),
        "late attention together, joint": band("attention_output", late, "all"),
    }


def _specified(lab: Lab, direct: Mapping[str, Direct], samples: Mapping[str, Sample]) -> pd.DataFrame:
    by_split = {
        name: Compared(direct[name].differences, sample.bench().total.harm, sample.clusters)
        for name, sample in samples.items()
    }
    return specification(
        {**by_split, "all": _joined(list(by_split.values()))},
        samples["heldout"].bench().rng,
        lab.study.config.statistics.resamples,
    )


def _joined(parts: Sequence[Compared]) -> Compared:
    """Pairs of several splits as one."""
    joined = {name: Effect.joined([part.differences[name] for part in parts]) for name in parts[0].differences}
    totals = np.concatenate([part.total for part in parts])
    return Compared(joined, totals, np.concatenate([part.clusters for part in parts]))


def _claim_row(claim: Claim) -> dict[str, Any]:
    kept = {name: getattr(claim, name) for name in ("number", "said", "gate", "verdict", "specific", "why")}
    return {**kept, "claim": claim.name}


def _set_rows(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [
        {
            "number": claim.number,
            "measure": measure.name,
            "direction": measure.direction,
            "of": measure.of,
            "decides": measure in claim.deciding,
            **measure.harm.columns("harm"),
            **measure.placebo.columns("placebo"),
            "beta_harm": measure.beta_harm,
            "beta_placebo": measure.beta_placebo,
            **measure.excess.columns("excess"),
            **measure.common.columns("common"),
            "n": measure.harm.n_pairs,
            "clusters": measure.harm.n_clusters,
            "reason": measure.harm.reason or measure.placebo.reason,
        }
        for claim in claims
        for measure in claim.measures
    ]


def _pair_rows(sample: Sample, claims: Sequence[Claim]) -> Iterator[dict[str, Any]]:
    """A row for every pair and number; what is the same for several claims stands with each of them."""
    harm, placebo = sample.bench().total
    for claim in claims:
        for measure in claim.measures:
            for place, pair in enumerate(sample.pairs):
                yield {
                    "number": claim.number,
                    "measure": measure.name,
                    "direction": measure.direction,
                    "pair_id": pair.id,
                    "cluster": pair.cluster,
                    "harm": measure.pairs.harm[place],
                    "placebo": measure.pairs.placebo[place],
                    "te_harm": harm[place],
                    "te_placebo": placebo[place],
                }
