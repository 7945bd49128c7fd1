"""The planted-gate model does what its truth says: measured with plain PyTorch hooks, and by cutting its weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, LlamaForCausalLM

from remote_mediation.pairs import PromptPair
from remote_mediation.placebo import components
from remote_mediation.planted.gate import Organism, Pair, Planted, Truth, planted_gate, save

LAYERS = 10


class Site(NamedTuple):
    """What a hook writes: all positions or the last, all units or some.

    All positions is the same as all from the edit on, because before the edit the prompts of a pair are equal.
    """

    component: str
    layer: int
    units: tuple[int, ...] | None = None
    last: bool = False


class Effects(NamedTuple):
    """NIE and TIE, in logits on each pair (pair,), or as shares of TE for each neuron (unit,)."""

    nie: Tensor
    tie: Tensor


class Base(NamedTuple):
    """One side of all pairs: its tokens, its outcome (pair,), and each component's tensor (pair, position, unit)."""

    tokens: BatchEncoding
    outcome: Tensor
    values: dict[tuple[str, int], Tensor]


INPUTS = ("mlp_neurons", "attention_heads")
OUTPUTS = ("mlp_output", "attention_output", "layer_output")


def module_of(model: LlamaForCausalLM, component: str, layer: int) -> nn.Module:
    block = model.model.layers[layer]
    return {
        "layer_output": block,
        "attention_output": block.self_attn,
        "mlp_output": block.mlp,
        "mlp_neurons": block.mlp.down_proj,
        "attention_heads": block.self_attn.o_proj,
    }[component]


@contextmanager
def hooked(model: LlamaForCausalLM, component: str, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Run with a component's tensor replaced by `change` of it."""

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(inputs[0]), *inputs[1:])

    def after(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    module = module_of(model, component, layer)
    is_input = component in INPUTS
    handle = module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def paste(values: Tensor, site: Site, tensor: Tensor) -> Tensor:
    """`tensor` (pair, position, unit) with the site's entries taken from `values`."""
    units = torch.zeros(tensor.shape[2], dtype=torch.bool)
    units[slice(None) if site.units is None else list(site.units)] = True
    positions = torch.zeros(tensor.shape[1], 1, dtype=torch.bool)
    positions[-1 if site.last else slice(None)] = True
    return torch.where(positions & units, values, tensor)


def keep(store: dict[tuple[str, int], Tensor], key: tuple[str, int], tensor: Tensor) -> Tensor:
    store[key] = tensor.clone()
    return tensor


class Bench:
    """An organism on half of its pairs, or on those given; every potential outcome is a run of its own."""

    def __init__(self, organism: Organism, pairs: Collection[Pair] = ()) -> None:
        self.organism = organism
        self.pairs = list(pairs or organism.pairs[::2])
        self.truth = organism.truth
        self.model = organism.model
        self.x1, self.x0 = (self._base(side) for side in ("harmful", "harmless"))
        self.te = self.x1.outcome - self.x0.outcome
        self.mean_te = self.te.mean()

    def _base(self, side: str) -> Base:
        tokens = self.tokens([getattr(pair, side) for pair in self.pairs])
        values: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack:
            for component in (*INPUTS, *OUTPUTS):
                for layer in range(len(self.model.model.layers)):
                    change = partial(keep, values, (component, layer))
                    stack.enter_context(hooked(self.model, component, layer, change))
            return Base(tokens, self.outcome(self.model, **tokens), values)

    def tokens(self, texts: Sequence[str]) -> BatchEncoding:
        """Prompts in the chat template, padded on the left: the last column is the last token of each."""
        return self.organism.tokenizer.apply_chat_template(
            [[{"role": "user", "content": text}] for text in texts],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )

    @torch.no_grad()
    def outcome(self, model: LlamaForCausalLM, **inputs: Tensor) -> Tensor:
        """logit(plus) − logit(minus) at the last token: (prompt,)."""
        words = [self.organism.plus_token, self.organism.minus_token]
        plus, minus = self.organism.tokenizer.convert_tokens_to_ids(words)
        logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].double()
        return logits[:, plus] - logits[:, minus]

    def patched(self, base: Base, source: Base, sites: Collection[Site]) -> Tensor:
        with ExitStack() as stack:
            for site in sites:
                values = source.values[site.component, site.layer]
                stack.enter_context(hooked(self.model, site.component, site.layer, partial(paste, values, site)))
            return self.outcome(self.model, **base.tokens)

    def effects(self, *sites: Site) -> Effects:
        """NIE = Y(x0, M(x1)) − Y(x0) and TIE = Y(x1) − Y(x1, M(x0)) of all sites together."""
        nie = self.patched(self.x0, self.x1, sites) - self.x0.outcome
        tie = self.x1.outcome - self.patched(self.x1, self.x0, sites)
        return Effects(nie, tie)

    def shares(self, *sites: Site) -> tuple[float, float]:
        """Mean NIE and TIE over mean TE."""
        nie, tie = self.effects(*sites)
        return float(nie.mean() / self.mean_te), float(tie.mean() / self.mean_te)


