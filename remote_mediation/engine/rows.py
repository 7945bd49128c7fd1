"""Rows: what the engine runs. Every analysis compiles its question to rows, and no analysis runs anything itself.

A row is one forward pass: a base prompt and the writes that hold some mediators at other values. A row without writes
is the base prompt as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from remote_mediation.errors import SiteError
from remote_mediation.sites import (
    HEAD_COMPONENTS,
    MIXTURE_COMPONENTS,
    PROJECTED_HEADS,
    SHARED_HEADS,
    Component,
    ModelInfo,
    Site,
    refuse_absent,
)
from remote_mediation.subspaces import Basis, Subspace
from remote_mediation.tokens import TokenPair


class Source(NamedTuple):
    """The activation that prompt `side` has at packed indices `places`."""

    side: int
    places: tuple[int, ...]


class Scale(NamedTuple):
    """The mediator's own activation times a factor; 0 ablates it."""

    factor: float


class Constant(NamedTuple):
    """Given values, one per written column (a data set's mean)."""

    values: tuple[float, ...]


class Projected(NamedTuple):
    """The mediator's own activation, but in a subspace as prompt `side` has it at packed indices `places`."""

    side: int
    places: tuple[int, ...]
    basis: Basis
    """Along which the difference between the prompts is read, in the written columns."""
    along: Basis
    """Along which it is written; the same basis but in a control."""


@dataclass(frozen=True)
class Given:
    """An activation from elsewhere, such as another checkpoint's, one row of values per written token."""

    name: str
    """Hash of everything it depends on: two of one name are the same."""
    load: Callable[[], npt.NDArray[np.float32]] = field(compare=False, repr=False)
    """`[place, column]`; called only where the row has to run."""


@dataclass(frozen=True)
class Reached:
    """What the mediator is in another row of the same prompt, before that row itself writes to it.

    Both rows run in one batch, so that the value never leaves the model.
    """

    row: Row
    """The other row."""


Value = Source | Scale | Constant | Projected | Given | Reached


@dataclass(frozen=True)
class Write:
    """One mediator held at a value."""

    component: Component
    """Which tensor."""
    layer: int
    """Of which layer."""
    places: tuple[int, ...]
    """Token indices in the base prompt's packed sequence, ascending."""
    columns: tuple[int, ...]
    """Columns of the tensor, ascending; empty for all. Of `expert_output` experts, whose sum is one vector."""
    value: Value
    """What it is set to."""

    def __post_init__(self) -> None:
        """Refuse to take from another row what nothing that the row writes can reach, or what is no one tensor.

        Raises:
            SiteError: the layer lies below all that the row writes, or the component is part of a mixture.
        """
        if not isinstance(self.value, Reached):
            return
        if self.component in MIXTURE_COMPONENTS:
            raise SiteError(
                f"{self.component} cannot be taken from another row; take mlp_output, of which it is a part"
            )
        if self.value.row.low > self.layer:
            raise SiteError(
                f"{self.component} of layer {self.layer} lies below layer {self.value.row.low}, the first that is "
                "written to in the row that it is taken from; choose a later layer"
            )


@dataclass(frozen=True)
class Row:
    """One forward pass."""

    pair: str
    """Id of the `TokenPair` it runs on."""
    base: int
    """Side of the pair that is run."""
    writes: tuple[Write, ...] = ()
    """What is overwritten on the way; empty for the prompt as it is."""

    @property
    def sources(self) -> tuple[Row, ...]:
        """Rows that values are taken from, each behind those that it takes values from itself."""
        found: dict[Row, None] = {}
        for write in self.writes:
            if isinstance(write.value, Reached):
                found |= dict.fromkeys((*write.value.row.sources, write.value.row))
        return tuple(found)

    @property
    def start(self) -> int:
        """First written token, of the rows that values are taken from as well."""
        return min(write.places[0] for row in (self, *self.sources) for write in row.writes)

    @property
    def low(self) -> int:
        """First written layer."""
        return min(write.layer for write in self.writes)


def swap(pair: TokenPair, site: Site, base: int, info: ModelInfo) -> Row:
    """Run `base` while a site is as on the pair's other prompt: Y(x0, M(x1)) for base 0, Y(x1, M(x0)) for base 1.

    A position that the pair does not have gives a row without writes.
    """
    return swap_all(pair, [site], base, info)


def swap_all(pair: TokenPair, sites: Sequence[Site], base: int, info: ModelInfo) -> Row:
    """Run `base` while all sites together are as on the pair's other prompt: joint(S) of METHOD, section 3.

    Sites whose position the pair does not have are left out.

    Raises:
        SiteError: a site is wholly covered by another one, so that swapping it changes nothing.
    """
    present = [site for site in sites if pair.places(site.position).x0]
    _refuse_covered(pair, present)
    _refuse_shared(pair, present, info)
    _refuse_twice(present)
    return Row(pair.id, base, tuple(held(pair, site, base, 1 - base, info) for site in present))


RowMaker = Callable[[TokenPair, Sequence[Site], int, ModelInfo], Row]
"""Makes the row of a set on a pair and side."""


def swaps(make: RowMaker, sets: Sequence[Sequence[Site]], pairs: Sequence[TokenPair], info: ModelInfo) -> list[Row]:
    """Each set swapped in both directions on each pair: by direction, then set, then pair. make: one such row."""
    return [make(pair, sites, side, info) for side in (0, 1) for sites in sets for pair in pairs]


