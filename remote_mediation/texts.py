"""The prompt pairs of a study as text: from its pairs file, or matched from its two lists of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from remote_mediation.config import StudyConfig
from remote_mediation.errors import PairsError
from remote_mediation.lists import PromptList, matched, read_list
from remote_mediation.pairs import HEADER, GivenOpenings, PromptPair, load_pairs
from remote_mediation.show.tables import count


def load_texts(config: StudyConfig) -> tuple[PromptPair, ...]:
    """All pairs that a study names.

    Raises:
        PairsError: they cannot be read, or lists not be matched.
    """
    if lists := _lists(config):
        return matched(*lists)
    pairs = load_pairs(config.pairs)
    return tuple(replace(pair, aligned=False) for pair in pairs) if config.align == "end" else pairs


def described_lists(config: StudyConfig) -> list[str]:
    """Lines that say which column of each list was read, and what pairs of lists can show; none for pairs."""
    lists = _lists(config)
    if not lists:
        return []
    lines = [
        f"{name}: {count(len(one.prompts), 'prompt')} of {one.source}"
        + (f", column {one.column!r}" if one.column else "")
        for name, one in zip(("harmful", "harmless"), lists, strict=True)
    ]
    return [*lines, "matched by length, not aligned: positions post_instruction and last only"]


def write_texts(pairs: Sequence[PromptPair], target: Path) -> None:
    """Write pairs as JSON lines that `load_pairs` reads back.

    Raises:
        PairsError: there is such a file, or it cannot be written.
    """
    made = False
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            made = True
            file.writelines(texts_lines(pairs))
    except OSError as error:
        if made:  # half of it would be read as all, and be in the way of the next try
            target.unlink(missing_ok=True)
        raise PairsError(f"cannot write {str(target)!r}: {error.strerror}; name another file") from error


def texts_lines(pairs: Sequence[PromptPair], openings: GivenOpenings | None = None) -> list[str]:
    """Pairs as lines of a file that `load_pairs` reads back. openings: in a header, for `load_openings`."""
    header = [{HEADER: openings._asdict()}] if openings else []
    return [json.dumps(record, ensure_ascii=False) + "\n" for record in (*header, *map(_record, pairs))]


def _lists(config: StudyConfig) -> tuple[PromptList, PromptList] | None:
    if not (config.harmful and config.harmless):
        return None
    return (
        read_list(config.harmful, config.harmful_column, "harmful"),
        read_list(config.harmless, config.harmless_column, "harmless"),
    )


def _record(pair: PromptPair) -> dict[str, Any]:
    """A pair as a pairs file holds it; what is empty is left out."""
    prompts: dict[str, Any] = {}
    for name, text in (("harmful", pair.harmful), ("harmless", pair.harmless), ("placebo", pair.placebo)):
        before = [turn._asdict() for turn in pair.before(name)]
        prompts[name] = [*before, {"role": "user", "content": text}] if before else text
    labels = {"category": pair.category, "template": pair.template}
    responses = {"harmful_response": pair.harmful_response, "harmless_response": pair.harmless_response}
    found = {**dict(pair.notes), "id": pair.id, **prompts, **labels, **responses}
    record = {name: value for name, value in found.items() if value}
    return record if pair.aligned else {**record, "aligned": False}
