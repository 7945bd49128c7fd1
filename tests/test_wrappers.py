"""Text models inside of wrappers that take images too: what runs on text alone is what the whole class would run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracle import Subject
from test_samples import BY_ID, GREEDY, sampled, swaps
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from remote_mediation.engine.remote import NdifBackend
from remote_mediation.engine.server import Server
from remote_mediation.errors import PreflightError
from remote_mediation.models import info_of
from remote_mediation.sites import FAMILIES

Subjects = Callable[[str], Subject]
WRAPPERS = [name for name, family in FAMILIES.items() if family.tower]
IDS = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14]])


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_runs_is_what_the_whole_class_makes_of_text(subject: Subjects, name: str) -> None:
    model = subject(name)
    whole = AutoModelForImageTextToText.from_pretrained(model.info.name, dtype=torch.float32).eval()
    assert type(whole).__name__.endswith("ForConditionalGeneration")
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
        found = model.backend.model._module(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_the_tower_is_a_text_model_that_is_known(subject: Subjects) -> None:
    """The same weights in the class of the text model alone."""
    plain = subject("mistral3").plain
    alone = AutoModelForCausalLM.from_config(plain.config.text_config)
    alone.model.load_state_dict(plain.model.language_model.state_dict())
    alone.lm_head.load_state_dict(plain.lm_head.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(alone.eval()(input_ids=IDS).logits, plain(input_ids=IDS).logits)


@pytest.mark.parametrize("text", ["mistral", "ministral3"])
def test_the_shape_is_that_of_the_tower(text: str) -> None:
    tower = {"model_type": text, "num_hidden_layers": 5, "hidden_size": 64, "sliding_window": None}
    info = info_of(AutoConfig.for_model("mistral3", text_config=tower), "some/mistral3")
    assert (info.family, info.layers, info.d_model, info.sliding) == ("mistral3", 5, 64, ())


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_goes_on_from_text_alone(subject: Subjects, name: str) -> None:
    model = subject(name)
    rows = [row for pair in BY_ID.values() for row in swaps(model, pair)]
    tokens = np.array(sampled(model, rows, GREEDY))[:, 0]
    assert tokens.min() >= 0
    assert len(np.unique(tokens)) > 1


def test_a_class_that_takes_images_too_runs_here_only(subject: Subjects) -> None:
    with pytest.raises(PreflightError, match="takes images too, of which nnsight sends no text alone; run it locally"):
        NdifBackend(subject("mistral3").info.name, "", Server("http://127.0.0.1:9", ""), print)
