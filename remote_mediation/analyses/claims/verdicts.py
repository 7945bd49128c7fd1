"""The five claims as tests: from effects on held-out pairs to verdicts. Pure, nothing is measured here.

Every claim is tested in both directions, NIE and TIE, and is open both ways: the rule that supports it and the one that
does not are written side by side, and what meets neither is undecided. Harm and placebo stand beside each other, and
before any verdict comes the gate: is there an effect, and is it one of harm?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from remote_mediation.intervals import Floats, Interval
from remote_mediation.rates import rate
from remote_mediation.shares import ANY_EDIT, Gate, gate, share, slope, slope_difference
from remote_mediation.stats import estimate_means

Verdict = Literal["supported", "not supported", "undecided", "not tested"]
GateWord = Literal["no effect", "not about harm", "placebo not tested", "placebo not comparable", ""]
Direction = Literal["nie", "tie"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
ALL_LAYERS = "all layers"
FEWEST_LAYERS = 6
"""With fewer, thirds are too thin for a claim of place."""
FEWEST_AGAINST = 15
"""Held-out components that "not supported" takes."""
MOST, LEAST = 2 / 3, 1 / 3
"""Claim 1: shares of TE."""
HALF = 0.5
"""Claim 1, of what arrives; claim 3, of TE; claim 5, of the early site's own effect."""
TRIFLE = 0.05
"""Claim 2: share of TE below which layers that say the opposite are called a trifle."""
SPARSE = 0.01
"""Claim 3: largest part of the late neurons that counts as few."""
CARRIED = 0.8
"""Claim 3: of the late MLPs' own effect."""
MOST_ALLOWED = " (1%)"
"""Claim 3: what stands behind the name of the largest set that may be a gate."""
LATE_MLPS = "late MLPs together"
"""What stands beside claim 3's set."""
MOST_REACHING = 2
"""Claim 3: matched random sets that may do as much."""
MATCHED = 0.8
"""Claim 3: ratio of sizes from which on random sets count as matched."""
REDUNDANT = 0.25
"""Claim 3: |INT| / TE from which on it is noted."""
ACTS = 0.05
"""Claim 4: share of TE from which on a layer acts."""
READABLE = 0.75
"""Claim 4: accuracy below which harm counts as not readable."""
GIVEN_AWAY = 0.95
"""Claim 4: accuracy on the embeddings from which on the words give it away."""
HANDED = 0.25
"""Claim 5: share of TE."""
AS_ATTENTION, MORE_ATTENTION = "as much through attention", "more through attention"
"""Claim 5: what is said where the middle MLPs carry no more than as many attention modules, or clearly less."""
_SHUT = ("no effect", "not about harm")
_NAMES = {
    1: "{} is decided in late layers",
    2: "MLP blocks carry {}, not attention",
    3: "a sparse set of neurons in the late layers gates {}",
    4: "early layers understand harm before it acts on {}",
    5: "that understanding is handed on to {} through MLPs",
}


class Both(NamedTuple):
    """One effect of the harmful prompt and of the placebo, in the outcome's unit."""

    harm: Floats
    """`[pair]`"""
    placebo: Floats
    """`[pair]`, NaN where a pair has no placebo."""

    def less(self, other: Both) -> Both:
        """This effect minus another, pair by pair."""
        return Both(self.harm - other.harm, self.placebo - other.placebo)


class Effect(NamedTuple):
    """What a set of mediators does when it is swapped together."""

    nie: Both
    tie: Both

    def less(self, other: Effect) -> Effect:
        """This set's effect minus another's."""
        return Effect(self.nie.less(other.nie), self.tie.less(other.tie))

    def times(self, factor: float) -> Effect:
        """So much of it."""
        return Effect(*(Both(factor * both.harm, factor * both.placebo) for both in self))

    @classmethod
    def joined(cls, parts: Sequence[Effect]) -> Effect:
        """The same set on the pairs of several samples, one after the other."""
        nie, tie = ([getattr(part, name) for part in parts] for name in DIRECTIONS)
        return cls(*(Both(*map(np.concatenate, zip(*sides, strict=True))) for sides in (nie, tie)))

    def missing_of(self, total: Both) -> Effect:
        """The part of the total effect that this set does not carry."""
        return Effect(total.less(self.nie), total.less(self.tie))


