"""Paths of the few heads that `rivals` found: to the answer, to later MLPs and heads, and by way of their amplifiers.

*Gate and amplifiers* (arXiv 2604.04385: a head in the middle writes little to the answer itself, and later modules
carry on what it wrote) is a test in two steps. On discovery pairs every later MLP and head is tried as the one receiver
of what heads add (`engine.pathrows`); those that pass on enough are the amplifiers. On held-out pairs they receive it
together, beside other heads of the same layers that send through the same amplifiers. Of amplifiers that are heads, one
more step tells by which input they hear it (`inputs`).
Receivers that stand behind one another share ways: parts of an effect are no parts of a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from remote_mediation.analyses.claims.beside import direction_of
from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.claims.verdicts import DIRECTIONS, FEWEST_AGAINST, HALF, Bench, Effect, ends
from remote_mediation.analyses.headpaths.inputs import INPUTS, heard_by, not_apart, ways_by_input
from remote_mediation.engine.pathrows import Way
from remote_mediation.intervals import Interval
from remote_mediation.lab import Floats, Lab, UnmeasuredError
from remote_mediation.result import Finding, Findings
from remote_mediation.sites import ModelInfo, Site
from remote_mediation.stats import spread
from remote_mediation.tokens import TokenPair

STEP_COLUMNS: dict[str, str] = {
    "sender": "heads that are changed together, chosen on the discovery pairs",
    "heads": "which, as layer.head",
    "amplifiers": "later MLPs and heads that pass on enough of its effect on discovery pairs, the strongest first",
    "said": "gate, no gate or undecided, on the held-out pairs",
    "why": "the numbers behind that",
    "inputs": "by which input amplifiers that are heads hear it; empty where none is or it was not measured",
}
PATH_COLUMNS: dict[str, str] = {
    "sender": "heads that are changed together",
    "path": "by way of what: all ways, the answer (nothing between), later modules or heads, the amplifiers, one of "
    "these, an input of one that is a head",
    "direction": "nie or tie",
    "part": "effect by this way / effect of the sender, held-out pairs; ways overlap and do not add up",
    "part_low": "lower end of its 95% interval (Fieller)",
    "part_high": "upper end",
    "harm": "effect by this way / TE",
    "harm_low": "lower end of its 95% interval",
    "harm_high": "upper end",
    "placebo": "the same with the placebo in place of the harmful prompt",
    "placebo_low": "lower end of its 95% interval",
    "placebo_high": "upper end",
    "reached": "sets of other heads of the same layers that do as much by this way; empty where none were measured",
    "drawn": "sets of them that were measured",
    "n": "pairs",
    "clusters": "components of pairs",
    "reason": "why a number is missing, or why to read it with care",
}
RECEIVER_COLUMNS: dict[str, str] = {
    "sender": "heads that are changed together",
    "component": "attention_heads or mlp_output",
    "layer": "decoder layer, from 0",
    "head": "number of the head; empty for an MLP, and for all heads of a layer together",
    "nie": "effect by way of it alone / effect of the sender, on a few discovery pairs, harmless prompt changed",
    "tie": "the same, harmful prompt changed",
    "part": "the same of both directions together",
    "chosen": "whether it is an amplifier",
    "n": "pairs",
}
TOGETHER = "the heads together"
WHOLE, ANSWER, MLPS, HEADS, AMPLIFIERS = "all ways", "the answer", "later MLPs", "later heads", "the amplifiers"
FEW_PAIRS = 12
"""Discovery pairs on which single receivers are tried."""
OPENED = 3
"""Layers whose heads are tried one by one: those whose heads together pass on the most."""
ENOUGH = 0.1
"""Part of the sender's effect from which on a receiver is an amplifier."""
MOST_AMPLIFIERS = 6
OTHERS = 20
"""Sets of other heads of the same layers, at most."""
RARE = 0.05
"""Part of these that may do as much through the amplifiers."""


@dataclass(frozen=True)
class Sender:
    """Heads that are changed together."""

    name: str
    heads: tuple[Site, ...]


class Received(NamedTuple):
    """What receivers pass on of a sender's effect, on a few discovery pairs."""

    receivers: list[Site]
    parts: Floats
    """`[receiver, (nie, tie, both)]`, of the sender's own effect."""
    pairs: int

    @property
    def amplifiers(self) -> list[Site]:
        """Those that pass on enough, the strongest first; all heads of a layer together are none."""
        single = [at for at, site in enumerate(self.receivers) if site.component == "mlp_output" or site.units]
        enough = [at for at in single if self.parts[at, 2] >= ENOUGH]
        ranked = sorted(enough, key=lambda at: -self.parts[at, 2])
        return [self.receivers[at] for at in ranked[:MOST_AMPLIFIERS]]

    @property
    def heads(self) -> list[Site]:
        """Amplifiers that are heads."""
        return [site for site in self.amplifiers if site.component == "attention_heads"]