def direct_row(pair: TokenPair, sites: Sequence[Site], base: int, info: ModelInfo) -> Row:
    """Run `base` while at `last` all that layers add is held at its base value, and only sites are as on the other.

    This is direct(S) of METHOD, section 3, by a run. Sites are contributions, or neurons: of a layer with neurons among
    the sites, the neurons are held in place of the MLP's output. Layers below the first site need no hold.
    """
    low = min(site.layer for site in sites)
    swapped = {site: held(pair, site, base, 1 - base, info) for site in sites}
    neurons = {site.layer for site in sites if site.component == "mlp_neurons"}
    writes = []
    for layer in range(low, info.layers):
        mlp: Component = "mlp_neurons" if layer in neurons else "mlp_output"
        for component in ("attention_output", mlp):
            writes.append(held(pair, Site(component, layer, "last"), base, base, info))
            writes += [swapped[site] for site in sites if (site.component, site.layer) == (component, layer)]
    return Row(pair.id, base, tuple(writes))


def held(pair: TokenPair, site: Site, base: int, side: int, info: ModelInfo) -> Write:
    """A site of a run of `base` held at what it is in the base run of prompt `side`.

    Raises:
        SiteError: a component that the model or the layer lacks, or a subspace whose basis is not as wide as its site.
    """
    places, columns = pair.places(site.position), info.columns(site.component, site.units)
    refuse_absent(site, info)
    value: Value = Source(side, places[side])
    if isinstance(site, Subspace):
        width = info.vector_width(site.component, site.units)
        if site.basis.width != width:
            raise SiteError(f"{site.basis} is no basis of {site.component}, which is {width} wide in {info.name}")
        value = Projected(side, places[side], site.basis, site.along or site.basis)
    return Write(site.component, site.layer, places[base], columns, value)


def as_it_is(pair: TokenPair, site: Site, side: int) -> Write:
    """A site of a run of prompt `side` held at what it is there, whatever else is overwritten."""
    places = pair.places(site.position)[side]
    return Write(site.component, site.layer, places, site.units, Source(side, places))


# What stands in a component's tensor and is lost when the component itself is overwritten. Keys and values reach the
# tokens behind theirs as well.
_INSIDE: dict[Component, tuple[Component, ...]] = {
    "layer_output": (*HEAD_COMPONENTS, "attention_output", "mlp_neurons", "mlp_output", *MIXTURE_COMPONENTS),
    "attention_output": HEAD_COMPONENTS,
    "attention_heads": PROJECTED_HEADS,
    "mlp_output": ("mlp_neurons", *MIXTURE_COMPONENTS),
    "expert_output": ("router", "expert_neurons"),
}
# What is written by what it changes of a sum, so that two of one set must have nothing in common.
_SUMMED: tuple[Component, ...] = ("expert_output", "expert_neurons")


def _refuse_covered(pair: TokenPair, sites: Sequence[Site]) -> None:
    """A site that is lost when another of the set is overwritten."""
    whole = {(site.component, site.layer): site for site in sites if _is_whole(site)}
    for site in sites:
        around = [name for name, inside in _INSIDE.items() if site.component in inside]
        for component in [*around, *([] if _is_whole(site) else [site.component])]:
            cover = whole.get((component, site.layer))
            if cover and _reached(pair, site, component) <= set(pair.places(cover.position).x0):
                raise SiteError(f"{site} is wholly covered by {cover} of the same set; leave one of them out")


def _refuse_shared(pair: TokenPair, sites: Sequence[Site], info: ModelInfo) -> None:
    """Two sites that add a part of one sum both."""
    for one, other in combinations([site for site in sites if site.component in _SUMMED], 2):
        if one.layer == other.layer and _meet(pair, one, other) and (shared := _shared(one, other, info)):
            raise SiteError(f"{one} and {other} share {shared}; name it once in a set")


def _refuse_twice(sites: Sequence[Site]) -> None:
    if len(set(sites)) < len(sites):
        twice = next(site for site in sites if list(sites).count(site) > 1)
        raise SiteError(f"{twice} is in one set twice; name it once")


def _shared(one: Site, other: Site, info: ModelInfo) -> str:
    """The first expert or, of two sites of neurons, neuron that is part of what both add; empty for none."""
    units = [set(site.units or range(info.width(site.component))) for site in (one, other)]
    if one.component == other.component == "expert_neurons":
        return f"neuron {min(units[0] & units[1])}" if units[0] & units[1] else ""
    owners = [
        {unit // info.expert_ff for unit in own} if site.component == "expert_neurons" else own
        for site, own in zip((one, other), units, strict=True)
    ]
    return f"expert {min(owners[0] & owners[1])}" if owners[0] & owners[1] else ""


def _reached(pair: TokenPair, site: Site, component: Component) -> set[int]:
    """Tokens of x0 at which a site changes a component: keys and values reach those behind theirs as well."""
    places = pair.places(site.position).x0
    if site.component in SHARED_HEADS and component != site.component:
        return set(range(places[0], len(pair.x0) + pair.fed))
    return set(places)


def _meet(pair: TokenPair, one: Site, other: Site) -> bool:
    """Whether two sites have a token in common."""
    return bool(set(pair.places(one.position).x0) & set(pair.places(other.position).x0))


def _is_whole(site: Site) -> bool:
    return not site.units and not isinstance(site, Subspace)
