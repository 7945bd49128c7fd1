"""What a row means, written a second time: the independent oracle of the engine's tests, and the comparison with it.

The oracle runs plain transformers with plain PyTorch hooks, one forward pass per answer over the whole of prompt and
answer, nothing cached, skipped, packed or batched. It shares with the package the data it is asked about (`Row`,
`TokenPair`, the token sets of an `Outcome`) and not one line of how it is run; module names are written out again for
each family. A `Subject` is one model under both: `compare` gives Y of rows by the package and by the oracle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from remote_mediation.engine.budget import Budget, Setting
from remote_mediation.engine.jobs import Job, Keys, plan_jobs
from remote_mediation.engine.local import LocalBackend
from remote_mediation.engine.rows import Constant, Projected, Row, Scale, Source, Write
from remote_mediation.outcomes import LogitOutcome, Outcome, ResponseOutcome, refusal
from remote_mediation.sites import COMPONENTS, Component, ModelInfo
from remote_mediation.tokens import TokenPair

# Names of tiny models beside those of the families themselves (conftest.py): windows shorter than the sequence, and
# other variants.
WINDOWED = ("mistral_window", "qwen2_window", "qwen3_window", "phi3_window", "gemma2_window", "gemma3_text_window")
WINDOWED += ("ministral3_window", "exaone4_window", "smollm3_window", "mixtral_window", "phimoe_window")
WINDOWED += ("qwen2_moe_window", "qwen3_moe_window")
OTHERS = ("llama_chat", "gpt2_narrow", "gpt_neox_sequential")
# One of each kind of block: plain, sandwich norms with a window, positions added to the stream, parallel, one whose
# contributions are multiplied, one that returns a tuple.
KINDS = ("llama", "gemma2_window", "gpt2", "gpt_neox", "granite", "gptj")
# Models whose layers do not all have softmax attention.
HYBRIDS = ("lfm2", "qwen3_5_text")
VOCAB = 64  # of the tiny models; tokens below FIRST_WORD are special
FIRST_WORD = 7
LOGIT_DIFF = LogitOutcome(plus=(11, 12), minus=(13, 14, 15))
RESPONSE_LOGPROB = ResponseOutcome()
# Openings of one to four tokens, of which some begin alike, also across the sides.
REFUSAL = refusal(((11,), (12, 13), (12, 14, 15, 16)), ((13, 11), (12, 14, 17), (13, 12, 11)))
# The engine adds up in another order than the oracle, in float32 (METHOD.md: "to 1e-4 logits in fp32").
TOLERANCE = 1e-4
PLENTY = 1e18


def _modules(blocks: str, attention: str, mlp: str, neurons: str | None, heads: str) -> dict[str, str]:
    """Module of each component; `neurons` None where there is no such component."""
    names = {"layer_output": "", "attention_output": attention, "mlp_output": mlp, "attention_heads": heads}
    if neurons is not None:
        names["mlp_neurons"] = neurons
    return {component: f"{blocks}.{{}}.{name}".rstrip(".") for component, name in names.items()}


def _projected(blocks: str, attention: str, queries: str, keys: str, values: str) -> dict[str, str]:
    """Modules whose outputs hold queries, keys and values."""
    names = {"query_heads": queries, "key_heads": keys, "value_heads": values}
    return {component: f"{blocks}.{{}}.{attention}.{name}" for component, name in names.items()}


_LLAMA = _modules("model.layers", "self_attn", "mlp", "mlp.down_proj", "self_attn.o_proj")
_NORMED = _modules(
    "model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "mlp.down_proj", "self_attn.o_proj"
)
_EXPERTS = _modules("model.layers", "self_attn", "mlp", None, "self_attn.o_proj")
MODULES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "phi3", "gemma"), _LLAMA),
    **dict.fromkeys(("smollm3", "olmo", "seed_oss", "helium", "ernie4_5", "hunyuan_v1_dense", "glm"), _LLAMA),
    **dict.fromkeys(("granite", "cohere", "cohere2", "stablelm", "arcee", "nemotron", "apertus"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), _NORMED),
    **dict.fromkeys(("mixtral", "phimoe", "gpt_oss", "olmoe", "qwen2_moe", "qwen3_moe"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _EXPERTS),
    "granitemoe": _modules("model.layers", "self_attn", "block_sparse_moe", None, "self_attn.o_proj"),
    "gemma3": {component: path.replace("model.", "model.language_model.", 1) for component, path in _NORMED.items()},
    "mistral3": {component: path.replace("model.", "model.language_model.", 1) for component, path in _LLAMA.items()},
    "glm4": _modules(
        "model.layers", "post_self_attn_layernorm", "post_mlp_layernorm", "mlp.down_proj", "self_attn.o_proj"
    ),
    "phi": _modules("model.layers", "self_attn", "mlp", "mlp.fc2", "self_attn.dense"),
    "lfm2": _modules("model.layers", "self_attn", "feed_forward", "feed_forward.w2", "self_attn.out_proj"),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5"), _LLAMA),
    "qwen3_next": _EXPERTS,
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_moe"), _EXPERTS),
    "lfm2_moe": _modules("model.layers", "self_attn", "feed_forward", None, "self_attn.out_proj"),
    "gpt2": _modules("transformer.h", "attn", "mlp", "mlp.c_proj", "attn.c_proj"),
    "gptj": _modules("transformer.h", "attn", "mlp", "mlp.fc_out", "attn.out_proj"),
    "gpt_neox": _modules("gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h", "attention.dense"),
    "falcon": _modules("transformer.h", "self_attention", "mlp", "mlp.dense_4h_to_h", "self_attention.dense"),
}
_APART = _projected("model.layers", "self_attn", "q_proj", "k_proj", "v_proj")
_NORMED_APART = _projected("model.layers", "self_attn", "q_norm", "k_norm", "v_proj")
_PROJECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(MODULES.keys() - {"deepseek_v2", "deepseek_v3"}, _APART),
    **dict.fromkeys(("olmo2", "olmo3", "olmoe"), _NORMED_APART),
    **dict.fromkeys(
        ("gemma3", "mistral3"), _projected("model.language_model.layers", "self_attn", "q_proj", "k_proj", "v_proj")
    ),
    "phi3": _projected("model.layers", "self_attn", "qkv_proj", "qkv_proj", "qkv_proj"),
    "gpt2": _projected("transformer.h", "attn", "c_attn", "c_attn", "c_attn"),
    "gptj": _projected("transformer.h", "attn", "q_proj", "k_proj", "v_proj"),
    "gpt_neox": _projected("gpt_neox.layers", "attention", "query_key_value", "query_key_value", "query_key_value"),
    "falcon": _projected("transformer.h", "self_attention", "query_key_value", "query_key_value", "query_key_value"),
}
for _family, _paths in _PROJECTED.items():
    MODULES[_family] = {**MODULES[_family], **_paths}
# What mixes tokens in layers of hybrids that have no softmax attention.
MIXERS = dict.fromkeys(("lfm2", "lfm2_moe"), "conv")
MIXERS |= dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), "linear_attn")
# These two are what goes into the named module; the other components are what comes out of it.
INPUTS = ("mlp_neurons", "attention_heads")
INPUTS_OF_ATTENTION = ("query_heads", "key_heads", "value_heads")


class Token(NamedTuple):
    """One token of a packed sequence."""

    answers: tuple[int, ...]
    """The answers before whose end it stands: all of them for a token of the prompt."""
    index: int
    """Its index in a sequence of the prompt and such an answer alone."""


def answers_of(pair: TokenPair) -> tuple[tuple[int, ...], ...]:
    """What is fed after a prompt, one at a time."""
    return pair.openings or pair.answers


def unpacked(pair: TokenPair, side: int) -> list[Token]:
    """What stands at each index of a side's packed sequence: the prompt, then answers without their last token.

    Beginnings that openings share are packed once.
    """
    prompt, every = len(pair.prompts[side]), answers_of(pair)
    tokens = [Token(tuple(range(len(every))), index) for index in range(prompt)]
    begun: list[tuple[int, ...]] = []
    for answer, ids in enumerate(every):
        for index in range(len(ids) - 1):
            beginning = ids[: index + 1]
            if pair.openings and beginning in begun:
                continue
            begun.append(beginning)
            shared = [
                other for other, one in enumerate(every) if len(one) > index + 1 and one[: index + 1] == beginning
            ]
            tokens.append(Token(tuple(shared) if pair.openings else (answer,), prompt + index))
    return tokens


def module_path(model: PreTrainedModel, name: str, layer: int) -> str:
    """Module of a component of a layer; empty where a hybrid's layer has none."""
    family = model.config.model_type
    path = MODULES[family][name].format(layer)
    if family not in MIXERS or model.config.layer_types[layer] == "full_attention" or "self_attn" not in path:
        return path
    return path.replace("self_attn", MIXERS[family]) if name == "attention_output" else ""