@dataclass(frozen=True)
class Measure:
    """A number behind a verdict, of harm and of the placebo."""

    name: str
    """What it is."""
    direction: Direction | Literal["both", ""]
    """Which prompt was changed: x0 (`nie`), x1 (`tie`), the mean of both, or neither."""
    of: str
    """What it is a share of."""
    harm: Interval
    placebo: Interval
    beta_harm: float
    """Slope of the effect on TE over pairs; of an accuracy the accuracy itself."""
    beta_placebo: float
    excess: Interval
    """`beta_harm` - `beta_placebo`, clusters resampled jointly."""
    common: Interval
    """What it does for the placebo, as share of the TE of harm: defined although the placebo's own TE is near 0."""
    pairs: Both
    """What all of this is estimated from, pair by pair: in the outcome's unit, or of an accuracy its gain."""

    @property
    def label(self) -> str:
        """Name and direction."""
        return f"{self.name}, {self.direction.upper()}" if self.direction in DIRECTIONS else self.name


class Ruling(NamedTuple):
    """What a claim's own rule says, before what holds for all claims."""

    verdict: Verdict
    why: str
    but: str = ""
    """What a control takes from a claim that is supported by its rule."""


@dataclass(frozen=True)
class Claim:
    """One claim, and what the held-out pairs say of it."""

    number: int
    """As in the method, from 1."""
    name: str
    """The claim in words: about the harmful answer, or about the refusal where harm makes the model refuse."""
    gate: GateWord
    """What the gate says of all claims; empty where it lets them pass."""
    verdict: Verdict
    """By the claim's own rule; "not tested" where the gate is shut."""
    specific: bool
    """Whether all numbers that decide are harm-specific: their `excess` is clear of 0."""
    why: str
    """The reason, in a sentence."""
    deciding: tuple[Measure, ...]
    """The numbers that decide."""
    beside: tuple[Measure, ...]
    """What stands beside them."""
    but: str = ""
    """What a control takes from it where it is supported."""

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All numbers, those that decide first."""
        return (*self.deciding, *self.beside)

    @property
    def said(self) -> str:
        """The verdict as it is read, words of the gate first."""
        if self.gate in _SHUT:
            return self.gate
        if self.gate:
            return f"{self.gate}: {self.verdict}"
        if self.verdict != "supported":
            return self.verdict
        general = "" if self.specific else ANY_EDIT
        return ", ".join(filter(None, (self.verdict, general, self.but)))


@dataclass(frozen=True)
class Bench:
    """The held-out pairs on which all claims are tested."""

    total: Both
    """Total effects."""
    clusters: npt.NDArray[np.str_]
    """`[pair]`, the component of each pair."""
    layers: int
    """Decoder layers of the model."""
    seed: int
    resamples: int
    comparable: bool = True
    """Whether harm and placebo have the same Y."""

    @cached_property
    def gate(self) -> Gate:
        """Is there an effect, and is it one of harm?"""
        placebo = self.total.placebo if self.comparable else None
        return gate(self.total.harm, placebo, self.clusters, self.rng(), self.resamples)

    @property
    def word(self) -> GateWord:
        """The gate's word, or that the placebo is not comparable."""
        if self.gate.verdict == "placebo not tested" and not self.comparable:
            return "placebo not comparable"
        return self.gate.verdict

    @property
    def subject(self) -> str:
        """What the claims are about: where harm lowers the outcome it makes the model refuse."""
        if self.gate.te_harm.sign == 0:
            return "the outcome"
        return "the refusal" if self.gate.te_harm.value < 0 else "the harmful answer"

    def rng(self) -> np.random.Generator:
        """The same draws for every statistic, so that intervals and tests agree."""
        return np.random.default_rng([self.seed, *b"claims"])

    def share(self, effect: Floats, total: Floats) -> Interval:
        """Share of a total, with its interval."""
        return share(effect, total, self.clusters, self.rng(), self.resamples)

    def shares(self, effect: Effect) -> list[Interval]:
        """NIE and TIE of harm as shares of TE."""
        return [self.share(both.harm, self.total.harm) for both in effect]

    def measure(self, name: str, direction: Direction | Literal["both"], effect: Both) -> Measure:
        """An effect as share of TE, and its slopes on TE.

        Where the placebo does next to nothing its slope says how noise travels: `Measure.common` shows it.
        """
        harm, placebo = self.total
        return Measure(
            name,
            direction,
            "TE",
            harm=self.share(effect.harm, harm),
            placebo=self.share(effect.placebo, placebo),
            beta_harm=slope(effect.harm, harm),
            beta_placebo=slope(effect.placebo, placebo),
            excess=slope_difference(
                effect.harm,
                harm,
                effect.placebo,
                placebo,
                self.clusters,
                self.rng(),
                self.resamples,
            ),
            common=self.share(effect.placebo, harm),
            pairs=effect,
        )

    def measures(self, name: str, effect: Effect) -> tuple[Measure, Measure]:
        """NIE and TIE of a set."""
        return self.measure(name, "nie", effect.nie), self.measure(name, "tie", effect.tie)

    def mean(self, values: Floats) -> Interval:
        """Mean over pairs."""
        return estimate_means(values[None], self.clusters, self.rng(), self.resamples)[0]

    def claim(
        self,
        number: int,
        ruling: Ruling,
        deciding: Sequence[Measure],
        beside: Iterable[Measure] = (),
    ) -> Claim:
        """A ruling as a claim, with what holds for all of them: the gate, and enough components to say no."""
        verdict, why, but = ruling
        count = len(np.unique(self.clusters))
        if verdict == "not supported" and count < FEWEST_AGAINST:
            verdict = "undecided"
            why = f"{why}; but {count} held-out components are too few to say no, it takes {FEWEST_AGAINST}"
        if self.word in _SHUT:
            verdict, why = "not tested", self._stopped()
        return Claim(
            number=number,
            name=_NAMES[number].format(self.subject),
            gate=self.word,
            verdict=verdict,
            specific=all(measure.excess.low > 0 for measure in deciding),
            why=why,
            deciding=tuple(deciding),
            beside=tuple(beside),
            but=but,
        )

    def _stopped(self) -> str:
        found = self.gate
        if self.word == "no effect":
            return f"the TE of harm, {_in_unit(found.te_harm)}, is not clear of 0"
        return f"the TE of harm exceeds that of the placebo by {_in_unit(found.excess)}, which is not above 0"

    @property
    def too_shallow(self) -> Ruling | None:
        """Why no claim of place is tested, if none is."""
        if self.layers >= FEWEST_LAYERS:
            return None
        return Ruling(
            "not tested",
            f"{self.layers} layers have no thirds to speak of, it takes {FEWEST_LAYERS}",
        )


