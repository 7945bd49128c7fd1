"""Head paths: rows against plain hooks, what does not depend on batches, rules on known effects, planted circuits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fakes import Counting, placebo_study
from oracle import KINDS, LOGIT_DIFF, REFUSAL, TOLERANCE, Oracle, Subject, token_pair, unpacked

from remote_mediation import cost
from remote_mediation.analyses.claims.samples import Sample
from remote_mediation.analyses.claims.verdicts import Bench, Both, Effect
from remote_mediation.analyses.headpaths import HEADPATHS, ask, inputs, show
from remote_mediation.analyses.headpaths import cost as own_cost
from remote_mediation.analyses.rivals import sets
from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.pathrows import Way, path_row, sender_row, way_row
from remote_mediation.engine.rows import Reached, Row, Source, Write
from remote_mediation.engine.samples import Manner, bare, plan_samples
from remote_mediation.errors import SiteError
from remote_mediation.lab import Lab, Study
from remote_mediation.outcomes import Outcome
from remote_mediation.pairs import placebo_id
from remote_mediation.planted.canvas import Planted, write_head
from remote_mediation.planted.cases import CASES, Bed, Case, _as_word, build
from remote_mediation.planted.selfcheck import written
from remote_mediation.report import write_report
from remote_mediation.result import Result
from remote_mediation.sites import PROJECTED_HEADS, Component, Site
from remote_mediation.store import Store
from remote_mediation.study import prepared_lab, reread, run_study
from remote_mediation.tokens import TokenPair

Subjects = Callable[[str], Subject]


def head(layer: int, number: int, position: str = "all") -> Site:
    return Site("attention_heads", layer, position, (number,))


def mlp(layer: int, position: str = "all") -> Site:
    return Site("mlp_output", layer, position)


# --- against plain hooks, written out ---------------------------------------------------------------------------------

MODULES = {
    "llama": (
        *("model.layers.{}.self_attn.o_proj", "model.layers.{}.self_attn", "model.layers.{}.mlp"),
        *(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
    ),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.attn", "transformer.h.{}.mlp"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),
}
KIND: tuple[Component, ...] = ("attention_heads", "attention_output", "mlp_output", *PROJECTED_HEADS)
Values = dict[tuple[str, int], torch.Tensor]
Change = Callable[[str, int, torch.Tensor], torch.Tensor]


def passed(model: Subject, name: str, ids: Sequence[int], change: Change = lambda kind, layer, own: own) -> tuple:
    """Y of a prompt, and what each module computes `[token, width]`, while `change` says what it hands on."""
    seen: Values = {}

    def handed_on(kind: str, layer: int, tensor: torch.Tensor) -> torch.Tensor:
        seen[kind, layer] = tensor[0].clone()
        return change(kind, layer, tensor[0].clone())[None]

    def hooked(kind: str, layer: int, path: str) -> Any:
        module = model.plain.get_submodule(path.format(layer))
        if kind == "attention_heads":
            return module.register_forward_pre_hook(lambda _, args: (handed_on(kind, layer, args[0]), *args[1:]))

        def after(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (handed_on(kind, layer, output[0]), *output[1:])
            return handed_on(kind, layer, output)

        return module.register_forward_hook(after)

    hooks = [hooked(kind, layer, path) for kind, path in zip(KIND, MODULES[name], strict=False) for layer in range(3)]
    with torch.no_grad():
        logits = model.plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
    for hook in hooks:
        hook.remove()
    return float(logits[list(LOGIT_DIFF.plus)].mean() - logits[list(LOGIT_DIFF.minus)].mean()), seen


def patched(model: Subject, name: str, pair: TokenPair, base: int, way: Way) -> float:
    """Y of a prompt by path patching, step by step."""
    width = model.info.d_head
    at, at_other = (torch.tensor(pair.places(way.heads[0].position)[side]) for side in (base, 1 - base))
    _, own = passed(model, name, pair.prompts[base])
    _, other = passed(model, name, pair.prompts[1 - base])
    low = min(site.layer for site in way.heads)

    def only_heads(kind: str, layer: int, computed: torch.Tensor) -> torch.Tensor:
        mine = [site.units[0] for site in way.heads if site.layer == layer]
        if layer < low or kind in PROJECTED_HEADS or (kind == "attention_output" and mine):
            return computed
        held = own[kind, layer].clone()
        for number in mine if kind == "attention_heads" else ():
            columns = slice(number * width, (number + 1) * width)
            held[at, columns] = other[kind, layer][at_other, columns]
        return computed if kind == "attention_heads" and not mine else held

    def only(sites: Sequence[Site], became: Values) -> Change:
        def changed(kind: str, layer: int, computed: torch.Tensor) -> torch.Tensor:
            for site in sites:
                if (site.component, site.layer) == (kind, layer):
                    columns = slice(site.units[0] * width, (site.units[0] + 1) * width) if site.units else slice(None)
                    computed[at, columns] = became[kind, layer][at, columns]
            return computed

        return changed

    y, became = passed(model, name, pair.prompts[base], only_heads)
    for stop in (way.receivers, way.onward):
        if stop:
            y, became = passed(model, name, pair.prompts[base], only(stop, became))
    return y


def ways(position: str) -> list[Way]:
    """From heads of a layer and of two layers: to the answer, an MLP, a head, all heads of a layer, a set."""
    one, two = tuple(head(0, number, position) for number in (0, 1, 3)), (head(0, 3, position), head(1, 2, position))
    receivers = [(), (mlp(0, position),), (mlp(2, position),), (head(2, 0, position),), (head(1, 2, position),)]
    receivers += [(Site("attention_heads", 2, position),), (mlp(1, position), head(2, 3, position), mlp(2, position))]
    return [Way(heads, to) for heads in (one, two) for to in receivers]


def ways_on(position: str) -> list[Way]:
    """By a query, a key or a value, and from there by the one head that asks it, or by one of two that share it."""
    senders, on = (head(0, 1, position), head(0, 3, position)), (head(1, 2, position),)
    numbers = zip(PROJECTED_HEADS, (2, 1, 1), strict=True)
    return [Way(senders, (Site(component, 1, position, (number,)),), on) for component, number in numbers]


@pytest.mark.parametrize("position", ["all", "last"])
@pytest.mark.parametrize("name", MODULES)
def test_paths_are_those_of_plain_hooks(subject: Subjects, name: str, position: str) -> None:
    model, pair = subject(name), token_pair("pair", edits=(2, 2))
    every = [*ways(position), *(ways_on(position) if name == "llama" else ())]
    asked = [(way, base) for way in every for base in (0, 1)]
    rows = [way_row(pair, sender_row(pair, way.heads, base, model.info), way, model.info) for way, base in asked]
    found = model.measure([pair], rows, LOGIT_DIFF)
    expected = np.array([patched(model, name, pair, base, way) for way, base in asked])
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    effects = expected - np.array([passed(model, name, pair.prompts[base])[0] for _, base in asked])
    # In a parallel block the MLP does not hear the heads beside it.
    silent = np.array([name == "gpt_neox" and way.receivers == (mlp(0, position),) for way, _ in asked])
    assert np.abs(effects[silent]).max(initial=0) < TOLERANCE
    assert (np.abs(effects[~silent]) > 10 * TOLERANCE).mean() > 0.8


# --- against the oracle, with answers fed -----------------------------------------------------------------------------


class PathOracle(Oracle):
    """The oracle, which first runs the rows that values are taken from."""

    def values(self, rows: Sequence[Row], outcome: Outcome) -> np.ndarray:
        self._became: dict[tuple[Row, str, int, int], torch.Tensor] = {}
        for row in rows:
            for write in row.writes:
                if isinstance(write.value, Reached):
                    for answer in self._passes:
                        self._run(write.value.row, write.component, write.layer, answer)
        return super().values(rows, outcome)

    def _run(self, row: Row, component: str, layer: int, answer: int) -> None:
        """Keep what a component is in a row, before the row's own writes to it."""

        def look(tensor: torch.Tensor) -> torch.Tensor:
            self._became[row, component, layer, answer] = tensor[0].clone()
            return tensor

        hooks = [self._hook(component, layer, look)]
        hooks += [self._hold(write, 0, row.base, answer) for write in row.writes]
        self._forward(row.base, answer, 1, hooks)

    def _held_at(self, write: Write, number: int, own: torch.Tensor, columns: list[int]) -> torch.Tensor:
        if not isinstance(write.value, Reached):
            return super()._held_at(write, number, own, columns)
        token = unpacked(self._pair, write.value.row.base)[write.places[number]]
        became = self._became[write.value.row, write.component, write.layer, token.answers[0]]
        return became[token.index][columns]


