"""What a run folder has printed: its tables as they lie there, beside what `run.json` says of the study.

The page is made from these alone. It needs no model, works on a folder that was shared without its prompts, and shows
the numbers that the report shows, as both come from the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from remote_mediation.config import StudyConfig
from remote_mediation.effects import EFFECT_COLUMNS, QUANTITIES
from remote_mediation.errors import SettingsError, StoreError, innermost
from remote_mediation.show.tables import csv_table
from remote_mediation.stats import Estimate
from remote_mediation.store import Store
from remote_mediation.summary import Identity, identities_of, total_effect
from remote_mediation.tokens import TokenPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Columns whose values are names, also where they look like numbers.
_NAMES = (
    *("pair_id", "cluster", "split", "analysis", "component", "position", "quantity", "reason", "neurons", "gate"),
    "paper",
)

_FILLED = ("pair_id", "cluster", "split", "analysis", "component", "layer", "position")
_NUMBERS = ("layer", "y_base", "y_source", "y_base_patched", "y_source_patched", *QUANTITIES)


class Tokens(NamedTuple):
    """What stands at a position of a pair, as text."""

    harmless: str
    harmful: str


@dataclass(frozen=True)
class Printed:
    """One run, as its folder has it."""

    name: str
    """Of its folder."""
    folder: Path
    config: StudyConfig
    model: Mapping[str, Any]
    """Fields of `ModelInfo`."""
    finished: bool
    source: str
    """Where its weights are from, if not from the hub as they are; else empty."""
    tables: Mapping[str, pd.DataFrame]
    """By name of the CSV file, `effects.csv` among them."""
    total: Estimate
    """TE over all pairs, in `unit`."""
    identities: tuple[Identity, ...]
    """Relations that hold by construction, checked on the effects."""
    pairs: tuple[TokenPair, ...]
    """Those that can be run; none where the folder was shared without them."""

    @property
    def unit(self) -> str:
        """What effects are measured in."""
        return str(self.tables["effects.csv"]["unit"].iloc[0])

    def table(self, name: str, columns: Iterable[str]) -> pd.DataFrame | None:
        """A table that has rows; None where there is none.

        Raises:
            StoreError: it lacks some of the columns.
        """
        found = self.tables.get(name)
        if found is None or found.empty:
            return None
        missing = [column for column in columns if column not in found]
        if missing:
            raise StoreError(
                f"{name} of {self.name} has no column {missing[0]!r}, another version wrote it; measure the run anew"
            )
        return found


def read_several(folders: Sequence[Path]) -> list[Printed]:
    """Runs from their folders; where folders have one name, named by the path that was given.

    Raises:
        SettingsError: a run is named twice.
        StoreError: as `read_printed`.
    """
    for place, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise SettingsError(f"{folder} is named twice; name different run folders")
    runs = [read_printed(folder) for folder in folders]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def read_printed(folder: Path) -> Printed:
    """A run from its folder.

    Raises:
        StoreError: it is no run folder, has no table of effects, or settings that this version does not know.
    """
    store = Store.open(folder)
    record = store.record()
    tables = {path.name: _read(path) for path in sorted(folder.glob("*.csv"))}
    effects = tables.get("effects.csv")
    if effects is None or effects.empty:
        raise StoreError(f"{folder} has no effects.csv with rows; write it with `remote-mediation report {folder}`")
    config, prepared = store.config(), store.prepared()
    _check_effects(effects, folder)
    pairs = prepared.pairs if prepared else ()
    equal = {pair.id for pair in pairs if len(pair.x0) == len(pair.x1)}
    return Printed(
        name=folder.resolve().name,
        folder=folder,
        config=config,
        model=record["model"],
        finished=bool(record.get("finished")),
        source=str(record.get("weights", "")),
        tables=tables,
        total=total_effect(effects, config.seed, config.statistics),
        identities=identities_of(effects, equal, record["model"]["layers"]),
        pairs=pairs,
    )


def tokens_at(
    pairs: Iterable[TokenPair], positions: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[str, str], Tokens]:
    """The prompts' tokens by pair and position, without the answer tokens that are fed behind them."""
    wanted = list(positions)
    found = {}
    for pair in pairs:
        for position in wanted:
            texts = [
                visible(str(tokenizer.decode([ids[place] for place in places if place < len(ids)])))
                for ids, places in zip(pair.prompts, pair.places(position), strict=True)
            ]
            found[pair.id, position] = Tokens(*texts)
    return found


def visible(text: str) -> str:
    """Text on one line, in which spaces at the ends, line breaks and other unprintable characters can be seen."""
    shown = "".join("↵" if one == "\n" else one if one.isprintable() else "�" for one in text)
    inner = shown.strip(" ")
    start = len(shown) - len(shown.lstrip(" "))
    return "␣" * start + inner + "␣" * (len(shown) - start - len(inner))


def _check_effects(effects: pd.DataFrame, folder: Path) -> None:
    """Refuse effects that were cut, or that another program has saved in another form, as a spreadsheet may.

    Raises:
        StoreError: they lack a column or cells, or one of numbers holds something else.
    """
    strange = [f"no column {column!r}" for column in EFFECT_COLUMNS if column not in effects]
    strange = strange or [f"no numbers under {name!r}" for name in _NUMBERS if effects[name].dtype.kind not in "if"]
    strange = strange or [f"empty cells under {name!r}" for name in _FILLED if effects[name].isna().any()]
    if strange:
        raise StoreError(
            f"{folder / 'effects.csv'} has {strange[0]}: another version or program wrote it; write it anew with "
            f"`remote-mediation report {folder}`"
        )


def _read(path: Path) -> pd.DataFrame:
    """A table of a run folder.

    Raises:
        StoreError: it is no table.
    """
    try:
        return csv_table(path, _NAMES)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"cannot read {path}: {innermost(error)}; write it anew with `remote-mediation report`, or take it out of "
            "the run folder if it is none of its tables"
        ) from error
