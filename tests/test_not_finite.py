"""Models whose logits are no numbers, of every prompt or of some: no answer of theirs is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import records, token_pair, write_pairs
from oracle import FIRST_WORD, LOGIT_DIFF, Subject
from test_whole_models import change, copy, study_of

from remote_mediation.config import StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.errors import JobError
from remote_mediation.lab import Lab
from remote_mediation.models import load_tokenizer
from remote_mediation.store import Store
from remote_mediation.study import Study, run_study

Subjects = Callable[[str], Subject]
EMBEDDING = "model.embed_tokens.weight"
OUTCOMES: dict[str, dict[str, Any]] = {
    "response_logprob": {"outcome": "response_logprob", "response_logprob": {"tokens": 1}},
    "refusal": {"outcome": "refusal", "logit_diff": {}},
}


def without_numbers(folder: Path, name: str, rows: slice = slice(None)) -> None:
    change(folder, lambda tensors: tensors[name][rows].fill_(torch.nan))


def finished(folder: Path, tmp_path: Path, **settings: Any) -> tuple[set[str], dict[str, str]]:
    """Pairs with effects, and why the others have none."""
    config = study_of(folder, write_pairs(tmp_path / "pairs.jsonl", records()), **settings)
    store = Store.create(tmp_path / f"run-{folder.name}", config.identity())
    result = run_study(config, LocalBackend.load(str(folder)), store)
    refused = {refusal.id: refusal.reason for refusal in result.study.refusals}
    return set(result.effects.dropna(subset="nie")["pair_id"]), {**refused, **store.failures()}


@pytest.mark.parametrize("outcome", list(OUTCOMES))
def test_own_answers_of_a_model_without_numbers_are_not_read(subject: Subjects, tmp_path: Path, outcome: str) -> None:
    """Greedy generation takes the first NaN for the largest logit, as a rule that of a special token."""
    folder = copy(subject("llama"), tmp_path / "model")
    without_numbers(folder, "model.norm.weight")
    with pytest.raises(JobError, match=r"^generate brought back values that are not finite; try bfloat16$"):
        finished(folder, tmp_path, **OUTCOMES[outcome])
    assert Store(tmp_path / "run-model").values() == {}


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("response_logprob", "an answer of the model is made of logits that are not finite; try bfloat16"),
        ("refusal", "no finite outcome; try bfloat16"),
    ],
)
def test_pairs_whose_own_answers_are_no_numbers_are_left_out_alone(
    subject: Subjects, tmp_path: Path, outcome: str, reason: str
) -> None:
    whole, folder = (copy(subject("llama"), tmp_path / name) for name in ("whole", "model"))
    for one in (whole, folder):  # no answer ends at once
        change(one, lambda tensors: tensors["lm_head.weight"][:FIRST_WORD].zero_())
    done, left_out = finished(whole, tmp_path, **OUTCOMES[outcome])
    assert "take-bike" in done
    take = load_tokenizer(str(folder)).convert_tokens_to_ids("take")
    without_numbers(folder, EMBEDDING, slice(take, take + 1))
    found = finished(folder, tmp_path, **OUTCOMES[outcome])
    assert found == (done - {"take-bike"}, {**left_out, "take-bike": reason})


def test_what_follows_the_end_of_an_answer_may_be_no_number(subject: Subjects, tmp_path: Path) -> None:
    """Every answer has all its tokens; those behind its end are not its own."""
    folder, prompts = copy(subject("llama"), tmp_path / "model"), [(token,) for token in range(4, 60)]

    def answers() -> list[tuple[int, ...] | None]:
        backend = LocalBackend.load(str(folder))
        pairs = tuple(map(token_pair, "ab"))
        study = Study(StudyConfig(model=str(folder)), backend.info, LOGIT_DIFF, pairs, ())
        return Lab(study, Store(tmp_path), backend).generate_where_finite(prompts, 8)

    before = answers()
    assert any(answer is not None and 0 < len(answer) < 8 for answer in before)
    without_numbers(folder, EMBEDDING, slice(4))  # of the tokens that end an answer
    assert answers() == before
