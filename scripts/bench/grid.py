"""What is measured: every single token from the first difference on, at three components of every layer, both ways."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from remote_mediation.pairs import load_pairs
from remote_mediation.sites import Component, ModelInfo, Site
from remote_mediation.tokens import TokenPair, tokenise

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLUS, MINUS = "Sure", "Sorry"
COMPONENTS: tuple[Component, ...] = ("layer_output", "attention_output", "mlp_output")


@dataclass(frozen=True)
class Case:
    """One potential outcome: prompt `base` with one token of a component as on the other prompt."""

    component: Component
    """Which tensor."""
    layer: int
    """Of which layer."""
    position: str
    """The token's name."""
    place: int
    """The token's index, the same in both prompts."""
    base: int
    """Side that is run."""

    @property
    def site(self) -> Site:
        """The mediator."""
        return Site(self.component, self.layer, self.position)


def equal_pairs(tokenizer, count: int) -> list[TokenPair]:  # type: ignore[no-untyped-def]
    """Built-in pairs spread evenly over the file, both prompts of one length: the other libraries take no others."""
    pairs = [pair for pair in tokenise(load_pairs("builtin"), tokenizer).pairs if len(pair.x0) == len(pair.x1)]
    return [pairs[i * len(pairs) // count] for i in range(count)]


def grid(pair: TokenPair, info: ModelInfo) -> list[Case]:
    """All cases of a pair."""
    places = [(name, pair.places(name).x0[0]) for name in pair.tokens()]
    return [
        Case(component, layer, name, place, base)
        for base in (0, 1)
        for component in COMPONENTS
        for layer in range(info.layers)
        for name, place in places
    ]


def sample(cases: list[Case], size: int, seed: int) -> list[Case]:
    """As many cases of every component and direction, drawn at random, in the grid's order."""
    strata: dict[tuple[Component, int], list[Case]] = defaultdict(list)
    for case in cases:
        strata[case.component, case.base].append(case)
    draw = random.Random(seed)
    chosen = {case for stratum in strata.values() for case in draw.sample(stratum, size // len(strata))}
    return [case for case in cases if case in chosen]
