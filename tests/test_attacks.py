"""Rewrapped prompts: what is measured of them is what a study of the rewrapped texts themselves measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import records, write_pairs
from oracle import Subject

import remote_mediation as rm
from remote_mediation.analyses.attacks.ask import WRAPPERS

OUTCOMES: dict[str, dict[str, Any]] = {
    "refusal": {"refusal": {"compliant": ["sure a", "yes"], "refusing": ["sorry no", "no"]}},
    "logit_diff": {"outcome": "logit_diff", "logit_diff": {"plus": ["sure", "yes"], "minus": ["sorry", "no"]}},
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_rewrapped_prompts_are_read_as_plain_ones(
    subject: Callable[[str], Subject], tmp_path: Path, outcome: str
) -> None:
    """Openings of several tokens too, of which all but the last are fed behind the prompt."""
    model = subject("llama_chat")
    settings: dict[str, Any] = {
        **{"model": model.info.name, "statistics": {"resamples": 100}, "seed": 1, **OUTCOMES[outcome]},
        **{"neurons": {"exact": 3, "random_sets": 25}, "intervene": {"tokens": 4}},
    }
    pairs = str(write_pairs(tmp_path / "pairs.jsonl", records()))
    study = rm.StudyConfig(pairs=pairs, analyses=["neurons", "intervene", "attacks"], **settings)
    with rm.open_lab(study, out=tmp_path / "run", backend=model.backend) as lab:
        found = lab.run().tables["attacks.csv"].set_index("attack")["te"]
        heldout = set(lab.pairs("heldout")["pair_id"])
    for number, (name, wrapper) in enumerate(WRAPPERS.items()):
        wrapped = [
            {**record, **{side: wrapper.format(request=record[side]) for side in ("harmful", "harmless")}}
            for record in records()
        ]
        file = str(write_pairs(tmp_path / f"{number}.jsonl", wrapped))
        plain = rm.StudyConfig(pairs=file, analyses=["layers"], **settings)
        with rm.open_lab(plain, out=tmp_path / str(number), backend=model.backend) as lab:
            effects = lab.effects([rm.Site("mlp_output", 1, "last")])
        own = effects[effects["pair_id"].isin(heldout)]["te"]
        assert abs(found[name]) > 0.01
        np.testing.assert_allclose(found[name], own.mean(), rtol=1e-5)
