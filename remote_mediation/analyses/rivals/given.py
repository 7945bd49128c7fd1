"""A direction from a file, another run's or from elsewhere; what is none of the model is refused before it runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, TypeAdapter

from remote_mediation.engine.payload import digest
from remote_mediation.errors import SiteError
from remote_mediation.lab import Lab, Study
from remote_mediation.sites import ModelInfo
from remote_mediation.subspaces import Direction, DirectionRecord


def check(study: Study) -> None:
    """Refuse a file whose direction cannot be swapped in a study's model, on its pairs.

    Raises:
        SiteError: it cannot be read, or is of another width, of a layer or at a token that is not there.
    """
    name = study.config.directions.basis
    if not name:
        return
    found = Direction.load(Path(name))
    _check_model(name, found, study.info)
    if found.position:
        _check_position(name, found.position, study)


def _check_model(name: str, found: Direction, info: ModelInfo) -> None:
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
    kind = TypeAdapter(Annotated[DirectionRecord, AfterValidator(partial(_fitting, lab.study.info))])
    return Direction.of_record(lab.noted(f"basis-{digest(name)}", lambda _: Direction.load(Path(name)).record(), kind))


def _fitting(info: ModelInfo, record: DirectionRecord) -> DirectionRecord:
    """A direction that was kept as JSON. Raises: ValueError, it is none of this model."""
    try:
        _check_model("it", Direction.of_record(record), info)
    except SiteError as error:
        raise ValueError(str(error)) from error
    return record


def placed(given: Direction, best: Direction) -> Direction:
    """A direction with a place: where the one that was found lies, unless its file says another."""
    layer = best.layer if given.layer is None else given.layer
    return replace(given, layer=layer, position=given.position or best.position)