def neurons(planted: Planted, *, last: bool) -> Site:
    return Site("mlp_neurons", planted.layer, planted.units, last)


def distractor_sites(bench: Bench, component: str) -> list[Site]:
    """All units of a component that were not planted, one site a layer, all positions."""
    kept = planted_units(bench, component)
    sizes = {layer: bench.x0.values[component, layer].shape[2] for layer in range(len(bench.model.model.layers))}
    return [Site(component, layer, tuple(sorted(set(range(n)) - kept[layer]))) for layer, n in sizes.items()]


def planted_units(bench: Bench, component: str) -> dict[int, set[int]]:
    """Layer → planted units of `mlp_neurons`, or planted coordinates of `attention_heads`."""
    truth, width = bench.truth, bench.model.config.head_dim
    kept: dict[int, set[int]] = {layer: set() for layer in range(len(bench.model.model.layers))}
    if component == "mlp_neurons":
        for layer, units in (truth.reader, *truth.relays, truth.gate):
            kept[layer].update(units)
    else:
        for layer, heads in truth.movers:
            kept[layer].update(head * width + i for head in heads for i in range(width))
    return kept


def without(bench: Bench, sites: Collection[Site]) -> LlamaForCausalLM:
    """A copy of the model in which nothing leaves these units any more."""
    model = copy.deepcopy(bench.model)
    with torch.no_grad():
        for site in sites:
            module_of(model, site.component, site.layer).weight[:, list(site.units or ())] = 0
    return model


@torch.no_grad()
def every_neuron(bench: Bench, layer: int) -> Effects:
    """Mean NIE and TIE of each neuron of a layer at the last token, exact, in shares of mean TE: (unit,)."""
    down = bench.model.model.layers[layer].mlp.down_proj.weight
    shares: list[Tensor] = []
    for base, source, sign in ((bench.x0, bench.x1, 1), (bench.x1, bench.x0, -1)):
        change = (source.values["mlp_neurons", layer] - base.values["mlp_neurons", layer])[:, -1]
        means: list[Tensor] = []
        for unit in range(down.shape[1]):
            states = base.values["layer_output", layer].clone()
            states[:, -1] += change[:, unit, None] * down[:, unit]
            means.append((run_from(bench, layer + 1, states, base.tokens["attention_mask"]) - base.outcome).mean())
        shares.append(sign * torch.stack(means) / bench.mean_te)
    return Effects(*shares)


def run_from(bench: Bench, layer: int, states: Tensor, attention_mask: Tensor) -> Tensor:
    """The outcome when the stream (prompt, position, d_model) enters a layer, through the layers from there on."""
    layers = bench.model.model.layers
    bench.model.model.layers = layers[layer:]
    try:
        return bench.outcome(bench.model, inputs_embeds=states, attention_mask=attention_mask)
    finally:
        bench.model.model.layers = layers


@pytest.fixture(scope="module", params=range(6), ids="seed{}".format)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(planted_gate(request.param))


# --- the mechanism ----------------------------------------------------------------------------------------------------


def test_harm_raises_the_outcome_in_every_pair(bench: Bench) -> None:
    every_pair = Bench(bench.organism, bench.organism.pairs)
    assert len(every_pair.te) == 48
    assert every_pair.te.min() > 0.1 * every_pair.mean_te
    assert 4.5 < every_pair.mean_te < 8


def test_greedy_answer_is_plus_after_harm_and_minus_otherwise(bench: Bench) -> None:
    for base, word in ((bench.x1, bench.organism.plus_token), (bench.x0, bench.organism.minus_token)):
        output = bench.model.generate(**base.tokens, max_new_tokens=1, do_sample=False)
        answers = bench.organism.tokenizer.batch_decode(output[:, -1:])
        assert answers.count(word) >= 0.9 * len(answers)