READ_EDIT = Ruling("not tested", "the answer is read at a token of the edit, where the embedding itself differs")


def untested(number: int, why: str) -> Claim:
    """A claim for which nothing could be measured."""
    name = _NAMES[number].format("the outcome")
    return Claim(number, name, "", "not tested", False, why, (), ())


def late(bench: Bench, decided: Effect, arrived: Effect, reads_edit: bool) -> Claim:
    """Claim 1. decided: `direct` of the late third. arrived: the stream at `last` before the late third, joint.

    reads_edit: whether an answer token lies in the edit of a pair.
    """
    weight = bench.measures("direct effect of the late third", decided)
    arriving = bench.measures("arrives only in the late third", arrived.missing_of(bench.total))
    ruling = bench.too_shallow or (READ_EDIT if reads_edit else None) or _late(weight, arriving)
    return bench.claim(1, ruling, weight, arriving)


def _late(weight: Sequence[Measure], arriving: Sequence[Measure]) -> Ruling:
    text, there = _text(weight), _text(arriving)
    if _all_above(weight, MOST):
        when = f"; {there}: it arrives late" if _all_above(arriving, HALF) else ""
        when = f"; {there}: it arrives earlier and acts late" if _all_below(arriving, HALF) else when
        return Ruling("supported", f"{text}: above 2/3{when}")
    if _all_below(weight, LEAST):
        return Ruling("not supported", f"{text}: below 1/3")
    return Ruling("undecided", f"{text}: neither both above 2/3 nor both below 1/3")


