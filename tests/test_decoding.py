"""What a checkpoint says of generation reaches no answer, and all that ends one does end it."""

import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import token_pair, words_tokenizer
from oracle import FIRST_WORD, LOGIT_DIFF, Subject

from remote_mediation.config import StudyConfig
from remote_mediation.engine.local import LocalBackend
from remote_mediation.errors import ModelError
from remote_mediation.lab import Lab
from remote_mediation.models import ends_of_answers
from remote_mediation.prompts import PromptForm
from remote_mediation.store import Store
from remote_mediation.study import Study

PROMPTS = [(5, 7, 9, 11), (8, 12, 20), (9, 14, 15, 16, 17)]
CHAT = (
    "{% for m in messages %}<user> {{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<user>{% endif %}"
)
Subjects = Callable[[str], Subject]


def with_generation_config(subject: Subject, folder: Path, settings: dict[str, Any]) -> LocalBackend:
    """The same model from a folder whose generation_config says more."""
    subject.plain.save_pretrained(folder)
    subject.backend.tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0, **settings}))
    return LocalBackend.load(str(folder))


def answers(backend: LocalBackend, folder: Path, tokens: int) -> list[tuple[int, ...]]:
    study = Study(StudyConfig(model=backend.info.name), backend.info, LOGIT_DIFF, tuple(map(token_pair, "ab")), ())
    return Lab(study, Store(folder), backend).generate(PROMPTS, tokens)


def argmax(subject: Subject, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Token by token, the whole sequence anew for each, up to the tokenizer's first special token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(subject.plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(takewhile(lambda token: token >= FIRST_WORD, ids[len(prompt) :]))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 0.02},
        {"min_new_tokens": 4, "no_repeat_ngram_size": 1},
        {"num_beams": 3, "length_penalty": 2.0},
        {"do_sample": True, "temperature": 5.0},
        {"num_return_sequences": 2, "num_beams": 2},
        {"stop_strings": ["word"]},
        {"use_cache": False},
        {"suppress_tokens": list(range(20, 60))},
        {"forced_eos_token_id": 2},
        {"begin_suppress_tokens": list(range(20, 60))},
        {"guidance_scale": 3.0},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"sequence_bias": [[[30], 9.0]]},
        {"exponential_decay_length_penalty": [1, 2.0]},
        {"max_length": 3, "max_time": 0.0001},
        {"watermarking_config": {"greenlist_ratio": 0.5, "bias": 9.0}},
        {"return_dict_in_generate": True, "output_scores": True},
        {"custom_generate": "someone/some-code"},
    ],
)
def test_decoding_is_ours(subject: Subjects, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = subject("llama")
    backend = with_generation_config(model, tmp_path / "model", settings)
    assert answers(backend, tmp_path / "run", 5) == [argmax(model, prompt, 5) for prompt in PROMPTS]


def test_ends_in_the_generation_config_end_answers(subject: Subjects, tmp_path: Path) -> None:
    model = subject("llama")
    whole = argmax(model, PROMPTS[0], 5)
    end = whole[2]
    backend = with_generation_config(model, tmp_path / "model", {"eos_token_id": [2, end]})
    assert answers(backend, tmp_path / "run", 5)[0] == whole[: whole.index(end)]


def test_ends_in_the_configuration_end_answers(subject: Subjects, tmp_path: Path) -> None:
    model = subject("llama")
    backend = with_generation_config(model, tmp_path, {})
    (tmp_path / "generation_config.json").unlink()
    configuration = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**configuration, "eos_token_id": [2, 30]}), "utf-8")
    assert 30 in ends_of_answers(str(tmp_path), "", backend.tokenizer)


def test_ends_in_the_configuration_of_the_language_model_end_answers(subject: Subjects, tmp_path: Path) -> None:
    """Of a model that takes images too `config.json` may have them in its `text_config` alone; answers ran on."""
    backend = with_generation_config(subject("llama"), tmp_path, {})
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [2, 30]}}), "utf-8")
    assert 30 in ends_of_answers(str(tmp_path), "", backend.tokenizer)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHAT.replace("<end>", "<|turn|>"), True),
        (CHAT.replace("<end>", "\n<|turn|>\n"), True),
        (CHAT, False),
        ("{{ raise_exception('no') }}", False),
        (None, False),
    ],
)
def test_what_a_template_writes_behind_an_answer_ends_it(template: str | None, ends: bool) -> None:
    """Fine-tuned models whose files name another end go on behind the mark of a turn's, which is not special there."""
    tokenizer = words_tokenizer()
    tokenizer.add_tokens(["<|turn|>"])
    tokenizer.chat_template = template
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert (turn in ends_of_answers("no-model", "", tokenizer)) is ends
    assert (turn in ends_of_answers("no-model", "", tokenizer, PromptForm(template="none"))) is False


@pytest.mark.parametrize("name", ["tiny", "no/such-model", "../nowhere", "a b"])
def test_no_hub_is_asked_for_ends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def connect(*address: object, **settings: object) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    tokenizer = words_tokenizer()
    assert ends_of_answers(name, "", tokenizer) == sorted(tokenizer.all_special_ids)


def test_a_broken_generation_config_is_refused_in_one_line(subject: Subjects, tmp_path: Path) -> None:
    backend = with_generation_config(subject("llama"), tmp_path, {})
    (tmp_path / "generation_config.json").write_text("{", "utf-8")
    with pytest.raises(ModelError, match=r"cannot read .*generation_config\.json: .*; mend it") as raised:
        ends_of_answers(str(tmp_path), "", backend.tokenizer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ends", [[1, "</s>"], [[1]], "</s>", 1.5, True])
def test_ends_that_are_no_token_ids_are_refused(subject: Subjects, tmp_path: Path, ends: Any) -> None:
    backend = with_generation_config(subject("llama"), tmp_path, {})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), "utf-8")
    with pytest.raises(ModelError, match=r"has eos_token_id .*, which is no list of token ids; mend it"):
        ends_of_answers(str(tmp_path), "", backend.tokenizer)
