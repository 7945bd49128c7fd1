"""The check can fail: five other tools are each right on one planted case and wrong on another."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import wrong_tools
from wrong_tools import Subject

from remote_mediation.engine.local import LocalBackend
from remote_mediation.planted.cases import CASES, build
from remote_mediation.planted.selfcheck import written
from remote_mediation.store import Store
from remote_mediation.study import prepared_lab

pytestmark = pytest.mark.slow

SEED = 0


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """A case, ready to be asked."""

    @cache
    def prepared(name: str) -> Subject:
        folder = tmp_path_factory.mktemp(name)
        specimen = build(CASES[name], SEED)
        config = written(specimen, folder, SEED)
        store = Store.create(folder / "run", config.identity())
        return Subject(prepared_lab(config, LocalBackend.load(config.model), store), specimen)

    return prepared


@pytest.mark.parametrize(
    ("tool", "right", "wrong"),
    [
        (wrong_tools.correlation_with_harm, "gate", "decoys"),
        (wrong_tools.difference_times_unembedding, "gate", "gate-at-edit"),
        (wrong_tools.blind_to_attention, "gate", "re-embedded"),
        (wrong_tools.nie_only, "gate", "crowd-behind"),
        (wrong_tools.sums_of_sites, "early-gate", "gate"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_other_tools_are_right_here_and_wrong_there(
    subject: Callable[[str], Subject], tool: Callable[[Subject], tuple[int, str]], right: str, wrong: str
) -> None:
    for name in (right, wrong):
        number, said = tool(subject(name))
        assert (said == CASES[name].said[number - 1]) == (name == right), f"{said} of claim {number} on {name}"