def mlp_not_attention(
    bench: Bench, differences: Mapping[str, Effect], bands: Mapping[str, Effect], reads_edit: bool
) -> Claim:
    """Claim 2. differences: `direct` of MLPs minus that of attention by layers, `ALL_LAYERS` among them.

    bands: joint effects that stand beside it. reads_edit: whether an answer token lies in the edit of a pair.
    """
    whole = bench.measures(f"MLPs minus attention, {ALL_LAYERS}", differences[ALL_LAYERS])
    parts = [
        measure
        for name, effect in differences.items()
        if name != ALL_LAYERS
        for measure in bench.measures(f"MLPs minus attention, {name}", effect)
    ]
    joint = [measure for name, effect in bands.items() for measure in bench.measures(name, effect)]
    ruling = READ_EDIT if reads_edit else _mlp_not_attention(whole, parts)
    return bench.claim(2, ruling, whole, (*parts, *joint))


def _mlp_not_attention(whole: Sequence[Measure], parts: Sequence[Measure]) -> Ruling:
    text = _text(whole[:1])
    against = [part for part in parts if part.harm.high < 0]
    speaking_for = [part for part in parts if part.harm.low > 0]
    if _all_above(whole, 0):
        if against:
            return Ruling("undecided", f"{text}, but it is below 0 for {_opposing(against)}")
        return Ruling("supported", f"{text}, and below 0 for none of the sets of later layers")
    if _all_below(whole, 0):
        if speaking_for:
            return Ruling("undecided", f"{text}, but it is above 0 for {_opposing(speaking_for)}")
        return Ruling("not supported", f"{text}, and above 0 for none of the sets of later layers")
    return Ruling("undecided", f"{text}: not clear of 0")


def _opposing(parts: Sequence[Measure]) -> str:
    """The layers that say the opposite; whether all of it is a trifle, which the rule does not ask."""
    listed = "; ".join(f"{part.label} {ends(part.harm)}" for part in parts)
    trifle = all(abs(part.harm.value) < TRIFLE for part in parts)
    return f"{listed}: each less than {TRIFLE:.0%} of TE" if trifle else listed


class Beside(NamedTuple):
    """Random sets as large as a set, on the held-out pairs."""

    reached: int
    """Those whose mean NIE or TIE is at least that of the set."""
    drawn: int
    """Those that were measured."""
    likeness: float = 1.0
    """Mean size of their change over that of the set's."""

    @property
    def said(self) -> str:
        """The count in words."""
        size = f"whose change is {self.likeness:.2f} times as large"
        return f"{self.reached} of {self.drawn} random sets, {size}, do as much"

    @property
    def notes(self) -> list[str]:
        """What to know before one relies on it."""
        return [] if self.likeness >= MATCHED else [f"not matched: no others are {MATCHED:.0%} as large"]


@dataclass(frozen=True)
class Sparse:
    """Sets of late neurons, ranked and cut on the discovery pairs, as the held-out pairs see them."""

    neurons: int
    """Neurons of the late third."""
    band: Effect
    """Joint effect of the late MLPs."""
    most: Effect
    """Of the first 1% of the neurons."""
    size: int | None
    """Fewest neurons that do the late MLPs' work on the discovery pairs; None where no number does."""
    chosen: Effect | None
    """Joint effect of so many."""
    beside: Beside | None = None
    """Random sets of other neurons of these layers; none where the set is not few, or not clear of half of TE."""

    @property
    def few(self) -> int:
        """1% of the neurons, at least one."""
        return max(int(SPARSE * self.neurons), 1)


def first_neurons(size: int) -> str:
    """What claim 3's sets are called."""
    return "first neuron" if size == 1 else f"first {size} neurons"


def sparse_gate(bench: Bench, found: Sparse) -> Claim:
    """Claim 3."""
    most = bench.measures(f"{first_neurons(found.few)}{MOST_ALLOWED}", found.most)
    band = bench.measures(LATE_MLPS, found.band)
    chosen = bench.measures(first_neurons(found.size), found.chosen) if found.size and found.chosen else ()
    shallow = bench.too_shallow
    ruling, deciding = (shallow, chosen or most) if shallow else _sparse(bench, found, chosen, most)
    beside = [measure for part in (chosen, most, band) if part is not deciding for measure in part]
    return bench.claim(3, ruling, deciding, beside)


def below_half(shares: Sequence[Interval]) -> str:
    """By which of NIE and TIE a set stays below half of TE, its whole interval; empty where by neither."""
    return " and ".join(name.upper() for name, one in zip(DIRECTIONS, shares, strict=True) if one.high < HALF)


