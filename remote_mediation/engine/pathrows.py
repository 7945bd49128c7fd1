"""Rows of path patching: what attention heads do by way of some later modules alone, or straight to the answer.

In a first row heads are as on the other prompt, and all else that layers add from there on is held at what it is. In
front of every later module the stream then differs by what these heads add and by nothing else, and the outcome is what
they do straight to the answer. A second row is the base prompt but for receivers, which are what they became in the
first one; whatever stands behind them runs as it will. A third row takes from the second one what some later modules
become there, and so leaves out all others that hear the receivers.
Sources: Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from remote_mediation.engine.rows import Reached, Row, Write, held
from remote_mediation.errors import SiteError
from remote_mediation.sites import PROJECTED_HEADS, Component, ModelInfo, Site, refuse_absent
from remote_mediation.tokens import TokenPair

RECEIVERS: tuple[Component, ...] = (*PROJECTED_HEADS, "attention_heads", "mlp_neurons", "mlp_output")
"""What heads can act by way of: of later heads all that these read, or their queries, keys or values alone. What
attention adds is not among them, as it holds the heads that are changed."""
POSITIONS = ("last", "all")
"""They reach to the end of the sequence, so that behind their tokens there are none to which a change could spread."""


class Way(NamedTuple):
    """From heads, changed together, by way of receivers."""

    heads: tuple[Site, ...]
    """Sites of `attention_heads`, all at one position of `POSITIONS`."""
    receivers: tuple[Site, ...] = ()
    """Sites of `RECEIVERS`, at the heads' position; none for the way straight to the answer."""
    onward: tuple[Site, ...] = ()
    """The same, by which alone it goes on from receivers, such as one of several heads that share a key; none for all
    ways on."""


def sender_row(pair: TokenPair, heads: Sequence[Site], base: int, info: ModelInfo) -> Row:
    """Run `base` with heads as on the other prompt, and all else that layers add as it is: their direct effect.

    Raises:
        SiteError: sites that are no heads, or another position.
    """
    position, changed = _position(heads), _by_layer(heads, info)
    writes = []
    for layer in range(min(changed), info.layers):
        own = changed.get(layer, ())
        others = tuple(sorted(set(range(info.heads)) - set(own)))
        kept = [Site("mlp_output", layer, position)]
        if own:
            writes.append(held(pair, Site("attention_heads", layer, position, own), base, 1 - base, info))
            kept += [Site("attention_heads", layer, position, others)] if others else []
        else:
            kept.append(Site("attention_output", layer, position))
        writes += [held(pair, site, base, base, info) for site in kept]
    return Row(pair.id, base, tuple(writes))


def way_row(pair: TokenPair, alone: Row, way: Way, info: ModelInfo) -> Row:
    """The base prompt with what a way ends at as it becomes along it.

    alone: of `sender_row`, with the way's heads.

    Raises:
        SiteError: as `path_row`.
    """
    return path_row(pair, path_row(pair, alone, way.receivers, info), way.onward, info)


def path_row(pair: TokenPair, alone: Row, receivers: Sequence[Site], info: ModelInfo) -> Row:
    """The base prompt with receivers as they become where heads alone are changed; without receivers `alone` itself.

    alone: of `sender_row`, or of this function for a further step.

    Raises:
        SiteError: sites that are no receivers, at other tokens than the heads, or below their layers.
    """
    if not receivers:
        return alone
    return Row(pair.id, alone.base, tuple(_received(pair, alone, site, info) for site in receivers))


def _received(pair: TokenPair, alone: Row, site: Site, info: ModelInfo) -> Write:
    if site.component not in RECEIVERS:
        raise SiteError(f"heads act by way of {', '.join(RECEIVERS)}, not of {site.component}; choose one of these")
    refuse_absent(site, info)
    places = pair.places(site.position)[alone.base]
    if places != alone.writes[0].places:
        raise SiteError(f"{site} is not at the position of the heads that act by way of it; choose theirs")
    return Write(site.component, site.layer, places, info.columns(site.component, site.units), Reached(alone))


def _position(heads: Sequence[Site]) -> str:
    components = {site.component for site in heads}
    if components != {"attention_heads"}:
        raise SiteError(f"paths begin at attention_heads, not at {', '.join(sorted(components)) or 'no site'}")
    positions = sorted({site.position for site in heads})
    if len(positions) > 1 or positions[0] not in POSITIONS:
        raise SiteError(
            f"paths begin at one position of {', '.join(POSITIONS)}, not at {', '.join(positions)}: from others a "
            "change would spread to tokens behind them"
        )
    return positions[0]


def _by_layer(heads: Sequence[Site], info: ModelInfo) -> dict[int, tuple[int, ...]]:
    """Numbers of the heads by layer, ascending."""
    found: dict[int, set[int]] = {}
    for site in heads:
        found.setdefault(site.layer, set()).update(site.units or range(info.heads))
    return {layer: tuple(sorted(numbers)) for layer, numbers in found.items()}
