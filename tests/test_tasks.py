"""Tasks that are not rows, against plain PyTorch: hooks, autograd and a decoding loop written out by hand."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from oracle import (
    FIRST_WORD,
    HYBRIDS,
    KINDS,
    LOGIT_DIFF,
    MODULES,
    OTHERS,
    RESPONSE_LOGPROB,
    TOLERANCE,
    VOCAB,
    WINDOWED,
    Subject,
    module_path,
    token_pair,
)

from remote_mediation.config import StudyConfig
from remote_mediation.engine import program
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Context
from remote_mediation.engine.payload import model_spec
from remote_mediation.engine.rows import Constant, Row, Scale, swap
from remote_mediation.engine.tasks import (
    Held,
    Kind,
    Reading,
    columns_task,
    drift_task,
    generate_task,
    plan_tasks,
    read_task,
    screen_tasks,
)
from remote_mediation.errors import SiteError
from remote_mediation.lab import Lab, Study
from remote_mediation.outcomes import Outcome
from remote_mediation.sites import FAMILIES, Component, Site
from remote_mediation.store import Store
from remote_mediation.tokens import TokenPair

Subjects = Callable[[str], Subject]
PROMPTS = ((7, 8, 9, 10, 11), (12, 13, 14), (20, 21, 22, 23, 24, 25, 26))
HELD = (Held(1, (0, 3, 17), Constant((60.0, -50.0, 80.0))), Held(2, (5, 6), Scale(-4.0)))


def setting(model: Subject, outcome: Outcome = LOGIT_DIFF) -> Setting:
    return Setting(model.info, "float32", outcome)


def run(model: Subject, tasks: list[Context], outcome: Outcome = LOGIT_DIFF) -> list[np.ndarray]:
    """Values of tasks, in their order."""
    named = setting(model, outcome)
    found = {}
    for job in plan_tasks(tasks, named, Budget(lambda: 1e18, 1e9)):
        readout = model.backend.collect(model.backend.submit(job))
        found.update(zip(job.keys, readout.values, strict=True))
    return [found[task.keys[0]] for task in tasks]


@pytest.fixture(params=(*KINDS, *HYBRIDS))
def model(subject: Subjects, request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


def neurons_module(model: Subject, layer: int) -> torch.nn.Module:
    return model.plain.get_submodule(MODULES[model.plain.config.model_type]["mlp_neurons"].format(layer))


def test_columns_are_what_a_neuron_adds_when_it_goes_up_by_one(model: Subject) -> None:
    (found,) = run(model, [columns_task("mlp_neurons", setting(model))])
    width = model.info.d_ff
    for layer, norms in enumerate(found.reshape(model.info.layers, width)):
        module = neurons_module(model, layer)
        with torch.no_grad():
            added = module(torch.eye(width)) - module(torch.zeros(1, width))
        np.testing.assert_allclose(norms, added.norm(dim=1), rtol=1e-5)


class Holding:
    """Plain hooks that hold neurons at tokens from `start` of a sequence on."""

    def __init__(self, model: Subject, start: int) -> None:
        self._handles = [
            neurons_module(model, one.layer).register_forward_pre_hook(self._hook(one, start)) for one in HELD
        ]

    def _hook(self, one: Held, start: int) -> Callable[..., tuple[torch.Tensor]]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            value = args[0].clone()
            for number, unit in enumerate(one.units):
                if isinstance(one.value, Scale):
                    value[:, start:, unit] *= one.value.factor
                else:
                    value[:, start:, unit] = one.value.values[number]
            return (value,)

        return hook

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def test_read_gives_activations_averaged_over_places(model: Subject) -> None:
    readings = [
        Reading("mlp_neurons", 2, (1, 2), (0, 7)),
        Reading("layer_output", 0, (4,)),
        Reading("attention_output", 2, (0, 1, 2)),
    ]
    (found,) = run(model, [read_task("a", PROMPTS[0], readings, setting(model))])
    caught: dict[str, torch.Tensor] = {}
    names = MODULES[model.plain.config.model_type]

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor], output: object = None) -> None:
            value = args[0] if output is None else output[0] if isinstance(output, tuple) else output
            caught[name] = value[0] if value.dim() == 3 else value

        return hook

    handles = [
        neurons_module(model, 2).register_forward_pre_hook(keep("neurons")),
        model.plain.get_submodule(names["layer_output"].format(0)).register_forward_hook(keep("layer")),
        model.plain.get_submodule(names["attention_output"].format(2)).register_forward_hook(keep("attention")),
    ]
    with torch.no_grad():
        model.plain(input_ids=torch.tensor([PROMPTS[0]]))
    for handle in handles:
        handle.remove()
    added = caught["attention"] * getattr(model.plain.config, "residual_multiplier", 1.0)  # Granite's
    expected = [caught["layer"][4], added[:3].mean(0), caught["neurons"][1:3][:, [0, 7]].mean(0)]
    np.testing.assert_allclose(found, torch.cat(expected), rtol=0, atol=TOLERANCE)


def test_the_first_layer_s_input_is_what_its_block_gets(model: Subject) -> None:
    readings = [Reading("layer_output", 0, (1, 3)), Reading("layer_input", 0, (1, 3))]
    (found,) = run(model, [read_task("a", PROMPTS[0], readings, setting(model))])
    caught: list[torch.Tensor] = []
    block = model.plain.get_submodule(MODULES[model.plain.config.model_type]["layer_output"].format(0))
    handles = [
        block.register_forward_pre_hook(lambda module, args: caught.append(args[0])),
        block.register_forward_hook(
            lambda module, args, output: caught.append(output[0] if isinstance(output, tuple) else output)
        ),
    ]
    with torch.no_grad():
        model.plain(input_ids=torch.tensor([PROMPTS[0]]))
    for handle in handles:
        handle.remove()
    expected = torch.cat([one[0][[1, 3]].mean(0) for one in caught])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_generate_holds_neurons_at_every_step(model: Subject) -> None:
    plain, held = run(model, [generate_task(PROMPTS, 6, held, setting(model)) for held in ((), HELD)])
    for values, holding in ((plain, False), (held, True)):
        for prompt, answer in zip(PROMPTS, values.reshape(len(PROMPTS), 6).astype(int), strict=True):
            assert answer.tolist() == continued(model, prompt, 6, holding)
    assert plain.tolist() != held.tolist()


def continued(model: Subject, prompt: tuple[int, ...], tokens: int, holding: bool) -> list[int]:
    """Token by token, the whole sequence anew for each."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            if holding:
                with Holding(model, len(prompt) - 1):
                    logits = model.plain(input_ids=torch.tensor([ids])).logits
            else:
                logits = model.plain(input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", [*FAMILIES, *WINDOWED, *OTHERS])
def test_answers_are_those_of_transformers(subject: Subjects, name: str, tmp_path: Path) -> None:
    """Prompts of unequal lengths are continued together, as each is alone."""
    model, pairs = subject(name), [token_pair("pair", before, (2, 4)) for before in range(1, 6)]
    prompts = [ids for pair in pairs for ids in pair.prompts]
    answers = lab(model, tmp_path).generate(prompts, 4)
    assert answers == [generated(model, prompt, 4) for prompt in prompts]
    assert len(set(answers)) > 1


def test_answers_stop_where_the_model_stops(subject: Subjects, tmp_path: Path) -> None:
    model, end = subject("llama"), 2
    prompts = torch.from_numpy(np.random.default_rng(5).integers(FIRST_WORD, VOCAB, (400, 5)))
    ids = prompts
    with torch.no_grad():
        for _ in range(2):
            ids = torch.cat([ids, model.plain(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    at_once = prompts[ids[:, 5] == end][0].tolist()
    after_one = prompts[(ids[:, 5] >= FIRST_WORD) & (ids[:, 6] == end)][0].tolist()
    assert [len(answer) for answer in lab(model, tmp_path).generate([tuple(at_once), tuple(after_one)], 6)] == [0, 1]


@pytest.mark.slow
def test_answers_of_smollm2(smollm2: Subject, tmp_path: Path) -> None:
    tokenizer = smollm2.backend.tokenizer
    texts = ("How do I steal a car at night?", "Tell me how to paint a house.")
    prompts = [
        tuple(
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        )
        for text in texts
    ]
    answers = lab(smollm2, tmp_path).generate(prompts, 8)
    assert answers == [generated(smollm2, prompt, 8) for prompt in prompts]
    assert len(set(answers)) == 2


def lab(model: Subject, folder: Path) -> Lab:
    pairs = tuple(token_pair(name, before) for name, before in (("a", 3), ("b", 4)))
    study = Study(StudyConfig(model=model.info.name), model.info, LOGIT_DIFF, pairs, ())
    return Lab(study, Store(folder), model.backend)


def generated(model: Subject, prompt: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Plain transformers' greedy continuation, up to the first special token."""
    ids, special = torch.tensor([prompt]), model.backend.tokenizer.all_special_ids
    settings = {"max_new_tokens": tokens, "do_sample": False}
    found = model.plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
    answer = found.tolist()
    return tuple(answer[: next((at for at, token in enumerate(answer) if token in special), len(answer))])


def test_drift_along_an_answer(model: Subject) -> None:
    answer = (30, 31, 32)
    (found,) = run(model, [drift_task("a", PROMPTS[0], answer, HELD, setting(model))])
    ids = torch.tensor([PROMPTS[0] + answer])
    start = len(PROMPTS[0]) - 1
    with torch.no_grad():
        plain = model.plain(input_ids=ids).logits[0].double().log_softmax(-1)[start:-1]
        with Holding(model, start):
            held = model.plain(input_ids=ids).logits[0].double().log_softmax(-1)[start:-1]
    divergence = torch.nn.functional.kl_div(held, plain, log_target=True, reduction="none").sum(-1)
    losses = [torch.nn.functional.nll_loss(scores, torch.tensor(answer), reduction="none") for scores in (plain, held)]
    np.testing.assert_allclose(found.reshape(3, 3), torch.stack([divergence, *losses]), rtol=0, atol=TOLERANCE)
    assert divergence.min() > 10 * TOLERANCE


@pytest.mark.parametrize("outcome", [LOGIT_DIFF, RESPONSE_LOGPROB], ids=["logit_diff", "response_logprob"])
def test_screening_is_the_gradient_times_the_change(model: Subject, outcome: Outcome) -> None:
    pair = token_pair("pair", edits=(2, 3), answers=(3, 2) if outcome is RESPONSE_LOGPROB else (0, 0))
    (found,) = run(model, screen_tasks([pair], "mlp_neurons", "last", setting(model, outcome), dropping=True), outcome)
    layers = model.info.layers
    scores = found.reshape(2, 2, layers, model.info.d_ff)
    for base in (0, 1):
        dropped = [attributed(model, pair, base, outcome, drop=layer) for layer in range(layers)]
        expected = [attributed(model, pair, base, outcome), np.abs(dropped).sum(0) / (layers - 1)]
        np.testing.assert_allclose(scores[base], expected, rtol=1e-3, atol=TOLERANCE)
        assert np.abs(scores[base, 1] - np.abs(scores[base, 0])).max() > 10 * TOLERANCE
    assert np.abs(scores[0, 0] - scores[1, 0]).max() > 100 * TOLERANCE
    (alone,) = run(model, screen_tasks([pair], "mlp_neurons", "last", setting(model, outcome)), outcome)
    np.testing.assert_allclose(alone.reshape(2, layers, -1), scores[:, 0], rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("part", ["mlp_neurons", "mlp_output", "attention_output", "layer_output"])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_relevance_patching_is_the_gradient_of_a_linear_model(subject: Subjects, name: str, part: Component) -> None:
    model, pair = subject(name), token_pair("pair", edits=(2, 3))
    (found,) = run(model, screen_tasks([pair], part, "last", setting(model), "relp"))
    (plain,) = run(model, screen_tasks([pair], part, "last", setting(model)))
    sides = [linear_model(model, prompt) for prompt in pair.prompts]
    for base, scores in enumerate(found.reshape(2, model.info.layers, -1)):
        parts = sides[base].parts[part]
        gradients = torch.autograd.grad(difference(sides[base].logits), parts)
        for layer, gradient in enumerate(gradients):
            change = sides[1].parts[part][layer][-1] - sides[0].parts[part][layer][-1]
            expected = (change * gradient[-1]).detach()
            np.testing.assert_allclose(scores[layer], expected, rtol=1e-3, atol=TOLERANCE)
    assert np.abs(found - plain).max() > 100 * TOLERANCE


def difference(logits: torch.Tensor) -> torch.Tensor:
    """Y at the last token, of logits `[token, vocab]`."""
    return logits[-1, list(LOGIT_DIFF.plus)].mean() - logits[-1, list(LOGIT_DIFF.minus)].mean()


class Linear(NamedTuple):
    """A prompt's pass through a model that was made linear."""

    logits: torch.Tensor
    parts: dict[str, list[torch.Tensor]]
    """By component and layer `[token, width]`, in the graph of the logits."""


def linear_model(model: Subject, prompt: tuple[int, ...]) -> Linear:
    """RelP's rules written out for three families, with the attention patterns of a plain run."""
    plain, config, ids = model.plain, model.plain.config, torch.tensor([prompt])
    gpt2, gemma = config.model_type == "gpt2", config.model_type == "gemma"
    with torch.no_grad():
        run_plainly = plain(input_ids=ids, output_attentions=True)
    parts: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("mlp_neurons", "mlp_output", "attention_output", "layer_output")
    }

    def normed(norm: torch.nn.Module, stream: torch.Tensor) -> torch.Tensor:
        if gpt2:
            deviation = (stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt().detach()
            return (stream - stream.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias
        eps = norm.eps if gemma else norm.variance_epsilon
        size = (stream.square().mean(-1, keepdim=True) + eps).sqrt().detach()
        return stream / size * (1 + norm.weight if gemma else norm.weight)

    def attended(layer: int, values: torch.Tensor) -> torch.Tensor:
        pattern = run_plainly.attentions[layer][0]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = values.reshape(len(prompt), -1, width).transpose(0, 1)
        heads = heads.repeat_interleave(len(pattern) // len(heads), 0)
        return (pattern @ heads).transpose(0, 1).flatten(1)

    def hidden(mlp: torch.nn.Module, value: torch.Tensor) -> torch.Tensor:
        if gpt2:
            before = mlp.c_fc(value)
            return before * (mlp.act(before) / before).detach()
        before, up = mlp.gate_proj(value), mlp.up_proj(value)
        gate = before * (mlp.act_fn(before) / before).detach()
        return (gate.detach() * up + gate * up.detach()) / 2

    body = plain.transformer if gpt2 else plain.model
    stream = body.wte(ids)[0] + body.wpe.weight[: len(prompt)] if gpt2 else body.embed_tokens(ids)[0]
    stream = stream.detach().requires_grad_()
    for layer, block in enumerate(body.h if gpt2 else body.layers):
        before, after = (block.ln_1, block.ln_2) if gpt2 else (block.input_layernorm, block.post_attention_layernorm)
        value, attention = normed(before, stream), block.attn if gpt2 else block.self_attn
        values = attention.c_attn(value)[:, -config.n_embd :] if gpt2 else attention.v_proj(value)
        added = (attention.c_proj if gpt2 else attention.o_proj)(attended(layer, values))
        stream = stream + added
        neurons = hidden(block.mlp, normed(after, stream))
        out = (block.mlp.c_proj if gpt2 else block.mlp.down_proj)(neurons)
        stream = stream + out
        for name, one in zip(parts, (neurons, out, added, stream), strict=True):
            parts[name].append(one)
    found = plain.lm_head(normed(body.ln_f if gpt2 else body.norm, stream))
    torch.testing.assert_close(found, run_plainly.logits[0], rtol=0, atol=TOLERANCE)
    return Linear(found, parts)


DENSE = [name for name, family in FAMILIES.items() if family.mixer is None and family.mixture is None]


@pytest.mark.parametrize("name", DENSE)
def test_relevance_patching_leaves_no_family_anything_that_is_not_linear(subject: Subjects, name: str) -> None:
    """A linear model without biases is its slope times its input: what goes into the first block, here."""
    model = subject(name)
    plain, spec = copy.deepcopy(model.plain), model_spec(setting(model))
    for parameter_name, parameter in plain.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    blocks = plain.get_submodule(spec["blocks"])
    entering: list[torch.Tensor] = []

    def enter(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        entering.append(args[0].detach().requires_grad_())
        return (entering[-1], *args[1:])

    blocks[0].register_forward_pre_hook(enter)
    kept = []
    for linear in (True, False):
        hooks = program.linear_hooks(blocks, spec, model.info.gated) if linear else []
        with program.Frozen() if linear else contextlib.nullcontext():
            stream = plain.base_model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).last_hidden_state
        value = (stream[0, -1] * torch.linspace(1, 2, stream.shape[-1])).sum()
        (slope,) = torch.autograd.grad(value, entering[-1])
        kept.append(float(((slope * entering[-1]).sum() / value).detach()))
        for hook in hooks:
            hook.remove()
    assert kept[0] == pytest.approx(1, abs=1e-3)
    assert abs(kept[1] - 1) > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma2_window", "gpt2", "granite"])
def test_integrated_gradients_add_up_to_the_exact_effect(subject: Subjects, name: str) -> None:
    """Of the last layer's output that is TE; of every other site what swapping it whole does."""
    model, pair = subject(name), token_pair("pair", edits=(2, 3))
    for component in ("layer_output", "mlp_output"):
        sites = [Site(component, layer, "last") for layer in range(model.info.layers)]
        rows = [
            Row(pair.id, 0),
            Row(pair.id, 1),
            *(swap(pair, site, side, model.info) for side in (0, 1) for site in sites),
        ]
        y0, y1, *swapped = model.measure([pair], rows, LOGIT_DIFF)
        nie, tie = np.array(swapped).reshape(2, -1) * [[1], [-1]] + [[-y0], [y1]]
        errors = []
        for steps in (1, 8, 64):
            tasks = screen_tasks([pair], component, "last", setting(model), "ig", steps=steps)
            found = run(model, tasks)[0].reshape(2, model.info.layers, -1).sum(-1)
            errors.append(np.abs(found - [nie, tie]).max())
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-3 * abs(y1 - y0)
        if component == "layer_output":
            np.testing.assert_allclose(found[:, -1], y1 - y0, rtol=1e-3)


@pytest.mark.parametrize("name", ["lfm2", "mixtral"])
def test_relevance_patching_is_refused_where_it_has_no_rule(subject: Subjects, name: str) -> None:
    with pytest.raises(SiteError, match=r"relevance patching has no rule for the .*; screen by atp or ig"):
        screen_tasks([token_pair("pair")], "mlp_output", "last", setting(subject(name)), "relp")


@pytest.mark.parametrize("name", ["llama", "granite", "gptj"])
def test_neurons_are_worth_together_what_their_mlp_adds(subject: Subjects, name: str) -> None:
    """A down-projection is linear, and to first order so is Y; Granite's contribution is multiplied behind it."""
    model, pair = subject(name), token_pair("pair", edits=(2, 3))
    tasks = [screen_tasks([pair], part, "last", setting(model)) for part in ("mlp_neurons", "mlp_output")]
    neurons, mlp = (run(model, one)[0].reshape(2, model.info.layers, -1).sum(-1) for one in tasks)
    np.testing.assert_allclose(neurons, mlp, rtol=1e-3, atol=TOLERANCE)
    assert np.abs(mlp).max() > 100 * TOLERANCE


@pytest.mark.slow
def test_screenings_of_many_pairs_add_up_where_they_arise(model: Subject) -> None:
    pairs = [token_pair(f"pair{before}", before % 7, (2, 2 + before % 2)) for before in range(18)]

    def screened(*some: TokenPair) -> np.ndarray:
        tasks = screen_tasks(some, "mlp_neurons", "last", setting(model), dropping=True)
        assert [task.pairs for task in tasks] == [tuple(p.id for p in some[:16]), tuple(p.id for p in some[16:])][
            : len(tasks)
        ]
        return np.array(run(model, tasks)).sum(0)

    np.testing.assert_allclose(screened(*pairs), sum(screened(pair) for pair in pairs), rtol=1e-4, atol=TOLERANCE)


def attributed(model: Subject, pair: TokenPair, base: int, outcome: Outcome, drop: int | None = None) -> np.ndarray:
    """`[layer, unit]` from its definition: one pass per answer over prompt and answer, autograd through plain hooks.

    The values are those of the harmful minus those of the harmless prompt. Nothing flows back through what layer
    `drop` adds to the stream.
    """
    total = torch.zeros(model.info.layers, model.info.d_ff)
    for answer in (0, 1) if any(pair.answers) else (0,):
        neurons = [recorded(model, pair, side, answer, drop) for side in (0, 1)]
        value = outcome_of_pass(neurons[base].logits, pair, answer, outcome)
        gradients = torch.autograd.grad(value, neurons[base].activations, allow_unused=True)
        for layer, gradient in enumerate(gradients):
            if gradient is not None:
                change = neurons[1].activations[layer] - neurons[0].activations[layer]
                total[layer] += (change * gradient).sum(0).detach()
    return total.numpy()


class Recorded(NamedTuple):
    logits: torch.Tensor
    """From the last prompt token on."""
    activations: list[torch.Tensor]
    """Neurons of each layer from the last prompt token on, in the graph of the logits."""


def recorded(model: Subject, pair: TokenPair, side: int, answer: int, drop: int | None) -> Recorded:
    start = len(pair.prompts[side]) - 1
    activations: list[torch.Tensor] = []
    handles = []

    def split(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        activations.append(args[0][0, start:])
        return (torch.cat([args[0][:, :start], activations[-1][None]], 1),)

    def cut(module: torch.nn.Module, args: object, output: object) -> object:
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()  # type: ignore

    for layer in range(model.info.layers):
        handles.append(neurons_module(model, layer).register_forward_pre_hook(split))
        if layer == drop:
            for name in ("attention_output", "mlp_output"):
                module = model.plain.get_submodule(module_path(model.plain, name, layer))
                handles.append(module.register_forward_hook(cut))
    ids = torch.tensor([pair.prompts[side] + pair.answers[answer][:-1]])
    logits = model.plain(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return Recorded(logits[0, start:], activations)


def outcome_of_pass(logits: torch.Tensor, pair: TokenPair, answer: int, outcome: Outcome) -> torch.Tensor:
    """One answer's part of Y (METHOD.md, "Outcomes")."""
    if outcome.name == "logit_diff":
        return logits[0, list(outcome.plus)].mean() - logits[0, list(outcome.minus)].mean()
    scores, tokens = logits.log_softmax(-1), torch.tensor(pair.answers[answer])
    return (1, -1)[answer] * scores[torch.arange(len(tokens)), tokens].mean()


def test_keys_name_everything_values_depend_on(subject: Subjects) -> None:
    model = subject("llama")
    named = setting(model)
    tasks = [
        generate_task(PROMPTS, 6, (), named),
        generate_task(PROMPTS, 5, (), named),
        generate_task(PROMPTS[:2], 6, (), named),
        generate_task(PROMPTS, 6, HELD, named),
        generate_task(PROMPTS, 6, HELD[:1], named),
    ]
    assert len({task.keys[0] for task in tasks}) == len(tasks)
    assert len({read_task(pair, PROMPTS[0], (), named).keys for pair in ("a", "b")}) == 1
    assert tasks[0].keys != generate_task(PROMPTS, 6, (), named._replace(dtype="bfloat16")).keys


def test_the_program_knows_every_task() -> None:
    assert all(callable(getattr(program, kind)) for kind in get_args(Kind))