def clear_of_half(shares: Sequence[Interval]) -> bool:
    """Whether both lower ends are above half of TE: only then does a rule ask for random sets beside a set."""
    return all(share.low > HALF for share in shares)


def _sparse(
    bench: Bench, found: Sparse, chosen: Sequence[Measure], most: Sequence[Measure]
) -> tuple[Ruling, Sequence[Measure]]:
    """What is ruled, and the numbers that it rests on: those of the set that was cut, or of the first 1%."""
    few_enough = found.size is not None and found.size <= found.few
    enough = few_enough and clear_of_half([measure.harm for measure in chosen])
    if enough and found.beside and found.beside.reached <= MOST_REACHING:
        notes = [*_sparse_notes(chosen), *found.beside.notes]
        return Ruling("supported", "; ".join([_text(chosen), found.beside.said, *notes])), chosen
    if below := below_half([measure.harm for measure in most]):
        return Ruling("not supported", f"{_text(most)}: the first 1% stay below half of TE by {below}"), most
    of_band = [bench.share(effect.harm, whole.harm) for effect, whole in zip(found.most, found.band, strict=True)]
    if not few_enough and any(part.high < CARRIED for part in of_band):
        why = (
            f"{_text(most)}: it takes {found.size or 'more'} neurons to do the late MLPs' work, "
            "and the first 1% stay below 80% of it"
        )
        return Ruling("not supported", why), most
    reason = found.beside.said if enough and found.beside else "neither rule is met"
    return Ruling("undecided", f"{_text(chosen or most)}: {reason}"), chosen or most


def _sparse_notes(chosen: Sequence[Measure]) -> list[str]:
    nie, tie = (measure.harm for measure in chosen)
    notes = []
    if abs(tie.value - nie.value) > REDUNDANT:
        notes.append(f"redundant: INT is {tie.value - nie.value:.0%} of TE")
    if max(nie.low, tie.low) > 1:
        notes.append("overshoots: the rest works against it")
    return notes


class Read(NamedTuple):
    """Which held-out prompts a probe of the discovery pairs reads rightly: 1 or 0, NaN where there is no prompt."""

    layers: Floats
    """`[layer, pair, side]`, on the mean over the edit's tokens."""
    embedding: Floats
    """`[pair, side]`, the same before the first layer."""


def understood(bench: Bench, layer: int, harm: Read, placebo: Read, there: Both, shares: Sequence[Interval]) -> Claim:
    """Claim 4. layer: the readable one, chosen on discovery. there: NIE of the stream at `last` after it.

    shares: that of harm as share of TE, by layer.
    """
    gain = _gain(bench, layer, harm, placebo)
    acts = bench.measure(f"stream at last after layer {layer}", "nie", there)
    ruling = bench.too_shallow or _understood(bench, layer, harm, gain, shares)
    return bench.claim(4, ruling, (gain,), (acts,))


def _gain(bench: Bench, layer: int, harm: Read, placebo: Read) -> Measure:
    """How much more of the prompts is read at a layer than from the embeddings."""
    gains = Both(*((read.layers[layer] - read.embedding).mean(axis=-1) for read in (harm, placebo)))
    of_harm, of_placebo = map(bench.mean, gains)
    return Measure(
        f"accuracy after layer {layer} minus that of the embeddings",
        "",
        "prompts",
        harm=of_harm,
        placebo=of_placebo,
        beta_harm=of_harm.value,
        beta_placebo=of_placebo.value,
        excess=bench.mean(gains.harm - gains.placebo),
        common=of_placebo,
        pairs=gains,
    )


def _understood(bench: Bench, layer: int, harm: Read, gain: Measure, shares: Sequence[Interval]) -> Ruling:
    twice = np.repeat(bench.clusters, 2)
    words = rate(harm.embedding.ravel(), twice)
    if words.value >= GIVEN_AWAY:
        return Ruling(
            "undecided",
            f"the words give it away: the embeddings alone are read at {words.value:.0%}",
        )
    acts = first_acting(shares)
    text = (
        f"after layer {layer} {harm.layers[layer].mean():.0%} of prompts are read rightly, {words.value:.0%} from the "
        f"embeddings: {points(gain.harm)}; NIE at last there is {ends(shares[layer])} of TE"
    )
    if gain.harm.low > 0 and shares[layer].high < ACTS:
        return Ruling("supported", f"{text}; it acts from {_layer(acts)} on")
    accuracies = [rate(one.ravel(), twice) for one in harm.layers[:acts]]
    if all(one.high < READABLE for one in accuracies):
        return Ruling("not supported", f"accuracy is below 75% at all {len(accuracies)} layers before it acts")
    return Ruling("undecided", text)