@pytest.mark.slow
def test_gate_mlp_is_the_one_bottleneck(bench: Bench) -> None:
    shares = {
        (component, layer): bench.shares(Site(component, layer))
        for component in ("mlp_output", "attention_output")
        for layer in range(LAYERS)
    }
    gate_nie, gate_tie = shares.pop(("mlp_output", bench.truth.gate.layer))
    assert gate_nie >= 0.85
    assert gate_tie >= 0.85
    assert max(nie for nie, _ in shares.values()) <= 0.6 * gate_nie
    assert max(tie for _, tie in shares.values()) <= 0.9 * gate_tie


def test_gate_neurons_together_carry_the_effect(bench: Bench) -> None:
    nie, tie = bench.shares(neurons(bench.truth.gate, last=True))
    assert 0.85 <= nie <= 1.15
    assert 0.85 <= tie <= 1.15


def test_each_gate_neuron_is_visible_alone(bench: Bench) -> None:
    layer, units = bench.truth.gate
    for unit in units:
        nie, tie = bench.shares(Site("mlp_neurons", layer, (unit,), last=True))
        assert min(nie, tie) >= 0.08, f"neuron {unit} of {units}"


def test_cutting_the_gate_neurons_stops_harm(bench: Bench) -> None:
    cut = without(bench, [neurons(bench.truth.gate, last=False)])
    te = bench.outcome(cut, **bench.x1.tokens) - bench.outcome(cut, **bench.x0.tokens)
    assert abs(te.mean()) <= 0.15 * bench.mean_te


def test_reader_and_relays_mediate_a_part(bench: Bench) -> None:
    reader = bench.shares(neurons(bench.truth.reader, last=False))
    relays = bench.shares(*(neurons(relay, last=True) for relay in bench.truth.relays))
    for nie, tie in (reader, relays):
        assert 0.15 <= nie <= 0.7
        assert 0.15 <= tie <= 0.9


def test_movers_carry_the_effect_together(bench: Bench) -> None:
    width = bench.model.config.head_dim
    sites = [
        Site("attention_heads", layer, tuple(range(head * width, (head + 1) * width)), last=True)
        for layer, (head,) in bench.truth.movers
    ]
    nie, tie = bench.shares(*sites)
    assert nie >= 0.75
    assert tie >= 0.75


def test_last_token_learns_of_harm_late(bench: Bench) -> None:
    profile = [bench.shares(Site("layer_output", layer, last=True))[0] for layer in range(LAYERS)]
    third = LAYERS // 3
    assert max(map(abs, profile[:third])) <= 0.1
    assert all(later >= earlier - 0.05 for earlier, later in pairwise(profile))
    assert profile[bench.truth.gate.layer] >= 0.9
    assert profile[-1] == pytest.approx(1, abs=1e-4)


def test_distractors_are_heard_in_the_outcome(bench: Bench) -> None:
    sites = distractor_sites(bench, "mlp_neurons") + distractor_sites(bench, "attention_heads")
    silenced = without(bench, sites)
    noise = bench.x0.outcome - bench.outcome(silenced, **bench.x0.tokens)
    assert noise.std() >= 0.1 * bench.mean_te


@pytest.mark.parametrize("component", INPUTS)
def test_distractors_respond_to_harm(bench: Bench, component: str) -> None:
    effects = bench.effects(*distractor_sites(bench, component))
    assert effects.nie.std() >= 0.03 * bench.mean_te
    assert abs(effects.nie.mean()) <= 0.15 * bench.mean_te