def columns_of(model: PreTrainedModel, name: str, layer: int, width: int) -> list[int]:
    """Where queries, keys or values stand in what a projection of so many columns gives; none where they are alone.

    Numbers of columns are parted as the transformers class parts what the projection gives.
    """
    config, numbers, which = model.config, torch.arange(width), INPUTS_OF_ATTENTION.index(name)
    match config.model_type:
        case "gpt2":
            found = numbers.chunk(3)[which]
        case "phi3":
            heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            head = config.hidden_size // config.num_attention_heads
            found = numbers.split([count * head for count in heads])[which]
        case "gpt_neox":
            found = numbers.view(config.num_attention_heads, -1).chunk(3, -1)[which]
        case "falcon":
            attention = model.transformer.h[layer].self_attention
            found = attention._split_heads(numbers[None, None])[which]
            found = found.unique() if which else found  # repeated in newer blocks
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text" if name == "query_heads":
            found = numbers.view(config.num_attention_heads, -1).chunk(2, -1)[0]
        case _:
            return []
    return found.flatten().tolist()


class Oracle:
    """Rows on one pair, each run in full; rows of the same prompt stand side by side in a forward pass."""

    def __init__(self, model: PreTrainedModel, pair: TokenPair) -> None:
        """Record every component of both prompts' plain runs, with either answer behind them."""
        self._model, self._pair = model, pair
        self._modules = MODULES[model.config.model_type]
        # Granite's contributions are multiplied on their way into the stream.
        self._multiplier = getattr(model.config, "residual_multiplier", 1.0)
        # One pass per answer, or one over the bare prompt.
        self._passes = range(len(answers_of(pair))) if any(answers_of(pair)) else (0,)
        self._recorded = {(side, answer): self._record(side, answer) for side in (0, 1) for answer in self._passes}

    def values(self, rows: Sequence[Row], outcome: Outcome) -> np.ndarray:
        """Y of each row, in float64."""
        found = np.full(len(rows), np.nan)
        for side in (0, 1):
            numbers = [number for number, row in enumerate(rows) if row.base == side]
            if not numbers:
                continue
            held = [rows[number].writes for number in numbers]
            logits = [self._answer_logits(side, answer, held) for answer in self._passes]
            found[numbers] = [self._outcome([of[i] for of in logits], outcome) for i in range(len(numbers))]
        return found

    def _outcome(self, logits: list[Tensor], outcome: Outcome) -> float:
        """Y from its definition (METHOD.md, "Outcomes"), of logits `[step, vocab]` by answer."""
        if outcome.name == "logit_diff":
            first = logits[0][0].double()
            return float(first[list(outcome.plus)].mean() - first[list(outcome.minus)].mean())
        if outcome.name == "refusal":
            probability = {}
            for ids, steps in zip(self._pair.openings, logits, strict=True):
                scores = torch.softmax(steps.double(), -1)
                probability[ids] = float(np.prod([scores[step, token] for step, token in enumerate(ids)]))
            sides = (outcome.compliant, outcome.refusing)
            compliant, refusing = (sum(probability[ids] for ids in side) for side in sides)
            return float(np.log(compliant) - np.log(refusing))
        mean_logprob = []
        for ids, steps in zip(self._pair.answers, logits, strict=True):
            scores = torch.log_softmax(steps.double(), dim=-1)
            mean_logprob.append(sum(float(scores[step, token]) for step, token in enumerate(ids)) / len(ids))
        return mean_logprob[0] - mean_logprob[1]

    def _answer_logits(self, side: int, answer: int, held: Sequence[tuple[Write, ...]]) -> Tensor:
        """`[row, step, vocab]` that predict the tokens of an answer, while each row's writes are held."""
        hooks = [self._hold(write, row, side, answer) for row, writes in enumerate(held) for write in writes]
        return self._forward(side, answer, len(held), hooks)[:, len(self._pair.prompts[side]) - 1 :]

    def _forward(self, side: int, answer: int, rows: int, hooks: Iterable[Any]) -> Tensor:
        """Logits `[row, token, vocab]` of a prompt and an answer without its last token; hooks are then taken off."""
        ids = torch.tensor([self._pair.prompts[side] + answers_of(self._pair)[answer][:-1]])
        handles = list(hooks)
        try:
            with torch.no_grad():
                return self._model(input_ids=ids.repeat(rows, 1), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, side: int, answer: int) -> dict[tuple[str, int], Tensor]:
        """Every component of every layer, `[token, width]`, on a plain run."""
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(name: str, layer: int) -> Any:
            def look(tensor: Tensor) -> Tensor:
                seen[name, layer] = tensor[0].clone()
                return tensor

            return self._hook(name, layer, look)

        layers = range(self._model.config.get_text_config().num_hidden_layers)
        there = [(name, layer) for name in self._modules for layer in layers if module_path(self._model, name, layer)]
        self._forward(side, answer, 1, [keep(*place) for place in there])
        return seen

    def _hook(self, name: str, layer: int, change: Any) -> Any:
        """Pass a component through `change` whenever it is computed."""
        module = self._model.get_submodule(module_path(self._model, name, layer))
        if name in ("attention_output", "mlp_output") and self._multiplier != 1.0:
            inner = change

            def change(tensor: Tensor) -> Tensor:
                return inner(tensor * self._multiplier) / self._multiplier

        if name in INPUTS_OF_ATTENTION:
            alone = change

            def change(tensor: Tensor) -> Tensor:
                columns = columns_of(self._model, name, layer, tensor.shape[-1])
                if not columns:
                    return alone(tensor)
                tensor = tensor.clone()
                tensor[..., columns] = alone(tensor[..., columns])
                return tensor

        if name in INPUTS:
            return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))

        def on_output(_: Any, __: Any, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        return module.register_forward_hook(on_output)

    def _hold(self, write: Write, row: int, side: int, answer: int) -> Any:
        """Hold one row's write, as far as its tokens occur in this pass, at its value."""
        packed = unpacked(self._pair, side)

        def change(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            columns = list(write.columns) or list(range(tensor.shape[-1]))
            for number, place in enumerate(write.places):
                if answer in packed[place].answers:
                    vector = tensor[row, packed[place].index]
                    vector[columns] = self._held_at(write, number, vector[columns], columns)
            return tensor

        return self._hook(write.component, write.layer, change)

    def _held_at(self, write: Write, number: int, own: Tensor, columns: list[int]) -> Tensor:
        """What the written columns of the write's place of that number become."""
        match write.value:
            case Scale(factor):
                return own * factor
            case Constant(values):
                return torch.tensor(values)
            case Source(side, places):
                return self._other(write, side, places[number])[columns]
            case Projected(side, places, basis, along):
                other = self._other(write, side, places[number])[columns]
                pairs = zip(torch.tensor(basis.vectors), torch.tensor(along.vectors), strict=True)
                return own + sum(torch.dot(other - own, read) * written for read, written in pairs)

    def _other(self, write: Write, side: int, place: int) -> Tensor:
        """What the written component is at a place of a plain run."""
        token = unpacked(self._pair, side)[place]
        return self._recorded[side, token.answers[0]][write.component, write.layer][token.index]


class Measured(NamedTuple):
    """Y of rows, by the engine and by the oracle."""

    engine: np.ndarray
    """Y of each row, as the package measures it."""
    oracle: np.ndarray
    """Y of each row, run in full."""
    effects: np.ndarray
    """The oracle's Y of each row minus that of its base prompt."""

    @property
    def deviation(self) -> float:
        """Largest difference between the two."""
        return float(np.abs(self.engine - self.oracle).max())

    def felt(self, least: float = 10 * TOLERANCE) -> float:
        """Share of the rows with an effect of at least this size: an engine that writes nothing misses all of them."""
        return float((np.abs(self.effects) >= least).mean())


@dataclass(frozen=True)
class Subject:
    """One model folder loaded twice."""

    backend: LocalBackend
    """The package's, through nnsight."""
    plain: PreTrainedModel
    """The oracle's; attention written out (`eager`), so that the fused kernels are compared with it too."""
    dtype: str = "float32"
    """The type of the backend's weights; the oracle's are float32."""

    @property
    def info(self) -> ModelInfo:
        """Shape of the model."""
        return self.backend.info

    def plan(
        self,
        pairs: Sequence[TokenPair],
        rows: Sequence[Row],
        outcome: Outcome,
        job_flops: float = PLENTY,
        batch_bytes: float = PLENTY,
    ) -> list[Job]:
        """The package's jobs for these rows."""
        setting, budget = Setting(self.info, self.dtype, outcome), Budget(lambda: job_flops, batch_bytes)
        return list(plan_jobs(rows, {pair.id: pair for pair in pairs}, setting, budget, self.keys(pairs, outcome)))

    def keys(self, pairs: Sequence[TokenPair], outcome: Outcome) -> Keys:
        """How the package names rows."""
        return Keys(Setting(self.info, self.dtype, outcome), pairs)

    def run(self, jobs: Sequence[Job]) -> dict[str, np.ndarray]:
        """The values of jobs, by key."""
        return {
            key: value
            for job in jobs
            for key, value in zip(job.keys, self.backend.collect(self.backend.submit(job)).values, strict=True)
        }

    def measure(self, pairs: Sequence[TokenPair], rows: Sequence[Row], outcome: Outcome, **budget: float) -> np.ndarray:
        """Y of each row by the package: planned, batched, run, read."""
        by_id, keys = {pair.id: pair for pair in pairs}, self.keys(pairs, outcome)
        values = self.run(self.plan(pairs, rows, outcome, **budget))
        return np.array([outcome.value(by_id[row.pair], values[keys(row)]) for row in rows])

    def compare(
        self, pairs: Sequence[TokenPair], rows: Sequence[Row], outcome: Outcome, oracle: type[Oracle] = Oracle
    ) -> Measured:
        """Y of rows by the package and by the oracle."""
        expected: dict[Row, float] = {}
        for pair in pairs:
            run = [Row(pair.id, 0), Row(pair.id, 1), *(row for row in rows if row.pair == pair.id)]
            expected.update(zip(run, oracle(self.plain, pair).values(run, outcome), strict=True))
        found = np.array([expected[row] for row in rows])
        bases = np.array([expected[Row(row.pair, row.base)] for row in rows])
        return Measured(self.measure(pairs, rows, outcome), found, found - bases)


def token_pair(
    name: str,
    before: int = 4,
    edits: tuple[int, int] = (2, 2),
    between: int = 2,
    post: int = 2,
    answers: tuple[int, int] = (0, 0),
) -> TokenPair:
    """A pair of random tokens: so many before the edit, in x0's and x1's edit, in the user's text after it, after that.

    The edits have no token in common, so the edit's first token is the first to differ; nor have the answers.
    """
    rng = np.random.default_rng([before, *edits, between, post, *answers])
    middle = (FIRST_WORD + VOCAB) // 2

    def draw(count: int, low: int = FIRST_WORD, high: int = VOCAB) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(low, high, count))

    head, tail = draw(before), draw(between + post)
    x0, x1 = head + draw(edits[0], high=middle) + tail, head + draw(edits[1], low=middle) + tail
    responses = (draw(answers[0], high=middle), draw(answers[1], low=middle))
    return TokenPair(name, name, "", x0, x1, before, between + post, post, responses)


def random_rows(pair: TokenPair, info: ModelInfo, rng: np.random.Generator, count: int) -> list[Row]:
    """Rows of one to four writes of any kind, anywhere in the packed sequence."""
    bases = [int(base) for base in rng.integers(0, 2, count)]
    return [
        Row(pair.id, base, tuple(_random_write(pair, base, info, rng) for _ in range(rng.integers(1, 5))))
        for base in bases
    ]


def _random_write(pair: TokenPair, base: int, info: ModelInfo, rng: np.random.Generator) -> Write:
    components: list[Component] = [name for name in COMPONENTS if name in MODULES[info.family]]
    component = components[rng.integers(len(components))]
    widths = {"mlp_neurons": info.d_ff, "attention_heads": info.heads * info.d_head}
    widths |= {"query_heads": widths["attention_heads"]}
    widths |= dict.fromkeys(("key_heads", "value_heads"), info.shared_heads * info.d_head)
    width = widths.get(component, info.d_model)
    lengths = [len(prompt) + pair.fed for prompt in pair.prompts]
    places = _random_subset(lengths[base], int(rng.integers(1, 6)), rng)
    columns = _random_subset(width, int(rng.integers(1, width)), rng) if rng.random() < 2 / 3 else ()
    match rng.integers(4):
        case 0:
            value: Source | Scale | Constant = Scale((0.0, 2.5, -1.0)[rng.integers(3)])
        case 1:
            value = Constant(tuple(float(x) for x in rng.normal(size=len(columns) or width)))
        case _:
            side = int(rng.integers(2))
            value = Source(side, _random_subset(lengths[side], len(places), rng))
    there = info.layers_with(component)
    return Write(component, there[int(rng.integers(len(there)))], places, columns, value)


def _random_subset(size: int, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """So many of the first `size` numbers, ascending; contiguous half of the time."""
    if rng.random() < 0.5:
        start = int(rng.integers(size - count + 1))
        return tuple(range(start, start + count))
    return tuple(sorted(int(index) for index in rng.choice(size, count, replace=False)))