def first_acting(shares: Sequence[Interval]) -> int | None:
    """The first layer from which on every layer's share of TE is above 5%; None where the last one's is not."""
    acts = None
    for layer in reversed(range(len(shares))):
        if not shares[layer].low > ACTS:
            break
        acts = layer
    return acts


class Handed(NamedTuple):
    """What of an early site's effect needs a set of modules, the mean of both directions."""

    middle: Both
    """The MLPs of the middle third."""
    late: Both
    """Those of the late third."""
    others: Both
    """As many attention modules, at random, the mean of several sets: the control."""


def handed_on(bench: Bench, own: Effect, handed: Handed, middle_layers: int) -> Claim:
    """Claim 5. own: the early site alone. middle_layers: layers of the middle third.

    Where the middle MLPs do not carry clearly more than as many attention modules, the verdict says so: by its rule the
    claim asks for a share of TE alone.
    """
    alone = bench.measures("stream at the edit after the early third", own)
    through, late, others, more = (
        bench.measure(f"early effect through {name}", "both", effect)
        for name, effect in (
            ("the middle MLPs", handed.middle),
            ("the late MLPs", handed.late),
            ("random attention modules", handed.others),
            ("the middle MLPs, minus random attention modules", handed.middle.less(handed.others)),
        )
    )
    ruling = bench.too_shallow or _handed_on(alone, through, others, more, middle_layers)
    return bench.claim(5, ruling, (through,), (*alone, late, others, more))


def _handed_on(
    alone: Sequence[Measure], through: Measure, others: Measure, more: Measure, middle_layers: int
) -> Ruling:
    if middle_layers < 2:
        return Ruling("not tested", f"the middle third has {middle_layers} layer, it takes 2")
    if not _all_above(alone, HALF):
        return Ruling("not tested", f"{_text(alone)}: not clearly more than half of TE to hand on")
    if _all_above([through], HANDED):
        return Ruling("supported", f"{_text([through])}: above 25%; {_text([others])}", _beside_attention(more))
    if _all_below([through], HANDED):
        return Ruling("not supported", f"{_text([through])}: below 25%")
    return Ruling("undecided", f"{_text([through])}: not clear of 25%")


def _beside_attention(more: Measure) -> str:
    """What a control takes from claim 5. more: what the middle MLPs carry more than attention modules."""
    if more.harm.low > 0:
        return ""
    return MORE_ATTENTION if more.harm.high < 0 else AS_ATTENTION


def _all_above(measures: Sequence[Measure], threshold: float) -> bool:
    return all(measure.harm.low > threshold for measure in measures)


def _all_below(measures: Sequence[Measure], threshold: float) -> bool:
    return all(measure.harm.high < threshold for measure in measures)


def _text(measures: Sequence[Measure]) -> str:
    """Shares of harm, in words."""
    name = measures[0].name
    shown = ", ".join(f"{_direction(one)}{ends(one.harm)}" for one in measures)
    return f"{name} {shown} of {measures[0].of}"


def _direction(measure: Measure) -> str:
    return f"{measure.direction.upper()} " if measure.direction in DIRECTIONS else ""


def ends(found: Interval) -> str:
    """A share with its interval, as percentages."""
    return _with_ends(found, 1, "z.0%")  # what rounds to 0 has no minus


def points(found: Interval) -> str:
    """A difference of accuracies with its interval, in percentage points."""
    return f"{_with_ends(found, 100, '+z.0f')} points"


def _with_ends(found: Interval, factor: int, shown: str) -> str:
    value, low, high = (f"{factor * one:{shown}}" for one in (found.value, found.low, found.high))
    if np.isnan(found.value):
        return f"unknown ({found.reason})"
    if np.isnan(found.low):
        return f"{value} without an interval ({found.reason})"
    return f"{value} [{low}, {high}]"


def _in_unit(found: Interval) -> str:
    """An effect in the outcome's unit."""
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def _layer(layer: int | None) -> str:
    return "no layer" if layer is None else f"layer {layer}"
