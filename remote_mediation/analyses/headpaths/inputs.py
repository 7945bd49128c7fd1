"""By which of its inputs a later head hears what others add: its query, its keys or its values.

One of the three becomes what it is where the senders alone are changed, at the senders' tokens and so at all behind the
first of these; the other two stay. Several heads may share a key and a value head: from these it goes on by the one
head alone, as no other is asked about. The three are no parts of a whole: attention makes a product of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remote_mediation.analyses.claims.verdicts import DIRECTIONS, clear_of_half, ends
from remote_mediation.engine.pathrows import Way
from remote_mediation.intervals import Interval
from remote_mediation.sites import Component, ModelInfo, Site, family_of

INPUTS: dict[str, Component] = {"its query": "query_heads", "its keys": "key_heads", "its values": "value_heads"}
"""Components by the name of the way."""


def ways_by_input(senders: tuple[Site, ...], head: Site, info: ModelInfo) -> dict[str, Way]:
    """From senders by way of each input of one later head; none in a family that does not have all three apart."""
    if not all(map(info.has, INPUTS.values())):
        return {}
    ways = {}
    for name, component in INPUTS.items():
        sharing = info.heads // info.width(component)
        read = Site(component, head.layer, head.position, (head.units[0] // sharing,))
        ways[name] = Way(senders, (read,), (head,) if sharing > 1 else ())
    return ways


def not_apart(info: ModelInfo) -> str:
    """What a family's heads hear by that is not told apart; empty where the three are all."""
    lacking = [component for component in INPUTS.values() if not info.has(component)]
    if lacking:
        return f"by which input a head hears is not told apart, as {info.family} has no {', '.join(lacking)}"
    if family_of(info.family).projection == "gated":
        return "what a head hears by the gate on its output is not told apart"
    return ""


def heard_by(head: str, shares: Mapping[str, Sequence[Interval]]) -> str:
    """In words: the inputs that pass on clearly more than half of what goes by a head, in both directions.

    head: its name. shares: by input that of NIE and of TIE by way of the head.
    """
    clear = [name for name, both in shares.items() if clear_of_half(both)]
    by = " and ".join(clear) or "none of the three clearly"
    numbers = (
        f"{name} {', '.join(f'{way.upper()} {ends(share)}' for way, share in zip(DIRECTIONS, both, strict=True))}"
        for name, both in shares.items()
    )
    return f"{head} by {by} ({'; '.join(numbers)} of what goes by it)"