class Chained(PathOracle):
    """The same, where such rows take values from others themselves."""

    def _run(self, row: Row, component: str, layer: int, answer: int) -> None:
        for write in row.writes:
            if isinstance(write.value, Reached):
                self._run(write.value.row, write.component, write.layer, answer)
        super()._run(row, component, layer, answer)


def fed(name: str, **lengths: Any) -> TokenPair:
    """A pair with the openings of `REFUSAL` behind its prompts."""
    return replace(token_pair(name, **lengths), openings=REFUSAL.openings)


def all_rows(model: Subject, pair: TokenPair, asked: Sequence[Way]) -> list[Row]:
    info = model.info
    return [way_row(pair, sender_row(pair, way.heads, base, info), way, info) for base in (0, 1) for way in asked]


@pytest.mark.parametrize("position", ["all", "last"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_paths_by_way_of_queries_keys_and_values(subject: Subjects, name: str, position: str) -> None:
    """What later heads receive by one of the three alone, and by all of them, of one head or of all."""
    model, pairs = subject(name), [fed("equal"), fed("unequal", edits=(3, 2))]
    sender, sets = (head(0, 1, position), head(0, 3, position)), [PROJECTED_HEADS, *((one,) for one in PROJECTED_HEADS)]
    asked = [
        Way(sender, tuple(Site(component, 2, position, units) for component in components))
        for units in ((), (1,))
        for components in sets
    ]
    rows = [row for pair in pairs for row in all_rows(model, pair, asked)]
    measured = model.compare(pairs, rows, REFUSAL, PathOracle)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.7


@pytest.mark.parametrize("position", ["all", "last"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_what_a_head_hears_by_each_input(subject: Subjects, name: str, position: str) -> None:
    """Keys and values that two heads share are passed on by one of them alone; all three are all that it hears."""
    model, pairs = subject(name), [fed("equal"), fed("unequal", edits=(3, 2))]
    sender, later = (head(0, 1, position), head(0, 3, position)), head(2, 1, position)
    by_input = list(inputs.ways_by_input(sender, later, model.info).values())
    together = Way(sender, tuple(site for way in by_input for site in way.receivers), (later,))
    rows = [row for pair in pairs for row in all_rows(model, pair, [*by_input, together])]
    measured = model.compare(pairs, rows, REFUSAL, Chained)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.7

    def values(way: Way) -> np.ndarray:
        return model.measure(pairs, [row for pair in pairs for row in all_rows(model, pair, [way])], REFUSAL)

    whole = values(Way(sender, (later,)))
    np.testing.assert_allclose(values(together), whole, rtol=0, atol=TOLERANCE)
    if name == "llama":  # else nothing would have to be left out
        assert np.abs(values(together._replace(onward=())) - whole).max() > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("position", ["all", "last"])
@pytest.mark.parametrize("name", [*KINDS, "olmo2", "mixtral"])
def test_paths_with_answers_fed(subject: Subjects, name: str, position: str) -> None:
    model, pairs = subject(name), [fed("equal"), fed("unequal", edits=(3, 2))]
    rows = [row for pair in pairs for row in all_rows(model, pair, ways(position))]
    measured = model.compare(pairs, rows, REFUSAL, PathOracle)
    assert measured.deviation < TOLERANCE
    assert measured.felt() > 0.7


def test_paths_of_a_hybrid(subject: Subjects) -> None:
    """Its middle layer has no heads; what it adds in attention's place is held."""
    model, pair, ends = subject("lfm2"), fed("pair"), (mlp(2), head(2, 0))
    asked = [Way((head(0, 1),)), *(Way((head(0, 1),), (site,)) for site in ends), Way((head(0, 1),), ends)]
    measured = model.compare([pair], all_rows(model, pair, asked), REFUSAL, PathOracle)
    assert measured.deviation < TOLERANCE
    assert measured.felt() == 1
    with pytest.raises(SiteError, match=r"layer 1 of .* has no attention_heads"):
        all_rows(model, pair, [Way((head(0, 1),), (head(1, 0),))])


def test_a_chain_of_rows(subject: Subjects) -> None:
    """A row may take a value from one that takes one itself."""
    model, pair = subject("llama"), fed("pair")
    first = sender_row(pair, [head(0, 1)], 0, model.info)
    (through,) = path_row(pair, first, [head(1, 2)], model.info).writes
    second = Row(pair.id, 0, (through, *(write for write in first.writes if write.layer > 1)))
    third = path_row(pair, second, [mlp(2)], model.info)
    assert third.sources == (first, second)

    # One that writes at fewer tokens runs from where the row begins that it takes from.
    at_last = Row(pair.id, 0, (Write("mlp_output", 2, pair.places("last")[0], (), Reached(first)),))
    assert at_last.start == first.start < pair.places("last").x0[0]
    for row in (third, at_last):
        measured = model.compare([pair], [row], REFUSAL, Chained)
        assert measured.deviation < TOLERANCE
        assert measured.felt() == 1


def test_budgets_and_order_change_no_value(subject: Subjects) -> None:
    model, pairs = subject("llama"), [fed("one"), fed("two", before=5), fed("three", edits=(3, 2))]
    rows = [row for pair in pairs for row in all_rows(model, pair, ways("all"))]
    together = model.measure(pairs, rows, REFUSAL)
    (job,) = model.plan(pairs, rows, REFUSAL)
    batches = [batch for context in job.contexts for batch in context.payload["batches"]]
    assert len(batches) < len(rows) / 10
    for budget in ({"job_flops": 1.0, "batch_bytes": 1.0}, {"job_flops": 3e6, "batch_bytes": 5e4}):
        jobs = model.plan(pairs, rows, REFUSAL, **budget)
        assert len(jobs) > 3
        assert {key for one in jobs for key in one.keys} == set(job.keys)
        np.testing.assert_allclose(model.measure(pairs, rows, REFUSAL, **budget), together, rtol=0, atol=1e-5)
    # A row alone brings along the one that it takes values from.
    alone = [model.measure(pairs, [row], REFUSAL)[0] for row in rows[:10]]
    np.testing.assert_allclose(alone, together[:10], rtol=0, atol=1e-5)


def test_a_key_hangs_on_the_row_that_a_value_is_taken_from(subject: Subjects) -> None:
    model, pair = subject("llama"), fed("pair")
    keys = model.keys([pair], REFUSAL)
    rows = all_rows(model, pair, [Way((head(0, number),), (mlp(2),)) for number in (0, 1)])
    assert len({keys(row) for row in rows}) == 4


# --- what cannot be asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (Way((mlp(0),)), "begin at attention_heads, not at mlp_output"),
        (Way(()), "begin at attention_heads, not at no site"),
        (Way((head(0, 1, "edit"),)), "one position of last, all, not at edit"),
        (Way((head(0, 1), head(1, 1, "last"))), "not at all, last"),
        (Way((head(1, 1),), (mlp(0),)), "mlp_output of layer 0 lies below layer 1"),
        (Way((head(0, 1),), (mlp(2, "last"),)), "is not at the position of the heads"),
        (Way((head(0, 1),), (Site("attention_output", 2, "all"),)), "not of attention_output"),
    ],
)
def test_paths_that_are_none_are_refused(subject: Subjects, way: Way, said: str) -> None:
    with pytest.raises(SiteError, match=said):
        all_rows(subject("llama"), token_pair("pair"), [way])


def test_parts_of_a_mixture_are_not_taken_from_another_row() -> None:
    other = Row("pair", 0, (Write("mlp_output", 0, (3,), (), Source(1, (3,))),))
    with pytest.raises(SiteError, match="take mlp_output, of which it is a part"):
        Write("expert_output", 1, (3,), (0,), Reached(other))


def test_answers_are_not_sampled_from_such_rows(subject: Subjects) -> None:
    model, pair = subject("llama"), bare(token_pair("pair"))
    _, row = all_rows(model, pair, [Way((head(0, 1),), (mlp(2),))])
    setting, budget = Setting(model.info, "float32", REFUSAL), Budget(lambda: 1e18, 1e18)
    with pytest.raises(SiteError, match="answers are sampled from every row by itself"):
        list(plan_samples([row], {pair.id: pair}, Manner(1, 1), 0, setting, budget))


# --- questions to a lab -----------------------------------------------------------------------------------------------


@pytest.fixture
def lab(subject: Subjects, tmp_path: Path) -> Lab:
    """Pairs of several lengths on a tiny model of random weights."""
    pairs = tuple(token_pair(f"p{before}", before=before, edits=(1, 1), post=3) for before in range(3, 15))
    model = subject("llama")
    config = StudyConfig(model=model.info.name, outcome="logit_diff", logit_diff={"plus": ["a"], "minus": ["b"]})
    return Lab(Study(config, model.info, LOGIT_DIFF, pairs, ()), Store(tmp_path), Counting(model.backend))


def test_all_heads_of_a_layer_act_directly_as_its_attention_does(lab: Lab) -> None:
    """By another program, which runs no layer."""
    pairs = lab.pairs()
    for layer in range(3):
        found = lab.through([Way((Site("attention_heads", layer, "last"),))], pairs)
        expected = lab.direct([[Site("attention_output", layer, "last")]], pairs)
        np.testing.assert_allclose(found.nie, expected.nie, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(found.tie, expected.tie, rtol=0, atol=TOLERANCE)
        assert np.abs(expected.nie).mean() > 0.01


def test_rows_that_others_take_from_are_stored_once(lab: Lab) -> None:
    pairs, first, later = lab.pairs(), Way((head(0, 1),)), Way((head(0, 1),), (mlp(2),))
    whole = lab.through([first, later], pairs)
    backend = lab._backend
    assert isinstance(backend, Counting)
    assert backend.rows == 2 * 2 * len(pairs)
    again = lab.through([later], pairs)
    np.testing.assert_array_equal(again.nie[0], whole.nie[1])
    assert backend.rows == 2 * 2 * len(pairs)
    lab.through([Way((head(0, 1),), (mlp(1),))], pairs)  # takes from rows that are stored, and run again
    np.testing.assert_array_equal(lab.through([first], pairs).nie[0], whole.nie[0])
    assert backend.rows == 4 * 2 * len(pairs)


def test_a_row_that_runs_in_several_batches_of_a_job_is_kept_once(lab: Lab, tmp_path: Path) -> None:
    lab._runner._batch_bytes = 1.0  # every row is a batch of its own, with the one that it takes from
    pairs, heads = lab.pairs(), (head(0, 1),)
    lab.through([Way(heads), *(Way(heads, (mlp(layer),)) for layer in range(3))], pairs)
    (readout,) = (tmp_path / "readouts").glob("*.npz")
    keys = np.load(readout)["keys"].tolist()
    assert len(keys) == len(set(keys)) == 2 * len(pairs) * (1 + 4)


def test_what_is_passed_on_is_a_part_of_the_sender_s_effect(lab: Lab) -> None:
    few, sender = lab.pairs("discovery"), ask.Sender("head 0.1", (head(0, 1),))
    found = ask.measure_receivers(lab, sender, few)
    own = lab.joint([sender.heads], few)
    modules = [mlp(0), mlp(1), mlp(2), Site("attention_heads", 1, "all"), Site("attention_heads", 2, "all")]
    assert found.receivers[:5] == modules
    assert found.receivers[5:] == [head(layer, number) for layer in (1, 2) for number in range(4)]
    for site, (nie, tie, both) in zip(found.receivers, found.parts, strict=True):
        one = lab.through([Way(sender.heads, (site,))], few)
        assert nie == pytest.approx(one.nie.mean() / own.nie.mean())
        assert tie == pytest.approx(one.tie.mean() / own.tie.mean())
        assert both == pytest.approx((one.nie + one.tie).mean() / (own.nie + own.tie).mean())


def test_amplifiers_are_single_heads_and_mlps_that_pass_on_enough() -> None:
    receivers = [mlp(1), mlp(2), mlp(3), Site("attention_heads", 2, "all"), head(2, 0), head(2, 1)]
    parts = np.array([[0.0, 0.0, both] for both in (0.2, 0.099, np.nan, 0.9, 0.3, -0.5)])
    assert ask.Received(receivers, parts, 12).amplifiers == [head(2, 0), mlp(1)]
    many = [head(layer, 0) for layer in range(9)]
    assert len(ask.Received(many, np.full((9, 3), 0.5), 12).amplifiers) == ask.MOST_AMPLIFIERS


def test_the_gate_is_the_head_of_which_most_goes_onward(lab: Lab) -> None:
    few, heads = lab.pairs("discovery"), tuple(Site("attention_heads", layer, "all") for layer in range(3))
    single, together = ask.senders(lab, heads, few)
    assert together == ask.Sender(ask.TOGETHER, heads)
    onward, whole_effects = {}, {}
    for site in (head(layer, number) for layer in range(3) for number in range(4)):
        whole, direct = lab.joint([[site]], few), lab.through([Way((site,))], few)
        sign = np.sign(whole.te.mean())
        onward[site] = sign * ((whole.nie - direct.nie).mean() + (whole.tie - direct.tie).mean())
        whole_effects[site] = sign * (whole.nie + whole.tie).mean()
    strongest = max(whole_effects, key=lambda site: whole_effects[site])
    assert onward[strongest] < max(onward.values())  # so that it matters what goes onward
    assert single.heads == (max(onward, key=lambda site: onward[site]),)
    assert ask.senders(lab, (head(1, 2),), few) == [ask.Sender("head 1.2", (head(1, 2),))]


def test_others_are_as_many_heads_of_the_same_layers(lab: Lab) -> None:
    info, sender = lab.study.info, ask.Sender("it", (Site("attention_heads", 0, "all", (0, 3)), head(2, 1)))
    drawn = ask.others(sender, info, np.random.default_rng(0))
    assert sorted(set(drawn)) == sorted(drawn)
    assert {site.units for one in drawn for site in one if site.layer == 0} == {(1, 2)}
    assert {site.units for one in drawn for site in one if site.layer == 2} == {(0,), (2,), (3,)}
    whole = ask.Sender("it", (Site("attention_heads", 0, "all", (0, 1, 2)),))
    assert ask.others(whole, info, np.random.default_rng(0)) == []


def test_other_heads_send_by_the_same_amplifiers(lab: Lab) -> None:
    heldout, sender, amplifiers = Sample.of(lab, "heldout"), ask.Sender("it", (head(0, 1),)), [mlp(1), head(2, 0)]
    found = ask.others_by_way(heldout, sender, amplifiers)
    sets = ask.others(sender, lab.study.info, lab.rng("headpaths: it"))
    assert sorted(site.units for (site,) in sets) == [(0,), (2,), (3,)]
    for number, one in enumerate(sets):
        whole = lab.joint([one], heldout.pairs)
        passed_on = lab.through([Way(one, tuple(amplifiers))], heldout.pairs)
        assert found[ask.WHOLE][number] == pytest.approx([whole.nie.mean(), whole.tie.mean()])
        assert found[ask.AMPLIFIERS][number] == pytest.approx([passed_on.nie.mean(), passed_on.tie.mean()])


def test_shared_keys_and_values_are_those_of_the_group(subject: Subjects) -> None:
    """Two heads read each of them in one family, one in the other; a third makes them anew in every pass."""
    senders, later = (head(0, 1),), head(2, 3)
    shared = inputs.ways_by_input(senders, later, subject("llama").info)
    assert list(shared) == ["its query", "its keys", "its values"]
    query, keys, values = shared.values()
    assert query == Way(senders, (Site("query_heads", 2, "all", (3,)),))
    assert keys == Way(senders, (Site("key_heads", 2, "all", (1,)),), (later,))
    assert values == Way(senders, (Site("value_heads", 2, "all", (1,)),), (later,))
    assert inputs.not_apart(subject("llama").info) == ""
    own = inputs.ways_by_input(senders, later, subject("gpt_neox").info)
    assert [way.receivers[0].units for way in own.values()] == [(3,)] * 3
    assert not any(way.onward for way in own.values())
    latent = replace(subject("llama").info, family="deepseek_v3")
    assert inputs.ways_by_input(senders, later, latent) == {}
    assert "deepseek_v3 has no query_heads, key_heads, value_heads" in inputs.not_apart(latent)
    assert "gate" in inputs.not_apart(subject("qwen3_5_text").info)


def test_inputs_of_later_heads_are_ways_of_the_sender(lab: Lab) -> None:
    heldout, sender, later = Sample.of(lab, "heldout"), ask.Sender("it", (head(0, 1),)), [head(1, 0), head(2, 3)]
    found = ask.by_input(heldout, sender, later)
    ways = {
        "head 1.0, its query": Way(sender.heads, (Site("query_heads", 1, "all", (0,)),)),
        "head 1.0, its keys": Way(sender.heads, (Site("key_heads", 1, "all", (0,)),), (head(1, 0),)),
        "head 1.0, its values": Way(sender.heads, (Site("value_heads", 1, "all", (0,)),), (head(1, 0),)),
        "head 2.3, its query": Way(sender.heads, (Site("query_heads", 2, "all", (3,)),)),
        "head 2.3, its keys": Way(sender.heads, (Site("key_heads", 2, "all", (1,)),), (head(2, 3),)),
        "head 2.3, its values": Way(sender.heads, (Site("value_heads", 2, "all", (1,)),), (head(2, 3),)),
    }
    assert list(found) == list(ways)
    expected = lab.through(list(ways.values()), heldout.pairs)
    np.testing.assert_allclose([effect.nie.harm for effect in found.values()], expected.nie, rtol=0, atol=1e-5)
    np.testing.assert_allclose([effect.tie.harm for effect in found.values()], expected.tie, rtol=0, atol=1e-5)
    assert ask.by_input(heldout, sender, []) == {}


# --- what is said -----------------------------------------------------------------------------------------------------

PAIRS = 24
TE = 6 + np.linspace(-0.5, 0.5, PAIRS)
NOISE = 0.02 * np.cos(np.arange(PAIRS))  # sums to nearly 0, and is not in step with TE


def found(
    own: tuple[float, float] = (0.6, 0.6),
    through: tuple[float, float] | None = (0.8, 0.8),
    straight: float = 0.1,
    others: Sequence[float] | None = (0.1,) * 20,
    pairs: int = PAIRS,
    sign: float = 1.0,
) -> ask.Followed:
    """Own effects as shares of TE, ways as parts of these; other heads by the amplifiers as parts of the sender's."""
    te = sign * TE[:pairs]
    noise = NOISE[:pairs] if pairs == PAIRS else NOISE[:pairs] - NOISE[:pairs].mean()

    def effect(*shares: float) -> Effect:
        return Effect(*(Both(share * te + noise, noise) for share in shares))

    whole = effect(*own)
    named = {ask.WHOLE: whole, ask.ANSWER: effect(*(straight * share for share in own))}
    if through is not None:
        named[ask.AMPLIFIERS] = effect(*(part * share for part, share in zip(through, own, strict=True)))
    paths = {name: ask.Path(name, one) for name, one in named.items()}
    if others is not None and through is not None:
        means = np.array([[part * share * te.mean() for share in own] for part in others])
        paths[ask.AMPLIFIERS] = paths[ask.AMPLIFIERS]._replace(others=means)
    parts = np.array([[0.5, 0.5, 0.5 if through is not None else 0.01]])
    clusters = np.array([f"c{pair}" for pair in range(pairs)])
    bench = Bench(Both(te, 0.1 * te), clusters, 12, seed=0, resamples=199)
    return ask.Followed(ask.Sender("head 3.1", (head(3, 1),)), ask.Received([mlp(5)], parts, 12), paths, bench)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "gate"),
        ({"sign": -1.0}, "gate"),
        ({"others": (0.9,) + (0.1,) * 19}, "gate"),
        ({"others": (0.9,) * 2 + (0.1,) * 18}, "undecided"),
        ({"others": (0.9,) * 2 + (0.1,) * 18, "sign": -1.0}, "undecided"),
        ({"others": None}, "undecided"),
        ({"through": (0.8, 0.3)}, "no gate"),
        ({"through": (0.3, 0.8)}, "no gate"),
        ({"through": (0.8, 0.5)}, "undecided"),
        ({"through": None}, "no gate"),
        ({"through": (0.3, 0.3), "pairs": 14}, "undecided"),
        ({"through": None, "pairs": 14}, "undecided"),
        ({"own": (0.0, 0.6)}, "undecided"),
    ],
)
def test_a_gate_sends_most_through_its_amplifiers_as_few_others_do(given: dict[str, Any], said: str) -> None:
    ruling = ask.ruled(found(**given))
    assert ruling.said == said
    assert "nan" not in ruling.why


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"its query": (0.9, 0.9), "its keys": (0.1, 0.1)}, "head 5.2 by its query (its query NIE 90% ["),
        ({"its keys": (0.6, 0.8), "its values": (0.7, 0.6)}, "head 5.2 by its keys and its values ("),
        ({"its query": (0.9, 0.5), "its keys": (0.4, 0.4)}, "head 5.2 by none of the three clearly ("),
        ({}, ""),
    ],
)
def test_a_head_hears_by_what_passes_on_most(shares: dict[str, Any], said: str, subject: Subjects) -> None:
    """Of what goes by the head, which is 0.8 of the sender's own."""
    one, info = found(through=(0.8, 0.8)), subject("llama").info
    by_head = one.paths[ask.AMPLIFIERS].effect
    ways = {
        f"head 5.2, {name}": Effect(*(by_head.times(part)[side] for side, part in enumerate(parts)))
        for name, parts in shares.items()
    }
    later = replace(one, received=one.received._replace(receivers=[head(5, 2)]))
    named = {"head 5.2": by_head, **ways}
    later = replace(later, paths=one.paths | {name: ask.Path(name, effect) for name, effect in named.items()})
    assert ask.step_row(later, info)["inputs"].startswith(said)
    assert ask.step_row(one, info)["inputs"] == ""  # its amplifier is an MLP
    latent = replace(info, family="deepseek_v2")
    assert "by which input a head hears is not told apart" in ask.step_row(later, latent)["inputs"]


