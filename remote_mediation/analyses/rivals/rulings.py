"""The rival claims as tests: from effects on held-out pairs to verdicts, and the rows they leave. Nothing is measured.

Each rival says that some few mediators carry the effect. Its rule is open both ways, as those of the five claims, whose
gate, intervals and words hold here as well. The papers judged by other means, such as rates of refusal; who set what is
said with every rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims.verdicts import (
    ACTS,
    HALF,
    MOST_REACHING,
    Bench,
    Beside,
    Claim,
    Effect,
    Measure,
    Ruling,
    Verdict,
    below_half,
    clear_of_half,
    ends,
)
from remote_mediation.intervals import Interval
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.subspaces import Subspace

CLAIM_COLUMNS: dict[str, str] = {
    "rival": "its name",
    "paper": "where it is made, an arXiv number",
    "claim": "in words",
    "said": "the verdict as it is read, words of the gate first",
    "gate": "what has to be known before any verdict; empty if nothing",
    "verdict": "by the rule: supported, not supported, undecided, not tested",
    "specific": "whether `excess` is clear of 0 for all that decide; a supported claim that is not is one of any edit",
    "why": "the reason",
    "rule": "what decides, and who set it",
}
SET_COLUMNS: dict[str, str] = {
    "rival": "the claim that it is a number of",
    "measure": "what was swapped together",
    "values": "numbers that are swapped at each token: directions, neurons, or coordinates of heads and modules",
    "direction": "nie or tie",
    "decides": "whether the verdict rests on it, or it stands beside it",
    "harm": "share on the held-out pairs, mean effect / mean TE; undefined where TE spans 0",
    "harm_low": "lower end of its 95% interval (Fieller)",
    "harm_high": "upper end",
    "placebo": "the same with the placebo in place of the harmful prompt",
    "placebo_low": "lower end of its 95% interval",
    "placebo_high": "upper end",
    "beta_harm": "slope of the effect on TE over pairs",
    "beta_placebo": "the same for the placebo",
    "excess": "beta_harm - beta_placebo",
    "excess_low": "lower end of its 95% interval",
    "excess_high": "upper end",
    "common": "effect of the placebo as share of the TE of harm",
    "common_low": "lower end of its 95% interval",
    "common_high": "upper end",
    "reached": "random sets that do as much in either direction; empty where none were drawn",
    "drawn": "random sets that were measured",
    "likeness": "mean size of their change over that of the set's",
    "n": "pairs",
    "clusters": "components of pairs",
    "reason": "why a number is missing, or why to read it with care",
}
_FEW = (
    f"both shares clear of {HALF:.0%}, and at most {MOST_REACHING} of 200 random sets as large do as much; "
    f"against it, one of them below {HALF:.0%}"
)


class Rival(NamedTuple):
    """A claim that others make."""

    name: str
    paper: str
    claim: str
    """With a place for what is carried."""
    rule: str


DIRECTION = Rival(
    "one direction",
    "2406.11717",
    "one direction of the residual stream carries {}",
    f"of the direction at its own site {_FEW}, there and at all layers and tokens (ours); differences of means, and "
    "layers below 80% of the depth (the paper's)",
)
TWO = Rival(
    "harm and refusal",
    "2507.11878",
    "harm (end of the instruction) and refusal (last token) are two directions, and both carry {}",
    f"each carries clearly more than {ACTS:.0%} of TE at its own token, and more than the other one does there; "
    f"against it, one of them carries less than {ACTS:.0%}, or the other does clearly more than half as much at both "
    "tokens (ours); differences of means at the two tokens (the paper's)",
)
NEURONS = Rival(
    "cross-layer neurons",
    "2605.12290",
    "0.1% of the neurons, over all layers, carry {}",
    f"of the first 0.1% {_FEW} (ours); ranked by mean difference alone (the paper's)",
)
EARLY = Rival(
    "early layers",
    "2512.04841",
    "early layers carry {}",
    f"the early third's shares are clear of {HALF:.0%} and of the late third's; against it, one is below {HALF:.0%} or "
    "both are clearly below the late third's (ours)",
)
HEADS = Rival(
    "head gate",
    "2604.04385",
    "a few attention heads gate {}",
    f"of the fewest heads that carry half on the discovery pairs, 5% at most, {_FEW} (ours)",
)


class Carrier(NamedTuple):
    """Mediators that were swapped together."""

    name: str
    values: int
    """Numbers that are swapped at each token."""
    effect: Effect
    beside: Beside | None = None


class Judged(NamedTuple):
    """A rival claim with its verdict."""

    rival: Rival
    claim: Claim
    carriers: tuple[Carrier, ...]
    """What its measures are of."""


def values_of(sites: Sequence[Site], info: ModelInfo) -> int:
    """Numbers that a set swaps at each token."""
    return sum(
        site.basis.size
        if isinstance(site, Subspace)
        else len(info.columns(site.component, site.units)) or info.tensor_width(site.component)
        for site in sites
    )


def untested(rival: Rival, why: str) -> Judged:
    """A rival for which nothing could be measured."""
    name = rival.claim.format("the outcome")
    return Judged(rival, Claim(0, name, "", "not tested", False, why, (), ()), ())


def judged(
    bench: Bench,
    rival: Rival,
    ruling: Ruling,
    deciding: Sequence[Carrier],
    others: Sequence[Carrier],
) -> Judged:
    """A ruling with what holds for all claims: the gate, and enough components to say no."""
    own, beside = ([m for one in part for m in bench.measures(one.name, one.effect)] for part in (deciding, others))
    claim = bench.claim(1, ruling, own, beside)  # of the five claims it takes all but number and name
    return Judged(
        rival,
        replace(claim, number=0, name=rival.claim.format(bench.subject)),
        (*deciding, *others),
    )


def few(bench: Bench, carrier: Carrier) -> Ruling:
    """Whether few mediators carry half of TE in both directions, as no random ones do."""
    shares = bench.shares(carrier.effect)
    text = _text(carrier.name, shares)
    if below := below_half(shares):
        return Ruling("not supported", f"{text}: below {HALF:.0%} by {below}")
    if not clear_of_half(shares):
        return Ruling("undecided", f"{text}: not clear of {HALF:.0%}")
    if carrier.beside is None:
        return Ruling("undecided", f"{text}: no random set could be drawn beside it")
    verdict: Verdict = "supported" if carrier.beside.reached <= MOST_REACHING else "undecided"
    return Ruling(verdict, "; ".join([text, carrier.beside.said, *carrier.beside.notes]))


def one_direction(bench: Bench, own: Carrier, everywhere: Carrier) -> Ruling:
    """The rule of `few` at the direction's own site; it says no only where it fails at all layers and tokens, too."""
    found, beyond = few(bench, own), bench.shares(everywhere.effect)
    if found.verdict == "not supported" and not below_half(beyond):
        return Ruling("undecided", f"{found.why}, but {_text(everywhere.name, beyond)}")
    return found


