"""A direction from a file, another run's or from elsewhere; what is none of the model is refused before it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from remote_mediation.engine.payload import digest
from remote_mediation.errors import SiteError
from remote_mediation.lab import Lab, Study
from remote_mediation.subspaces import Direction


def check(study: Study) -> None:
    """Refuse a file whose direction cannot be swapped in a study's model, on its pairs.

    Raises:
        SiteError: it cannot be read, or is of another width, of a layer or at a token that is not there.
    """
    name, info = study.config.directions.basis, study.info
    if not name:
        return
    found = Direction.load(Path(name))
    if found.basis.width != info.d_model:
        raise SiteError(
            f"{name} holds directions of {found.basis.width} numbers, and the stream of {info.name} is "
            f"{info.d_model} wide; give a basis of this model"
        )
    if found.layer is not None and not 0 <= found.layer < info.layers:
        raise SiteError(
            f"{name} is of layer {found.layer}, and {info.name} has layers 0 to {info.layers - 1}; give a basis of "
            "this model"
        )
    if found.position:
        _check_position(name, found.position, study)


def _check_position(name: str, position: str, study: Study) -> None:
    every = (*study.pairs, *study.placebos)
    try:
        lacking = [pair.id for pair in every if not all(pair.places(position))]
    except SiteError as error:
        raise SiteError(f"{name}: {error}") from error
    if lacking:
        raise SiteError(
            f"{name} is at '{position}', which {len(lacking)} of {len(every)} pairs do not have, {lacking[0]!r} among "
            "them; give a basis of this chat template"
        )


def loaded(lab: Lab) -> Direction | None:
    """The direction of the study's file, kept in the run folder so that reports need no file; None without one."""
    name = lab.study.config.directions.basis
    if not name:
        return None
    note = f"basis-{digest(name)}"
    return Direction.of_record(lab.noted(note, lambda _: Direction.load(Path(name)).record()))


def placed(given: Direction, best: Direction) -> Direction:
    """A direction with a place: where the one that was found lies, unless its file says another."""
    layer = best.layer if given.layer is None else given.layer
    return replace(given, layer=layer, position=given.position or best.position)