def test_tables_hold_the_numbers_of_every_way(subject: Subjects) -> None:
    one = found(others=(0.9, 0.1, 0.1))
    rows = pd.DataFrame(ask.path_rows(one), columns=list(ask.PATH_COLUMNS))
    assert rows["path"].tolist() == [name for name in (ask.WHOLE, ask.ANSWER, ask.AMPLIFIERS) for _ in (0, 1)]
    assert rows["part"].to_numpy() == pytest.approx([1, 1, 0.1, 0.1, 0.8, 0.8], abs=0.01)
    assert rows["harm"].to_numpy() == pytest.approx([0.6, 0.6, 0.06, 0.06, 0.48, 0.48], abs=0.01)
    assert rows["placebo"].to_numpy() == pytest.approx([0] * 6, abs=0.01)
    assert rows["reached"].dropna().tolist() == [1, 1]
    assert rows["drawn"].dropna().tolist() == [3, 3]
    step = ask.step_row(one, subject("llama").info)
    assert (step["heads"], step["amplifiers"]) == ("3.1", "MLP 5")
    (receiver,) = ask.receiver_rows(one)
    assert receiver["chosen"]
    assert receiver["head"] is None


# --- a whole study ----------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path, subject: Subjects, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """Of twelve heads three are the fewest."""
    monkeypatch.setattr(sets, "FEW_HEADS", 0.25)
    monkeypatch.setattr(sets, "fewest_heads", lambda *_: 3)
    return placebo_study(tmp_path, subject("llama_chat").info.name, analyses=["rivals", "headpaths"])


