"""Directions taken out of the stream, and vectors added to it, at all layers and tokens: against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from oracle import KINDS, LOGIT_DIFF, TOLERANCE, Subject, module_path

from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Context
from remote_mediation.engine.tasks import Ablated, Added, Intervention, drift_task, generate_task, plan_tasks
from remote_mediation.sites import FAMILIES
from remote_mediation.subspaces import Basis

Subjects = Callable[[str], Subject]
PROMPTS = ((7, 8, 9, 10, 11), (12, 13, 14), (20, 21, 22, 23, 24, 25, 26))
ANSWER = (30, 31, 32)
TOKENS = 4
STREAM = ("layer_output", "attention_output", "mlp_output")


def setting(model: Subject) -> Setting:
    return Setting(model.info, "float32", LOGIT_DIFF)


def run(model: Subject, tasks: list[Context]) -> list[np.ndarray]:
    found = {}
    for job in plan_tasks(tasks, setting(model), Budget(lambda: 1e18, 1e9)):
        readout = model.backend.collect(model.backend.submit(job))
        found.update(zip(job.keys, readout.values, strict=True))
    return [found[task.keys[0]] for task in tasks]


def steerings(model: Subject) -> dict[str, Intervention]:
    rng, width = np.random.default_rng(0), model.info.d_model
    vector = tuple(map(float, 2 * rng.normal(size=width)))
    return {
        "nothing": (),
        "one direction out": Ablated(Basis.random(1, width, rng)),
        "three directions out": Ablated(Basis.random(3, width, rng)),
        "a vector added": Added(1, vector),
        "added to the last layer": Added(2, vector),
    }


@contextmanager
def by_hooks(model: Subject, steering: Intervention) -> Iterator[None]:
    """What refusal_direction does: hooks on the inputs of blocks, on attention and on MLP outputs."""
    handles = []

    def out(tensor: torch.Tensor) -> torch.Tensor:
        for direction in torch.tensor(steering.basis.vectors) if isinstance(steering, Ablated) else ():
            tensor = tensor - (tensor @ direction)[..., None] * direction
        return tensor

    def on_input(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (out(args[0]), *args[1:])

    def on_output(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., object]:
        def hook(_: object, __: object, output: object) -> object:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)  # type: ignore

        return hook

    for layer in range(model.info.layers):
        paths = {name: module_path(model.plain, name, layer) for name in STREAM}
        parts = {name: model.plain.get_submodule(path) for name, path in paths.items()}
        handles.append(parts["layer_output"].register_forward_pre_hook(on_input))
        for name in STREAM[1:]:
            handles.append(parts[name].register_forward_hook(on_output(out)))
        if isinstance(steering, Added) and steering.layer == layer:
            vector = torch.tensor(steering.vector)
            handles.append(parts["layer_output"].register_forward_hook(on_output(lambda tensor: tensor + vector)))  # noqa: B023
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: Subject, ids: tuple[int, ...], steering: Intervention) -> torch.Tensor:
    """`[token, vocab]` of a whole sequence, nothing kept of another."""
    with torch.no_grad(), by_hooks(model, steering):
        found: torch.Tensor = model.plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return found


def continued(model: Subject, prompt: tuple[int, ...], steering: Intervention) -> list[int]:
    """Token by token, the whole sequence anew for each."""
    ids = prompt
    for _ in range(TOKENS):
        ids = (*ids, int(logits(model, ids, steering)[-1].argmax()))
    return list(ids[len(prompt) :])


@pytest.mark.parametrize("name", [*FAMILIES, "gemma2_window", "falcon_new", "gpt_neox_sequential"])
def test_answers_are_those_of_plain_hooks(subject: Subjects, name: str) -> None:
    """Generated from keys and values that were steered, too, and so at every token."""
    model = subject(name)
    every = steerings(model)
    found = run(model, [generate_task(PROMPTS, TOKENS, one, setting(model)) for one in every.values()])
    for steering, values in zip(every.values(), found, strict=True):
        answers = values.reshape(len(PROMPTS), TOKENS).astype(int).tolist()
        assert answers == [continued(model, prompt, steering) for prompt in PROMPTS]
    assert len({tuple(values) for values in found}) >= 2


@pytest.mark.parametrize("name", [*KINDS, "mixtral", "falcon", "phi", "gpt_oss"])
def test_divergences_are_those_of_plain_hooks(subject: Subjects, name: str) -> None:
    model, ids = subject(name), PROMPTS[0] + ANSWER[:-1]
    every = steerings(model)
    found = run(model, [drift_task("a", PROMPTS[0], ANSWER, one, setting(model)) for one in every.values()])
    plain = logits(model, ids, ())[len(PROMPTS[0]) - 1 :].log_softmax(-1)
    for kind, steering, values in zip(every, every.values(), found, strict=True):
        steered = logits(model, ids, steering)[len(PROMPTS[0]) - 1 :].log_softmax(-1)
        divergence = (plain.exp() * (plain - steered)).sum(-1)
        losses = [-scores[torch.arange(len(ANSWER)), torch.tensor(ANSWER)] for scores in (plain, steered)]
        expected = torch.stack([divergence, *losses])
        np.testing.assert_allclose(values.reshape(3, -1), expected, rtol=1e-4, atol=TOLERANCE)
        assert kind == "nothing" or divergence.min() > 10 * TOLERANCE


def test_tasks_are_known_by_what_steers_them(subject: Subjects) -> None:
    model = subject("llama")
    named, every = setting(model), steerings(model)
    keys = {generate_task(PROMPTS, TOKENS, one, named).keys for one in every.values()}
    assert len(keys) == len(every)
    held_nothing = generate_task(PROMPTS, TOKENS, (), named)
    assert set(held_nothing.payload) == {"prompts", "tokens", "held"}  # known as it was before there was any steering
    again = Ablated(Basis(every["one direction out"].basis.vectors.copy()))  # type: ignore[union-attr]
    assert generate_task(PROMPTS, TOKENS, again, named).keys in keys