class Path(NamedTuple):
    """One way of a sender's effect, on the held-out pairs."""

    name: str
    effect: Effect
    others: Floats | None = None
    """`[set, (nie, tie)]`, mean effects of other heads by the same way; None where none were measured."""


@dataclass(frozen=True)
class Followed:
    """A sender's paths on the held-out pairs."""

    sender: Sender
    received: Received
    paths: dict[str, Path]
    """By name; all ways are the first."""
    bench: Bench

    def parts(self, name: str, of: str = WHOLE) -> list[Interval]:
        """NIE and TIE by one way, of those by another: of the sender's own."""
        both = zip(self.paths[name].effect, self.paths[of].effect, strict=True)
        return [self.bench.share(way.harm, own.harm) for way, own in both]

    def reached(self, name: str) -> list[int]:
        """By direction the sets of other heads that do as much as the sender does; none where none were measured."""
        path, sign = self.paths[name], direction_of(self.bench.total.harm)
        if path.others is None:
            return []
        own = [float(np.nanmean(both.harm)) for both in path.effect]
        return [int((sign * path.others[:, side] >= sign * own[side]).sum()) for side in (0, 1)]


def analyse(lab: Lab, before: Findings) -> Finding:
    """The three tables; nothing where `rivals` was not asked for."""
    heads: tuple[Site, ...] = before["rivals"].value if "rivals" in before else ()
    if not heads:
        return Finding()
    discovery, heldout = (Sample.of(lab, split, heads[0].position) for split in ("discovery", "heldout"))
    few = [discovery.pairs[at] for at in spread(discovery.clusters, FEW_PAIRS)]
    found = [measure_ways(heldout, sender, measure_receivers(lab, sender, few)) for sender in senders(lab, heads, few)]
    return Finding(
        {
            "two_step.csv": _table([step_row(one, lab.study.info) for one in found], STEP_COLUMNS),
            "head_paths.csv": _table([row for one in found for row in path_rows(one)], PATH_COLUMNS),
            "receivers.csv": _table([row for one in found for row in receiver_rows(one)], RECEIVER_COLUMNS),
        }
    )


# --- who sends ----------------------------------------------------------------------------------


def senders(lab: Lab, heads: tuple[Site, ...], pairs: Sequence[TokenPair]) -> list[Sender]:
    """All the heads together and, of several, the one of which most goes by way of later modules."""
    single = one_by_one(heads, lab.study.info)
    if len(single) == 1:
        return [Sender(label(single[0]), heads)]
    whole, direct = lab.indirect(single, pairs), lab.through([Way((head,)) for head in single], pairs)
    onward = np.nanmean(whole.nie + whole.tie - direct.nie - direct.tie, axis=1)
    gate = single[int(np.argmax(direction_of(whole.te) * onward))]
    return [Sender(label(gate), (gate,)), Sender(TOGETHER, heads)]


def one_by_one(sites: Sequence[Site], info: ModelInfo) -> list[Site]:
    """Sites of heads as one site per head."""
    return [
        Site("attention_heads", site.layer, site.position, (head,))
        for site in sites
        for head in site.units or range(info.heads)
    ]


# --- who receives -------------------------------------------------------------------------------


def measure_receivers(lab: Lab, sender: Sender, pairs: Sequence[TokenPair]) -> Received:
    """Every later MLP, all heads of every later layer, and the single heads of the layers that pass on most."""
    info = lab.study.info
    mlps, layers = later(sender, info)
    modules = [*mlps, *layers]
    parts = _parts(lab, sender, modules, pairs)
    strongest = np.argsort(-parts[len(mlps) :, 2], kind="stable")[:OPENED]
    single = one_by_one([layers[at] for at in sorted(strongest)], info)
    if single:
        parts = np.concatenate([parts, _parts(lab, sender, single, pairs)])
    return Received([*modules, *single], parts, len(pairs))


def later(sender: Sender, info: ModelInfo) -> tuple[list[Site], list[Site]]:
    """MLPs from the sender's first layer on, and all heads of each layer above it."""
    low, position = min(site.layer for site in sender.heads), sender.heads[0].position
    above = [layer for layer in info.layers_with("attention_heads") if layer > low]
    mlps = [Site("mlp_output", layer, position) for layer in range(low, info.layers)]
    return mlps, [Site("attention_heads", layer, position) for layer in above]