@pytest.fixture
def measured(study: StudyConfig, subject: Subjects, tmp_path: Path) -> tuple[Result, Store, Counting]:
    backend, store = Counting(subject("llama_chat").backend), Store.create(tmp_path / "run", study.identity())
    return run_study(study, backend, store), store, backend


Measured = tuple[Result, Store, Counting]


def test_tables_report_and_a_rebuild_without_a_model(measured: Measured) -> None:
    result, store, _ = measured
    for name, columns in HEADPATHS.columns.items():
        assert list(result.tables[name]) == list(columns)
        assert len(result.tables[name])
    assert result.tables["two_step.csv"]["sender"].tolist()[-1] == ask.TOGETHER
    assert "## Head paths" in write_report(store, result).read_text("utf-8")
    again = reread(store)
    for name in HEADPATHS.columns:
        pd.testing.assert_frame_equal(again.tables[name], result.tables[name])


def test_it_costs_no_more_than_planned(measured: Measured, study: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "matmul_rate", lambda _: 1e10)
    _, _, backend = measured
    planned = estimate(study)
    more = sum(one.rows for one in planned.later.values())
    assert planned.later["headpaths"].rows
    assert planned.rows <= backend.rows <= planned.rows + more
    assert backend.flops <= planned.flops
    assert 4 * backend.numbers <= planned.down