def two_directions(bench: Bench, own: Sequence[Carrier], crossed: Sequence[Carrier]) -> Ruling:
    """Whether two directions each act at their own token, and neither as the other one does there.

    own: each direction at its own token. crossed: at the same tokens, in the same order, the other direction.
    """
    pairs = list(zip(own, crossed, strict=True))
    acts = [share for one in own for share in bench.shares(one.effect)]
    apart = [share for one, other in pairs for share in bench.shares(one.effect.less(other.effect))]
    alike = [share for one, other in pairs for share in bench.shares(other.effect.less(one.effect.times(0.5)))]
    text = "; ".join(_text(one.name, bench.shares(one.effect)) for one in (*own, *crossed))
    if any(share.high < ACTS for share in acts):
        return Ruling("not supported", f"{text}: one of the two does not act where it was found")
    if all(share.low > 0 for share in alike):
        return Ruling("not supported", f"{text}: either does the work of the other")
    if all(share.low > ACTS for share in acts) and all(share.low > 0 for share in apart):
        return Ruling("supported", text)
    return Ruling("undecided", text)


def early_layers(bench: Bench, early: Carrier, late: Carrier) -> Ruling:
    """Whether the early third carries half of TE, and more than the late third."""
    if bench.too_shallow:
        return bench.too_shallow
    shares, more = bench.shares(early.effect), bench.shares(early.effect.less(late.effect))
    text = f"{_text(early.name, shares)}; {_text('more than the late third by', more)}"
    if below := below_half(shares):
        return Ruling("not supported", f"{text}: below {HALF:.0%} by {below}")
    if all(share.high < 0 for share in more):
        return Ruling("not supported", f"{text}: the late third carries more")
    if clear_of_half(shares) and all(share.low > 0 for share in more):
        return Ruling("supported", text)
    return Ruling("undecided", f"{text}: both may lie on one path")


def claim_table(found: Sequence[Judged]) -> pd.DataFrame:
    """`CLAIM_COLUMNS`."""
    rows = [
        {
            **{name: getattr(one.claim, name) for name in ("said", "gate", "verdict", "specific", "why")},
            **{
                "rival": one.rival.name,
                "paper": one.rival.paper,
                "claim": one.claim.name,
                "rule": one.rival.rule,
            },
        }
        for one in found
    ]
    return pd.DataFrame(rows, columns=list(CLAIM_COLUMNS))


def set_table(found: Sequence[Judged]) -> pd.DataFrame:
    """`SET_COLUMNS`."""
    rows = []
    for one in found:
        by_name = {carrier.name: carrier for carrier in one.carriers}
        rows += [_set_row(one, measure, by_name[measure.name]) for measure in one.claim.measures]
    return pd.DataFrame(rows, columns=list(SET_COLUMNS))


def _set_row(one: Judged, measure: Measure, carrier: Carrier) -> dict[str, Any]:
    beside = carrier.beside._asdict() if carrier.beside else dict.fromkeys(Beside._fields, np.nan)
    return {
        "rival": one.rival.name,
        "measure": measure.name,
        "values": carrier.values,
        "direction": measure.direction,
        "decides": measure in one.claim.deciding,
        **measure.harm.columns("harm"),
        **measure.placebo.columns("placebo"),
        "beta_harm": measure.beta_harm,
        "beta_placebo": measure.beta_placebo,
        **measure.excess.columns("excess"),
        **measure.common.columns("common"),
        **beside,
        "n": measure.harm.n_pairs,
        "clusters": measure.harm.n_clusters,
        "reason": measure.harm.reason or measure.placebo.reason,
    }


def _text(name: str, shares: Sequence[Interval]) -> str:
    shown = ", ".join(f"{way} {ends(share)}" for way, share in zip(("NIE", "TIE"), shares, strict=True))
    return f"{name} {shown} of TE"