def _parts(lab: Lab, sender: Sender, receivers: Sequence[Site], pairs: Sequence[TokenPair]) -> Floats:
    """`[receiver, (nie, tie, both)]` of the sender's effect; not finite where it has none."""
    own = lab.joint([sender.heads], pairs)
    found = lab.through([Way(sender.heads, (site,)) for site in receivers], pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts: Floats = _with_both(found.means()) / _with_both(own.means())
    return parts


def _with_both(means: Floats) -> Floats:
    """`[set, (nie, tie, both)]`, both being their sum. means: `[set, (nie, tie)]`."""
    return np.append(means, means.sum(axis=1, keepdims=True), axis=1)


# --- on the held-out pairs ----------------------------------------------------------------------


def measure_ways(heldout: Sample, sender: Sender, found: Received) -> Followed:
    """Effects of a sender by every way, with other heads beside it where there are amplifiers."""
    lab, amplifiers = heldout.lab, found.amplifiers
    sets = receiver_sets(sender, amplifiers, lab.study.info)
    (whole,) = heldout.effects(lab.joint, [sender.heads])
    effects = heldout.effects(lab.through, [Way(sender.heads, tuple(sites)) for sites in sets.values()])
    beside = others_by_way(heldout, sender, amplifiers) if amplifiers else {}
    every = dict(zip([WHOLE, *sets], [whole, *effects], strict=True)) | by_input(heldout, sender, found.heads)
    paths = {name: Path(name, effect, beside.get(name)) for name, effect in every.items()}
    return Followed(sender, found, paths, heldout.bench())


def receiver_sets(sender: Sender, amplifiers: Sequence[Site], info: ModelInfo) -> dict[str, Sequence[Site]]:
    """By the name of the way, what receives: nothing, later modules of a kind, amplifiers together and one by one."""
    mlps, heads = later(sender, info)
    sets = {MLPS: mlps, HEADS: heads, AMPLIFIERS: amplifiers, **{label(site): [site] for site in amplifiers}}
    return {ANSWER: (), **{name: sites for name, sites in sets.items() if sites}}


def by_input(heldout: Sample, sender: Sender, heads: Sequence[Site]) -> dict[str, Effect]:
    """Effects by way of each input of later heads; none in a report that is rebuilt of a run from before this step."""
    lab = heldout.lab
    ways = {
        input_of(head, name): way
        for head in heads
        for name, way in ways_by_input(sender.heads, head, lab.study.info).items()
    }
    unfinished = () if lab.can_measure else (UnmeasuredError,)
    with contextlib.suppress(*unfinished):
        return dict(zip(ways, heldout.effects(lab.through, list(ways.values())), strict=True)) if ways else {}
    return {}


def input_of(head: Site, name: str) -> str:
    """The name of a way by one input of a later head."""
    return f"{label(head)}, {name}"


def others_by_way(heldout: Sample, sender: Sender, amplifiers: Sequence[Site]) -> dict[str, Floats]:
    """Mean effects `[set, (nie, tie)]` of other heads, by all ways and by the amplifiers."""
    lab, pairs = heldout.lab, heldout.pairs
    sets = others(sender, lab.study.info, lab.rng(f"headpaths: {sender.name}"))
    if not sets:
        return {}
    whole, passed = lab.joint(sets, pairs), lab.through([Way(one, tuple(amplifiers)) for one in sets], pairs)
    return {WHOLE: whole.means(), AMPLIFIERS: passed.means()}


def others(sender: Sender, info: ModelInfo, rng: np.random.Generator) -> list[tuple[Site, ...]]:
    """Different sets of as many other heads of the same layers; none where a layer has not as many others."""
    numbers: dict[int, list[int]] = {}
    for site in one_by_one(sender.heads, info):
        numbers.setdefault(site.layer, []).extend(site.units)
    rest = {layer: sorted(set(range(info.heads)) - set(own)) for layer, own in numbers.items()}
    if any(len(rest[layer]) < len(own) for layer, own in numbers.items()):
        return []

    def draw() -> tuple[Site, ...]:
        picked = {layer: rng.permutation(rest[layer])[: len(own)] for layer, own in numbers.items()}
        units = {layer: tuple(sorted(map(int, heads))) for layer, heads in picked.items()}
        return tuple(Site("attention_heads", layer, sender.heads[0].position, heads) for layer, heads in units.items())

    return list(dict.fromkeys(draw() for _ in range(OTHERS)))


# --- what is said -------------------------------------------------------------------------------


class TwoSteps(NamedTuple):
    """What the two steps say of a sender."""

    said: str
    why: str


def ruled(found: Followed) -> TwoSteps:
    """Whether heads are a gate: amplifiers pass on clearly more than half of what they do, as they do of few others.

    It says no where, in one direction, that is clearly less than half, or where there are no amplifiers.
    """
    own, straight = found.bench.shares(found.paths[WHOLE].effect), found.parts(ANSWER)
    text = f"{_in_words(own)} of TE"
    if not all(share.low > 0 for share in own):
        return TwoSteps("undecided", f"{text}: what the heads do is itself not clear of 0")
    parts = found.parts(AMPLIFIERS) if found.received.amplifiers else []
    passed = f"{_in_words(parts)} of that" if parts else "none"
    text = f"{text}; passed on by amplifiers: {passed}; straight to the answer: {_in_words(straight)}"
    if not parts or any(part.high < HALF for part in parts):
        return _no_gate(text, own[0].n_clusters)
    if not all(part.low > HALF for part in parts):
        return TwoSteps("undecided", f"{text}; not clear of {HALF:.0%}")
    return _beside_others(found, text)


def _no_gate(text: str, components: int) -> TwoSteps:
    """What little is passed on says, as far as there are enough held-out components to say no."""
    if components < FEWEST_AGAINST:
        few = f"{components} held-out components are too few to say no, it takes {FEWEST_AGAINST}"
        return TwoSteps("undecided", f"{text}; but {few}")
    return TwoSteps("no gate", text)


def _beside_others(found: Followed, text: str) -> TwoSteps:
    others = found.paths[AMPLIFIERS].others
    if others is None:
        return TwoSteps("undecided", f"{text}; these layers have no other heads to stand beside")
    reached = max(found.reached(AMPLIFIERS))
    text = f"{text}; {reached} of {len(others)} sets of other heads of these layers do as much by the same amplifiers"
    return TwoSteps("gate" if reached <= RARE * len(others) else "undecided", text)


def inputs_in_words(found: Followed, info: ModelInfo) -> str:
    """By which input each amplifier that is a head hears of the sender, on the held-out pairs."""
    said = []
    for head in found.received.heads:
        ways = {name: input_of(head, name) for name in INPUTS if input_of(head, name) in found.paths}
        if ways:
            said.append(heard_by(label(head), {name: found.parts(way, label(head)) for name, way in ways.items()}))
    apart = not_apart(info) if found.received.heads else ""
    return "; ".join(filter(None, (*said, apart)))


def _in_words(shares: Sequence[Interval]) -> str:
    return ", ".join(f"{way.upper()} {ends(share)}" for way, share in zip(DIRECTIONS, shares, strict=True))


def label(site: Site) -> str:
    """A sender or receiver in words."""
    return named(site.component, site.layer, site.units[0] if site.units else None)


def named(component: str, layer: int, head: int | None) -> str:
    """The same of its parts; without a number the heads of a layer are meant together."""
    if component == "mlp_output":
        return f"MLP {layer}"
    return f"heads of layer {layer}" if head is None else f"head {layer}.{head}"


def step_row(found: Followed, info: ModelInfo) -> dict[str, Any]:
    """`STEP_COLUMNS`."""
    heads = one_by_one(found.sender.heads, info)
    return {
        "sender": found.sender.name,
        "heads": " ".join(f"{site.layer}.{site.units[0]}" for site in heads),
        "amplifiers": ", ".join(map(label, found.received.amplifiers)),
        **ruled(found)._asdict(),
        "inputs": inputs_in_words(found, info),
    }


def path_rows(found: Followed) -> list[dict[str, Any]]:
    """`PATH_COLUMNS` of every way, in both directions."""
    return [_path_row(found, path, side) for path in found.paths.values() for side in (0, 1)]


def _path_row(found: Followed, path: Path, side: int) -> dict[str, Any]:
    bench, effect = found.bench, path.effect[side]
    part, harm = found.parts(path.name)[side], bench.share(effect.harm, bench.total.harm)
    beside = {} if path.others is None else {"reached": found.reached(path.name)[side], "drawn": len(path.others)}
    return {
        "sender": found.sender.name,
        "path": path.name,
        "direction": DIRECTIONS[side],
        **part.columns("part"),
        **harm.columns("harm"),
        **bench.share(effect.placebo, bench.total.placebo).columns("placebo"),
        **beside,
        "n": harm.n_pairs,
        "clusters": harm.n_clusters,
        "reason": part.reason or harm.reason,
    }


def receiver_rows(found: Followed) -> list[dict[str, Any]]:
    """`RECEIVER_COLUMNS`."""
    receivers, table, pairs = found.received
    chosen = found.received.amplifiers
    return [
        {
            "sender": found.sender.name,
            "component": site.component,
            "layer": site.layer,
            "head": site.units[0] if site.units else None,
            **dict(zip(("nie", "tie", "part"), map(float, parts), strict=True)),
            "chosen": site in chosen,
            "n": pairs,
        }
        for site, parts in zip(receivers, table, strict=True)
    ]


def _table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=list(columns))
    return table.astype({"head": "Int64"}) if "head" in columns else table