def test_a_run_from_before_inputs_were_asked_for_is_read_as_it_was(
    study: StudyConfig, subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(tmp_path / "run", study.identity())
    with monkeypatch.context() as before:
        before.setattr(ask, "by_input", lambda *_: {})
        old = run_study(study, subject("llama_chat").backend, store)
    again = reread(store)
    for name in HEADPATHS.columns:
        pd.testing.assert_frame_equal(again.tables[name], old.tables[name])
    assert old.tables["two_step.csv"]["amplifiers"].str.contains("head ").any()


def test_a_later_head_takes_a_row_for_each_input_and_one_for_each_that_is_shared(
    study: StudyConfig, subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(tmp_path / "run", study.identity())
    planned = prepared_lab(study, subject("llama_chat").backend, store).study
    before = own_cost.cost(planned).rows
    monkeypatch.setattr(own_cost, "MOST_AMPLIFIERS", ask.MOST_AMPLIFIERS + 1)
    heldout = [name for name, split in planned.splits().items() if split == "heldout"]
    both = len(heldout) + sum(pair.id in map(placebo_id, heldout) for pair in planned.placebos)
    assert own_cost.cost(planned).rows - before == 2 * 2 * both * (1 + 1 + 2 + 2)


def test_the_section_begins_with_what_was_found(measured: Measured) -> None:
    result = measured[0]
    te = replace(result.summary.total, value=3.0, low=2.0, high=4.0)
    result = replace(result, summary=replace(result.summary, total=te))
    (section,) = show.sections(result)
    first = result.tables["two_step.csv"].iloc[0]
    assert section.finding.startswith(f"{first['sender'].capitalize()}: {first['said']} (")
    assert section.brief.count(";") == len(result.tables["two_step.csv"]) - 1
    rivals = result.tables["rivals.csv"].set_index("rival")["said"]
    assert section.brief.endswith(f"that of the rival claim: {rivals['head gate']}.")
    named = [cell for row in section.tables[-1].rows for cell in row[1:2]]
    assert any(name.startswith("head ") for name in named)
    assert not any(name.endswith(".0.0") or name.count(".") > 1 for name in named)
    assert [table.header[0] for table in section.tables][-1] == "sender"
    assert len(section.tables) == len(result.tables["two_step.csv"]) + 1
    assert section.markdown()

    shown = result.tables["head_paths.csv"].assign(part=0.5, part_low=0.4, part_high=0.6)
    (drawn,) = show.sections(replace(result, tables={**result.tables, "head_paths.csv": shown}))
    assert drawn.figure is not None
    assert [axis.get_title(loc="left") for axis in drawn.figure.axes] == [
        f"{sender}, by way of" for sender in result.tables["two_step.csv"]["sender"]
    ]
    undefined = shown.assign(part=np.nan, part_low=np.nan, part_high=np.nan)
    (bare_section,) = show.sections(replace(result, tables={**result.tables, "head_paths.csv": undefined}))
    assert bare_section.figure is None


def test_without_rivals_there_are_no_heads(measured: Measured) -> None:
    result = replace(measured[0], tables={})
    assert show.sections(result)[0].finding.startswith("Not measured yet")
    config = result.study.config.model_copy(update={"analyses": ["headpaths"]})
    alone = replace(result, study=replace(result.study, config=config))
    assert show.sections(alone)[0].finding == show.NO_HEADS
    assert own_cost.cost(alone.study).rows == 0


# --- planted ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heads-to-gate", "late-head"])
def test_planted_ways_are_found(name: str, tmp_path: Path) -> None:
    """Heads that carry the word to neurons of one late layer act by way of its MLP, a late head straight."""
    specimen = build(CASES[name], 0)
    study = written(specimen, tmp_path, 0).model_copy(update={"analyses": ["rivals", "headpaths"]})
    result = run_study(study, LocalBackend.load(study.model), Store.create(tmp_path / "run", study.identity()))
    paths = result.tables["head_paths.csv"].set_index(["sender", "path"])
    for step in result.tables["two_step.csv"].to_dict("records"):
        straight, whole = paths.loc[(step["sender"], ask.ANSWER)], paths.loc[(step["sender"], ask.WHOLE)]
        if name == "late-head":
            assert step["said"] == "no gate"
            assert straight["part_low"].min() > 0.8
            assert whole["harm_low"].min() > 0.5
            continue
        ((gate, _), *_) = specimen.gates
        assert step["said"] == "gate"
        assert step["amplifiers"].split(", ")[0] == f"MLP {gate}"
        assert paths.loc[(step["sender"], f"MLP {gate}")]["part_low"].min() > 0.8
        assert straight["part_high"].abs().max() < 0.1


GATE, AMPLIFIER = Planted(5, (1,)), Planted(9, (2,))
HEARD = {"moved": 1.0, "const": 0.5}
"""What the first head says, from 0 to 1."""


def two_heads(bed: Bed, by: str = "its values") -> None:
    """One head brings the word to the tokens behind it, the noun's own among them; a later one hears it by one input.

    By its values it reads what the noun has of it. By the other two it reads the noun itself: of its query hangs
    whether it looks there, of its keys, whether there is something to look at.
    """
    layers = bed.model.model.layers
    write_head(layers[GATE.layer].self_attn, GATE, bed.stream, {"word": 1.0}, bed.stream.write("moved"))
    attention, read = layers[AMPLIFIER.layer].self_attn, partial(bed.stream.read, AMPLIFIER.layer)
    hears = {"moved": 1.0} if by == "its values" else {"noun": 1.0}
    write_head(attention, AMPLIFIER, bed.stream, hears, bed.stream.write("answer"))
    slowest = 3 * attention.head_dim - 1
    strength = attention.q_proj.weight[slowest].norm() / read({"const": 1.0}).norm()
    if by == "its query":
        attention.q_proj.weight[slowest] = strength * read(HEARD)
    if by == "its keys":
        attention.k_proj.weight[slowest] = read({"noun": 0.5, "moved": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("by", inputs.INPUTS)
def test_a_planted_head_hears_by_one_input(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "fewest_heads", lambda *_: 2)  # the later one alone may carry all
    plant = partial(two_heads, by=by)
    specimen = build(Case("two-heads", "a head to a head", plant, _as_word, ("",) * 5), 0)
    study = written(specimen, tmp_path, 0).model_copy(update={"analyses": ["rivals", "headpaths"]})
    store = Store.create(tmp_path / "run", study.identity())
    result = run_study(study, LocalBackend.load(study.model), store)
    step, paths = result.tables["two_step.csv"].iloc[0], result.tables["head_paths.csv"].set_index(["sender", "path"])
    assert (step["sender"], step["amplifiers"], step["said"]) == ("head 5.1", "head 9.2", "gate")
    assert step["inputs"].startswith(f"head 9.2 by {by} (")
    (section,) = show.sections(result)
    assert f"Heard by input: head 9.2 by {by} (" in section.finding
    for name in inputs.INPUTS:
        part = paths.loc[("head 5.1", f"head 9.2, {name}")]
        assert part["part_low"].min() > 0.8 if name == by else part["part_high"].abs().max() < 0.2


@pytest.mark.slow
def test_a_planted_head_acts_by_way_of_a_later_head(tmp_path: Path) -> None:
    specimen = build(Case("two-heads", "a head to a head", two_heads, _as_word, ("",) * 5), 0)
    study = written(specimen, tmp_path, 0)
    lab = prepared_lab(study, LocalBackend.load(study.model), Store.create(tmp_path / "run", study.identity()))
    heldout, gate, amplifier = Sample.of(lab, "heldout"), head(5, 1), head(9, 2)
    received = ask.measure_receivers(lab, ask.Sender("gate", (gate,)), lab.pairs("discovery")[:6])
    assert received.amplifiers == [amplifier]
    tested = ask.measure_ways(heldout, ask.Sender("gate", (gate,)), received)
    assert ask.ruled(tested).said == "gate"
    assert min(part.low for part in tested.parts(ask.AMPLIFIERS)) > 0.9
    assert max(abs(part.high) for part in tested.parts(ask.ANSWER)) < 0.1
    late = ask.Sender("amplifier", (amplifier,))
    straight = ask.measure_ways(heldout, late, ask.measure_receivers(lab, late, lab.pairs("discovery")[:6]))
    assert ask.ruled(straight).said == "no gate"
    assert min(part.low for part in straight.parts(ask.ANSWER)) > 0.8
