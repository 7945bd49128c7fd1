"""Rows: what the engine runs. Every analysis compiles its question to rows, and no analysis runs anything itself.

A row is one forward pass: a base prompt and the writes that hold some mediators at other values. A row without writes
is the base prompt as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from remote_mediation.sites import Component, ModelInfo, Site
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


Value = Source | Scale | Constant


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
    """Columns of the tensor, ascending; empty for all."""
    value: Value
    """What it is set to."""


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
    def start(self) -> int:
        """First written token."""
        return min(write.places[0] for write in self.writes)

    @property
    def low(self) -> int:
        """First written layer."""
        return min(write.layer for write in self.writes)


def swap(pair: TokenPair, site: Site, base: int, info: ModelInfo) -> Row:
    """Run `base` while a site is as on the pair's other prompt: Y(x0, M(x1)) for base 0, Y(x1, M(x0)) for base 1.

    A position that the pair does not have gives a row without writes.
    """
    places = pair.places(site.position)
    if not places.x0:
        return Row(pair.id, base)
    value = Source(1 - base, places[1 - base])
    write = Write(site.component, site.layer, places[base], info.columns(site.component, site.units), value)
    return Row(pair.id, base, (write,))