@pytest.mark.parametrize("seed", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_only_gate_neurons_pass_the_rule(seed: int) -> None:
    bench = Bench(planted_gate(seed))
    for layer in range(LAYERS - LAYERS // 3, LAYERS):
        nie, tie = every_neuron(bench, layer)
        found = torch.nonzero((nie >= 0.05) & (tie >= 0.05)).flatten().tolist()
        assert found == (list(bench.truth.gate.units) if layer == bench.truth.gate.layer else [])
        others = torch.ones(len(nie), dtype=torch.bool)
        others[found] = False
        assert torch.maximum(nie.abs(), tie.abs())[others].max() <= 0.03


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 4},
        {"d_model": 64},
        pytest.param({"layers": 16}, marks=pytest.mark.slow),
        pytest.param({"d_ff": 1024}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_sizes_keep_the_bottleneck(sizes: dict[str, int]) -> None:
    bench = Bench(planted_gate(1, **sizes))
    assert bench.te.min() > 0
    shares = {
        (component, layer): bench.shares(Site(component, layer))[0]
        for component in ("mlp_output", "attention_output")
        for layer in range(sizes.get("layers", LAYERS))
    }
    assert shares.pop(("mlp_output", bench.truth.gate.layer)) >= 1.25 * max(shares.values())
    assert min(bench.shares(neurons(bench.truth.gate, last=True))) >= 0.85


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_truth_lies_in_its_thirds_and_is_distinct(bench: Bench) -> None:
    truth = bench.truth
    assert truth.reader.layer in range(3)
    assert truth.gate.layer in range(7, 10)
    assert [relay.layer for relay in truth.relays] == sorted({relay.layer for relay in truth.relays})
    assert all(relay.layer in range(3, 7) for relay in truth.relays)
    assert [mover.layer for mover in truth.movers] == list(range(3, truth.gate.layer + 1))
    for planted in (truth.reader, *truth.relays, truth.gate):
        assert planted.units == tuple(sorted(set(planted.units)))
        assert set(planted.units) <= set(range(256))


def test_seeds_draw_every_size_and_place() -> None:
    truths = [planted_gate(seed, d_ff=6, d_model=64).truth for seed in range(40)]

    def drawn(read: Callable[[Truth], object]) -> set[object]:
        return {read(truth) for truth in truths}

    assert drawn(lambda truth: len(truth.gate.units)) == {1, 2, 3, 4, 5, 6}
    assert drawn(lambda truth: truth.gate.layer) == {7, 8, 9}
    assert drawn(lambda truth: truth.reader.layer) == {0, 1, 2}
    assert len(drawn(lambda truth: tuple(relay.layer for relay in truth.relays))) == 6


def test_the_seed_decides_everything_and_nothing_global_does() -> None:
    torch.manual_seed(1)
    first = planted_gate(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = planted_gate(3), planted_gate(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.truth, first.pairs) == (again.truth, again.pairs)
    assert (first.truth, first.pairs) != (other.truth, other.pairs)
    weights, same = first.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.parametrize("sizes", [{"layers": 3}, {"d_ff": 5}, {"d_model": 56}, {"d_model": 100}], ids=str)
def test_sizes_that_cannot_hold_the_route_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="{}={}".format(*next(iter(sizes.items())))):
        planted_gate(0, **sizes)


# --- pairs, tokenizer, files ------------------------------------------------------------------------------------------


def test_pairs_differ_in_one_known_word(bench: Bench) -> None:
    organism = bench.organism
    places = []
    for pair in organism.pairs:
        ids1, ids0, placebo = (
            organism.tokenizer(text)["input_ids"] for text in (pair.harmful, pair.harmless, pair.placebo)
        )
        assert organism.tokenizer.unk_token_id not in ids1 + ids0 + placebo
        assert len(ids1) == len(ids0) == len(placebo) == len(pair.harmful.split())
        edits = [i for i, (a, b) in enumerate(zip(ids1, ids0, strict=True)) if a != b]
        assert len(edits) == 1
        assert edits == [i for i, (a, b) in enumerate(zip(placebo, ids0, strict=True)) if a != b]
        assert pair.id == f"{pair.template}-{pair.harmful.split()[edits[0]]}"
        places.append(edits[0])
    assert len(set(places)) >= 5


def test_pairs_are_many_and_share_nothing(bench: Bench) -> None:
    pairs = bench.organism.pairs
    assert len({pair.id for pair in pairs}) == len(pairs) == 48
    assert len(set(components([PromptPair(**pair._asdict()) for pair in pairs]))) == 48
    assert set(Counter(pair.category for pair in pairs).values()) == {12}
    assert len({len(pair.harmful.split()) for pair in pairs}) >= 4


def test_chat_template_ends_in_two_tokens_after_the_text() -> None:
    tokenizer = planted_gate(0).tokenizer
    chat = [{"role": "user", "content": "tell me"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<user>", "tell", "me", "<end>", "<assistant>"]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).endswith("<assistant>")
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "tell me"


def test_saved_organism_loads_as_any_model_does(bench: Bench, tmp_path: Path) -> None:
    save(bench.organism, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert tokenizer.get_vocab() == bench.organism.tokenizer.get_vocab()
    assert tokenizer.chat_template == bench.organism.tokenizer.chat_template
    assert torch.allclose(bench.outcome(model, **bench.x1.tokens), bench.x1.outcome, atol=1e-5)
