"""Jobs and their names: how rows are cut, what a key depends on, and what a row costs."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import INFO, LOGITS, LOGPROBS, token_pair
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from remote_mediation.engine.budget import (
    DEFAULT_BATCH,
    LIBRARIES,
    SMALLEST_BATCH,
    Budget,
    Setting,
    base_flops,
    batch_budget,
    held_bytes,
    layer_flops,
    row_bytes,
    row_flops,
    run_from,
    weight_bytes,
)
from remote_mediation.engine.jobs import Job, Keys, batch_sizes, plan_jobs
from remote_mediation.engine.rows import Constant, Row, Scale, Source, Value, Write, swap
from remote_mediation.errors import SettingsError
from remote_mediation.models import info_of, load_info
from remote_mediation.outcomes import LogitOutcome
from remote_mediation.sites import Site
from remote_mediation.tokens import TokenPair

PLENTY = 1e18
SETTING = Setting(INFO, "float32", LOGITS)
PAIRS = (token_pair("a"), token_pair("b", x0=(1, 2, 3, 4, 6), x1=(1, 2, 9, 4, 6)))


def swaps(pair: TokenPair, component: str = "mlp_output", position: str = "all", layers: int = 6) -> list[Row]:
    sites = [Site(component, layer, position) for layer in range(layers)]
    return [swap(pair, site, base, INFO) for site in sites for base in (0, 1)]


def plan(
    rows: Iterable[Row],
    pairs: Sequence[TokenPair] = PAIRS,
    setting: Setting = SETTING,
    job_flops: float = PLENTY,
    batch_bytes: float = PLENTY,
) -> list[Job]:
    budget = Budget(lambda: job_flops, batch_bytes)
    return list(plan_jobs(rows, {pair.id: pair for pair in pairs}, setting, budget, Keys(setting, pairs)))


ROWS = [row for pair in PAIRS for position in ("all", "edit", "last") for row in swaps(pair, position=position)]


OTHER = token_pair("c", x0=(1, 2, 3, 4, 5, 6), x1=(1, 2, 9, 4, 5, 6))  # a token longer
UNEQUAL = token_pair("d", x0=(1, 2, 3, 4, 5), x1=(1, 2, 9, 9, 4, 5))


def bases(*sides: tuple[str, int]) -> tuple[Row, ...]:
    return tuple(Row(pair, side) for pair, side in sides)


def rows_of(jobs: Iterable[Job]) -> list[Row]:
    """Rows with writes."""
    return [row for job in jobs for context in job.contexts for row in context.rows if row.writes]


def test_one_job_holds_everything_that_fits() -> None:
    (job,) = plan(ROWS)
    assert job.pairs == ("a", "b")
    assert job.rows == len(ROWS) == 72
    assert len(job.keys) == 72 + 2 * len(PAIRS)


def test_a_batch_is_one_first_token_of_all_pairs_of_a_shape_lower_layers_first() -> None:
    (context,) = plan(ROWS)[0].contexts
    (stack,), batches = context.payload["stacks"], context.payload["batches"]
    assert stack["ids"] == (PAIRS[0].x0, PAIRS[1].x0, PAIRS[0].x1, PAIRS[1].x1)
    # `all` and `edit` begin at the third token, `last` at the fifth.
    assert [(batch["start"], batch["low"]) for batch in batches] == [(2, 0), (4, 0)]
    assert [batch["joining"] for batch in batches] == [((0, 2) * 2 + (1, 3) * 2,) * 6, ((0, 2, 1, 3),) * 6]
    assert [row.low for row in context.rows if row.writes] == [
        low for count in (8, 4) for low in range(6) for _ in range(count)
    ]
    (late,) = plan([row for row in swaps(PAIRS[0]) if row.low >= 4])
    assert [(batch["low"], batch["joining"]) for batch in late.contexts[0].payload["batches"]] == [(4, ((0, 1),) * 2)]


def test_pairs_of_other_lengths_do_not_mix() -> None:
    pairs = (*PAIRS, OTHER, UNEQUAL)
    (job,) = plan([row for pair in pairs for row in swaps(pair)], pairs)
    assert [context.pairs for context in job.contexts] == [("a", "b"), ("d",), ("c",)]
    unequal = job.contexts[1].payload
    assert [stack["ids"] for stack in unequal["stacks"]] == [(UNEQUAL.x0,), (UNEQUAL.x1,)]
    assert [(batch["stack"], batch["joining"]) for batch in unequal["batches"]] == [(0, ((0,),) * 6), (1, ((0,),) * 6)]
    # Each row takes what it writes from the other stack.
    sources = [batch["writes"][0][0][1][0][4][:2] for batch in unequal["batches"]]
    assert sources == [(1, 0), (0, 0)]
    answered = [replace(PAIRS[0], answers=((1, 2), (3,))), replace(PAIRS[1], answers=((1,), (2, 3)))]
    (job,) = plan([row for pair in answered for row in swaps(pair)], answered, Setting(INFO, "float32", LOGPROBS))
    assert [context.pairs for context in job.contexts] == [("b",), ("a",)]


def test_keys_and_rows_of_a_part_belong_together() -> None:
    pairs = (*PAIRS, UNEQUAL)
    keys = Keys(SETTING, pairs)
    (job,) = plan([row for pair in pairs for row in swaps(pair)], pairs)
    for context in job.contexts:
        assert context.keys == tuple(map(keys, context.rows))
    equal, unequal = (context.rows for context in job.contexts)
    assert equal[:4] == bases(("a", 0), ("b", 0), ("a", 1), ("b", 1))
    assert unequal[:2] == bases(("d", 0), ("d", 1))


def test_repeated_rows_are_measured_once_and_bare_ones_with_their_pair() -> None:
    (job,) = plan([*ROWS, *ROWS, Row("a", 0), Row("b", 1)])
    assert job.rows == 72
    assert plan([]) == []


def test_bare_rows_asked_for_alone_are_the_base_prompts_of_their_pair() -> None:
    (job,) = plan([Row("a", 0), Row("a", 0), Row("b", 1)])
    assert job.rows == 0
    assert [context.rows for context in job.contexts] == [bases(("a", 0), ("b", 0), ("a", 1), ("b", 1))]
    assert job.contexts[0].payload["batches"] == ()
    assert job.flops == sum(base_flops(pair, SETTING) for pair in PAIRS)
    assert len(plan([Row("a", 0), Row("b", 0)], job_flops=1.0)) == 2


def test_every_part_begins_with_the_base_prompts_of_its_pairs() -> None:
    for job_flops in (PLENTY, 2e5, 1.0):
        for context in (context for job in plan(ROWS, job_flops=job_flops) for context in job.contexts):
            begin = context.rows[: 2 * len(context.pairs)]
            assert begin == bases(*((name, side) for side in (0, 1) for name in context.pairs))
            assert {row.pair for row in context.rows} == set(context.pairs)


@pytest.mark.parametrize("batch_bytes", [PLENTY, 1e5, 1.0])
@pytest.mark.parametrize("job_flops", [PLENTY, 1.1e6, 2e5, 1.0])
def test_budgets_cut_jobs_and_lose_nothing(job_flops: float, batch_bytes: float) -> None:
    jobs = plan(ROWS, job_flops=job_flops, batch_bytes=batch_bytes)
    assert Counter(rows_of(jobs)) == Counter(ROWS)
    assert sum(job.rows for job in jobs) == 72
    batches = [batch for job in jobs for context in job.contexts for batch in context.payload["batches"]]
    if batch_bytes == 1.0:
        assert len(batches) == 72
    if job_flops == 1.0:
        assert len(jobs) == len(batches)
    for job in jobs:  # more than one batch only where they fit together, but for the base runs of a pair that is cut
        alone = len(job.pairs) == 1 and len(job.contexts[0].payload["batches"]) == 1
        assert alone or job.flops <= job_flops + base_flops(PAIRS[0], SETTING)


def test_a_job_is_as_many_pairs_as_fit() -> None:
    pairs = [token_pair(name) for name in "abcde"]
    rows = [row for pair in pairs for row in swaps(pair)]
    one = plan(swaps(pairs[0]), pairs)[0].flops
    for fitting, expected in ((1.0, "a b c d e"), (2.5, "ab cd e"), (3.0, "abc de"), (5.0, "abcde")):
        assert [job.pairs for job in plan(rows, pairs, job_flops=fitting * one)] == list(map(tuple, expected.split()))
    cut = plan(rows, pairs, job_flops=0.9 * one)
    assert {job.pairs for job in cut} == {(name,) for name in "abcde"}
    assert Counter(rows_of(cut)) == Counter(rows)
    # What does not fit beside the pair before, but in a job of its own, is not cut.
    longer = [row for pair in (*pairs[:2], OTHER) for row in swaps(pair)]
    assert [job.pairs for job in plan(longer, [*pairs, OTHER], job_flops=2.5 * one)] == [("a", "b"), ("c",)]


def test_pairs_go_together_while_their_base_runs_take_half_the_memory() -> None:
    pairs = [token_pair(name) for name in "abcd"]
    rows = [row for pair in pairs for row in swaps(pair)]
    need = held_bytes(pairs[:1], swaps(pairs[0]), SETTING) + 2 * row_bytes(pairs[0], 0, SETTING)
    for fitting, expected in ((0.5, "a b c d"), (1.0, "a b c d"), (2.9, "ab cd"), (3.0, "abc d"), (4.0, "abcd")):
        (job,) = plan(rows, pairs, batch_bytes=2 * fitting * need)
        assert [context.pairs for context in job.contexts] == list(map(tuple, expected.split()))


def test_what_base_runs_keep() -> None:
    """Keys and values of all tokens, and from the first token taken on the stream and the components taken."""
    size, layers, tokens = 4, INFO.layers, 5
    keyvalues, stream = 2 * INFO.kv_heads * INFO.d_head, INFO.d_model
    assert held_bytes(PAIRS[:1], [], SETTING) == 2 * size * layers * (tokens * keyvalues + 3 * stream)
    widths = {"mlp_output": INFO.d_model, "mlp_neurons": INFO.d_ff, "attention_heads": INFO.heads * INFO.d_head}
    for component, width in widths.items():
        rows = [swap(pair, Site(component, 3, "last", (0,)), 0, INFO) for pair in PAIRS]
        kept = 4 * size * layers * (tokens * keyvalues + 3 * (stream + width))
        assert held_bytes(PAIRS, rows, SETTING) == kept
    assert held_bytes(PAIRS, [], SETTING._replace(dtype="bfloat16")) * 2 == held_bytes(PAIRS, [], SETTING)


def test_batches_of_a_group_are_of_even_size() -> None:
    rows = swaps(PAIRS[0])[::2]
    room = held_bytes(PAIRS[:1], rows, SETTING) + 4.5 * row_bytes(PAIRS[0], 2, SETTING)
    batches = plan(rows, batch_bytes=room)[0].contexts[0].payload["batches"]
    assert [sum(map(len, batch["joining"])) for batch in batches] == [3, 3]


def test_the_job_budget_is_asked_anew_for_every_job() -> None:
    asked = []

    def budget() -> float:
        asked.append(len(asked))
        return 1.0

    pairs = {pair.id: pair for pair in PAIRS}
    jobs = plan_jobs(ROWS, pairs, SETTING, Budget(budget, PLENTY), Keys(SETTING, PAIRS))
    next(jobs)
    first = len(asked)
    next(jobs)  # the last of the first pair, whose size is known
    next(jobs)
    assert 0 < first < len(asked)


# --- names ------------------------------------------------------------------------------------------------------------

SITE = Site("mlp_neurons", 2, "all", (3, 4))
TEACHER_FORCED = Setting(INFO, "float32", LOGPROBS)
ANSWERED = token_pair("a", answers=((1, 2), (3, 4)))


def key(pair: TokenPair = ANSWERED, setting: Setting = TEACHER_FORCED, row: Row | None = None) -> str:
    return Keys(setting, [pair])(row or swap(pair, SITE, 0, INFO))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(replace(INFO, name="other"), "float32", LOGPROBS),
        Setting(replace(INFO, revision="r1"), "float32", LOGPROBS),
        Setting(replace(INFO, weights="w1"), "float32", LOGPROBS),
        Setting(INFO, "bfloat16", LOGPROBS),
        Setting(INFO, "float32", LOGITS),
        Setting(INFO, "float32", LogitOutcome((5,), (7,))),
        Setting(INFO, "float32", LogitOutcome((5, 6), (8,))),
    ],
)
def test_keys_depend_on_model_precision_and_outcome(setting: Setting) -> None:
    assert key(setting=setting) != key()


def test_settings_of_one_outcome_differ_from_each_other() -> None:
    outcomes = [LOGITS, LogitOutcome((5,), (7,)), LogitOutcome((5, 6), (8,)), LOGPROBS]
    assert len({key(setting=Setting(INFO, "float32", outcome)) for outcome in outcomes}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"x0": (1, 2, 3, 4, 7)},
        {"x1": (1, 2, 8, 4, 5)},
        {"answers": ((1, 3), (3, 4))},
        {"answers": ((1, 2), (3, 5))},
        {"answers": ((3, 4), (1, 2))},
        {"x0": ANSWERED.x1, "x1": ANSWERED.x0},
    ],
)
def test_keys_depend_on_tokens_and_answers(changes: dict[str, Any]) -> None:
    assert key(replace(ANSWERED, **changes)) != key()
    assert Keys(SETTING, [replace(ANSWERED, **changes)])(Row("a", 0)) != Keys(SETTING, [ANSWERED])(Row("a", 0))


def test_keys_do_not_depend_on_what_changes_no_value() -> None:
    assert key(replace(ANSWERED, cluster="other", category="other")) == key()
    assert key(replace(ANSWERED, id="z"), row=replace(swap(ANSWERED, SITE, 0, INFO), pair="z")) == key()


VALUES: tuple[Value, ...] = (
    Source(1, (2, 3)),
    Source(0, (2, 3)),
    Source(1, (3, 4)),
    Scale(0.0),
    Scale(0.5),
    Constant((1.0, 2.0)),
    Constant((1.0, 2.5)),
)
WRITE = Write("mlp_neurons", 2, (2, 3), (4, 5), VALUES[0])
DIFFERENT = (
    Row("a", 0),
    Row("a", 1),
    Row("a", 1, (WRITE,)),
    *(Row("a", 0, (replace(WRITE, value=value),)) for value in VALUES),
    Row("a", 0, (replace(WRITE, component="mlp_output"),)),
    Row("a", 0, (replace(WRITE, layer=3),)),
    Row("a", 0, (replace(WRITE, places=(2, 4)),)),
    Row("a", 0, (replace(WRITE, places=(2,), value=Source(1, (2,))),)),
    Row("a", 0, (replace(WRITE, columns=(4, 6)),)),
    Row("a", 0, (replace(WRITE, columns=()),)),
    Row("a", 0, (WRITE, replace(WRITE, layer=3))),
    Row("a", 0, (replace(WRITE, layer=3), WRITE)),
)


def test_keys_depend_on_everything_in_a_row() -> None:
    keys = Keys(SETTING, PAIRS)
    assert len({keys(row) for row in DIFFERENT}) == len(DIFFERENT)


def test_keys_are_stable() -> None:
    # A run folder of an earlier version is found again: change this only together with `plan.SCHEMA`.
    assert key() == "fda00bc54af99c85f1e0d0e7"


def test_order_of_rows_and_budgets_change_no_key() -> None:
    shuffled = [ROWS[index] for index in np.random.default_rng(0).permutation(len(ROWS))]
    plans = [plan(ROWS), plan(shuffled), plan(shuffled, job_flops=1.0, batch_bytes=1.0), plan(ROWS, job_flops=2e5)]
    keys = [{key for job in jobs for key in job.keys} for jobs in plans]
    assert keys[0] == keys[1] == keys[2] == keys[3]
    assert plan(ROWS)[0].id == plan(ROWS)[0].id
    assert plan(ROWS)[0].id != plan(ROWS[1:])[0].id


def test_payloads_are_plain_data() -> None:
    kinds: set[type] = set()

    def collect(data: Any) -> None:
        kinds.add(type(data))
        for item in data.values() if isinstance(data, dict) else data if isinstance(data, tuple) else ():
            collect(item)

    rows = [*ROWS, Row("a", 0, (replace(WRITE, value=Scale(0.5)), replace(WRITE, value=Constant((1.0, 2.0)))))]
    collect(plan(rows)[0].payload)
    assert kinds == {dict, tuple, range, str, int, float, bool, type(None)}


# --- costs ------------------------------------------------------------------------------------------------------------


def counted(model: PreTrainedModel, tokens: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        (
            "llama",
            {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 24,
            },
        ),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96}),
    ],
)
def test_operations_are_those_that_torch_counts(family: str, shape: dict[str, int]) -> None:
    config = AutoConfig.for_model(family, vocab_size=50, attn_implementation="eager", **shape)
    model, info, tokens = AutoModelForCausalLM.from_config(config).eval(), info_of(config, "m"), 40
    head = 2 * tokens * info.d_model * info.vocab
    assert 2 * layer_flops(info, tokens, tokens) + head == pytest.approx(counted(model, tokens), rel=0.01)
    matrices = sum(w.numel() for w in model.parameters() if w.dim() == 2)
    if family == "gpt2":  # its table of positions is no weight of a layer
        matrices -= config.n_positions * info.d_model
    assert weight_bytes(info, "float32") == pytest.approx(4 * matrices, rel=0.01)
    assert weight_bytes(info, "bfloat16") == weight_bytes(info, "float32") / 2


def test_a_row_costs_its_tokens_and_its_layers() -> None:
    pair = token_pair(answers=((1, 2, 3), (4, 5)))  # three answer tokens are fed, so four positions are read
    setting = Setting(INFO, "float32", LOGPROBS)
    head = 2 * 4 * INFO.d_model * INFO.vocab
    for position, tokens in (("all", 6), ("last", 4)):
        row = swap(pair, Site("mlp_output", 4, position), 0, INFO)
        assert row_flops(row, pair, setting) == 2 * layer_flops(INFO, tokens, 8) + head
    assert base_flops(pair, setting) == 2 * (6 * layer_flops(INFO, 8, 8) + head)


def test_a_row_runs_from_its_first_write_but_reads_the_answer() -> None:
    pair = token_pair(answers=((1, 2, 3), (4, 5)))
    write = Write("mlp_output", 0, (6, 7), (), Scale(0.0))
    assert run_from(swap(pair, Site("mlp_output", 0, "edit"), 0, INFO), pair, INFO) == 2
    assert run_from(Row("p", 0, (write,)), pair, INFO) == 4


def test_costs_grow_with_what_is_run() -> None:
    pair, setting = token_pair(), SETTING
    flops = [row_flops(swap(pair, Site("mlp_output", layer, "all"), 0, INFO), pair, setting) for layer in range(6)]
    assert all(low > high for low, high in pairwise(flops))
    longer = token_pair(x0=(1, 2, 3, 4, 5, 6), x1=(1, 2, 9, 4, 5, 6))
    answered = token_pair(answers=((1, 2, 3), (4, 5)))
    for costlier in (longer, answered):
        assert base_flops(costlier, setting) > base_flops(pair, setting)
        assert row_bytes(costlier, 2, setting) > row_bytes(pair, 2, setting)
    wide = Setting(replace(INFO, vocab=1), "float32", LOGITS)  # without logits, which do not depend on the start
    assert row_bytes(pair, 0, wide) > row_bytes(pair, 2, wide) > row_bytes(pair, 4, wide)
    assert row_bytes(pair, 2, wide._replace(dtype="bfloat16")) < row_bytes(pair, 2, wide)
    for field in ("layers", "d_model", "d_ff", "heads", "kv_heads", "vocab"):
        asked = setting._replace(outcome=LOGPROBS)  # which takes logits of the whole vocabulary
        bigger = asked._replace(info=replace(INFO, **{field: 2 * getattr(INFO, field)}))
        assert base_flops(answered, bigger) > base_flops(answered, asked)
        if field == "layers":  # a layer's keys and values go when the next one has run
            continue
        vocab = 10_000 if field == "vocab" else 1  # either the logits or a layer takes more memory
        small = replace(INFO, vocab=vocab)
        large = replace(small, **{field: 2 * getattr(small, field)})
        more, less = (row_bytes(answered, 2, asked._replace(info=info)) for info in (large, small))
        assert more > less


def test_part_costs_add_up() -> None:
    (job,) = plan(ROWS)
    expected = sum(base_flops(pair, SETTING) for pair in PAIRS)
    expected += sum(row_flops(row, {pair.id: pair for pair in PAIRS}[row.pair], SETTING) for row in ROWS)
    assert job.flops == pytest.approx(expected)


def test_keys_know_the_weights_of_a_local_folder(tmp_path: Path) -> None:
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = load_info(str(tmp_path)).weights
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert before
    assert load_info(str(tmp_path)).weights != before


def test_the_memory_of_batches_is_what_libraries_and_weights_leave() -> None:
    weights = weight_bytes(INFO, "float32")
    assert batch_budget(SETTING, None, here=True) == batch_budget(SETTING, None, here=False) == DEFAULT_BATCH
    assert batch_budget(SETTING, 3.0, here=True) == pytest.approx(3e9 - LIBRARIES - weights)
    assert batch_budget(SETTING, 3.0, here=False) == 3e9  # the weights are elsewhere
    large = SETTING._replace(info=replace(INFO, d_ff=10**6, layers=100))
    assert batch_budget(large, 90.0, here=True) == pytest.approx(90e9 - LIBRARIES - weight_bytes(large.info, "float32"))


def test_too_little_memory_is_refused_with_what_it_takes() -> None:
    large = SETTING._replace(info=replace(INFO, d_ff=10**6, layers=100))
    for setting, here in ((SETTING, True), (SETTING, False), (large, True)):
        fixed = LIBRARIES + weight_bytes(setting.info, "float32") if here else 0.0
        needed = math.ceil((fixed + SMALLEST_BATCH) / 1e7) / 100  # as said, it is enough
        with pytest.raises(SettingsError, match=rf"take {fixed / 1e9:.2f} GB; give at least {needed:.2f}"):
            batch_budget(setting, needed - 0.01, here)
        assert batch_budget(setting, needed, here) >= SMALLEST_BATCH


def test_the_size_of_batches_is_that_of_their_rows_and_keeps_the_budget() -> None:
    pairs = {pair.id: pair for pair in PAIRS}
    (job,) = plan(ROWS)
    sizes = batch_sizes(job, pairs, SETTING)
    # Of each pair and base six rows begin at the last token, and twelve at the third, where `edit` is.
    held = held_bytes(PAIRS, ROWS, SETTING)
    runs = ((4, 0), (48, 2), (24, 4))
    assert sizes == [held + number * row_bytes(PAIRS[0], start, SETTING) for number, start in runs]
    for room in (1.5, 3.5, 7.0):
        budget = held + room * row_bytes(PAIRS[0], 2, SETTING)
        cut = [size for job in plan(ROWS, batch_bytes=budget) for size in batch_sizes(job, pairs, SETTING)]
        assert max(cut) <= budget
        assert len(cut) > len(sizes)
