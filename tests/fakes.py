"""Stand-ins for what a test does not need in earnest: a tokenizer of words, a model's shape, a canned backend.

The backend is a real one in all but the numbers: it takes jobs, gives tickets and answers them, and what was handed
over outlives it on a `shelf`, as jobs on a server outlive the process that sent them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from remote_mediation.config import StudyConfig
from remote_mediation.engine.jobs import Context, Job, Readout
from remote_mediation.engine.rows import Row
from remote_mediation.errors import JobError, LostJobError
from remote_mediation.outcomes import LogitOutcome, ResponseOutcome
from remote_mediation.sites import ModelInfo
from remote_mediation.tokens import TokenPair

CHAT_TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = (
    "<unk> <user> <end> <assistant> how do i steal wash sell a the my car bike house at night tonight now please sure "
    "yes sorry no here is why burn fix take ride wreck paint rob rent flood clean"
)
_CRIMES = (
    *(("steal", "wash", "car"), ("take", "ride", "bike"), ("rob", "rent", "house")),
    *(("burn", "fix", "car"), ("wreck", "paint", "bike"), ("flood", "clean", "house")),
)
"""Harmful verb, harmless verb, noun; no two nouns share a verb, so that each is a component of its own."""
INFO = ModelInfo(
    name="tiny",
    revision="",
    family="llama",
    layers=6,
    d_model=8,
    d_ff=12,
    heads=2,
    kv_heads=1,
    d_head=4,
    vocab=40,
    gated=True,
    tied=False,
    sliding=(),
    window=None,
)
SALT = 1  # with it the canned study of test_resume.py has windows to resolve
LOGITS = LogitOutcome(plus=(5, 6), minus=(7,))
LOGPROBS = ResponseOutcome()


def words_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A real fast tokenizer, one token per word; the id of a word is its place in `WORDS`."""
    vocabulary = {word: index for index, word in enumerate(WORDS.split())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def token_pair(name: str = "p", **changes: Any) -> TokenPair:
    """Five tokens, the third of them differs, the last is the template's."""
    fields = {"cluster": name, "category": "", "x0": (1, 2, 3, 4, 5), "x1": (1, 2, 9, 4, 5)}
    return TokenPair(**{"id": name, **fields, "first": 2, "after": 2, "post": 1, **changes})


def records(**extra: str) -> list[dict[str, str]]:
    """Six prompt pairs of three templates, each with words of its own, as a pairs file has them."""
    return [
        {
            "id": f"{harmful}-{noun}",
            "harmful": f"how do i {harmful} a {noun} at night",
            "harmless": f"how do i {harmless} a {noun} at night",
            "category": "theft",
            "template": noun,
            **extra,
        }
        for harmful, harmless, noun in _CRIMES
    ]


def placebo_study(folder: Path, model: str, **settings: Any) -> StudyConfig:
    """A study of these pairs, each with a placebo, of a tiny chat model; quick, by `logit_diff`."""
    pairs = [{**record, "placebo": record["harmless"].replace(" a ", " the ")} for record in records()]
    return StudyConfig(
        model=model,
        pairs=str(write_pairs(folder / "pairs.jsonl", pairs)),
        outcome="logit_diff",
        logit_diff={"plus": ["sure", "yes"], "minus": ["sorry", "no"]},
        statistics={"resamples": 100},
        **settings,
    )


def write_pairs(path: Path, content: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in content), "utf-8")
    return path


class Counting:
    """A backend that counts what another one measures."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.rows, self.flops, self.numbers = backend, 0, 0.0, 0
        self.info, self.tokenizer = backend.info, backend.tokenizer
        self.dtype, self.model, self.served = backend.dtype, backend.model, backend.served

    def submit(self, job: Job) -> str:
        self.rows += job.rows if job.task == "measure" else 0
        self.flops += job.flops
        return str(self.backend.submit(job))

    def collect(self, ticket: str) -> Readout:
        readout: Readout = self.backend.collect(ticket)
        self.numbers += sum(len(values) for values in readout.values)
        return readout


class CannedBackend:
    """Answers a job with values drawn from its row keys."""

    dtype = "float32"
    model = None
    served: Mapping[str, str] = {}

    def __init__(
        self,
        shelf: dict[str, Job],
        *,
        info: ModelInfo = INFO,
        refuses: Sequence[str] = (),
        refuses_tasks: Sequence[str] = (),
        loses: int = 0,
        dies_after: float = np.inf,
        spoils: Callable[[Job, list[np.ndarray]], list[np.ndarray]] = lambda job, values: values,
    ) -> None:
        """Pairs and tasks whose jobs fail, how many jobs are lost first, and after how many its process is killed.

        spoils: what becomes of a job's values on their way.
        """
        self.info, self.tokenizer = info, words_tokenizer(chat=True)
        self.collected: list[Job] = []
        self._shelf, self._refuses, self._loses, self._dies_after = shelf, refuses, loses, dies_after
        self._refuses_tasks, self._spoils = refuses_tasks, spoils

    def submit(self, job: Job) -> str:
        ticket = f"ticket {len(self._shelf)}"
        self._shelf[ticket] = job
        return ticket

    def collect(self, ticket: str) -> Readout:
        if len(self.collected) >= self._dies_after:
            raise KeyboardInterrupt
        if ticket not in self._shelf:
            raise LostJobError(f"{ticket} is not known")
        job = self._shelf[ticket]
        if self._loses:
            self._loses -= 1
            raise LostJobError(f"{ticket} was lost")
        failing = [pair for pair in job.pairs if pair in self._refuses]
        if failing:
            raise JobError(f"no memory for {failing[0]}")
        if job.task in self._refuses_tasks:
            raise JobError(f"{job.task} is not allowed")
        self.collected.append(job)
        values = [value for context in job.contexts for value in self._values(context)]
        return Readout(self._spoils(job, values), seconds=1.0)

    def _values(self, context: Context) -> list[np.ndarray]:
        """One array per key of a context."""
        if context.task == "generate":
            return [
                np.array(
                    [self._answer(ids, context.payload["tokens"]) for ids in context.payload["prompts"]], np.float32
                ).ravel()
            ]
        count = {
            "measure": lambda: len(context.payload["stacks"][0]["queries"]),
            "screen": lambda: 2 * min(context.payload["cuts"], 2) * self.info.layers * self.info.d_ff,
            "drift": lambda: 3 * len(context.payload["answer"]),
        }[context.task]()
        return [canned(key, count) for key in context.keys]

    def _answer(self, ids: Sequence[int], tokens: int) -> tuple[int, ...]:
        """A prompt's own words from the verb on, then the token that ends it."""
        words = tuple(ids[4 : 4 + tokens])
        return words + (self.tokenizer.all_special_ids[0],) * (tokens - len(words))


class AdditiveBackend(CannedBackend):
    """Neurons add up: swapping some moves Y by the sum of their weights on that pair, on either prompt alike.

    Y is 0 on the harmless prompt as it is, and `te` on the harmful one.
    """

    def __init__(
        self,
        weights: dict[str, np.ndarray],
        te: dict[str, float],
        info: ModelInfo,
        unseen: np.ndarray | None = None,
        **troubles: Any,
    ) -> None:
        """By pair `[layer, unit]`, and TE; gradients see nothing of the units that are `unseen`."""
        super().__init__({}, info=info, **troubles)
        self.weights, self.te = weights, te
        self._seen = np.ones((info.layers, info.d_ff)) if unseen is None else 1.0 - unseen

    def _values(self, context: Context) -> list[np.ndarray]:
        if context.task == "screen":
            seen = sum(self.weights[pair] for pair in context.pairs) * self._seen
            variants = [seen, np.abs(seen)] if context.payload["cuts"] > 1 else [seen]
            return [np.stack(variants * 2).astype(np.float32).ravel()]
        return [np.array([self._y(row), 0.0], np.float32) for row in context.rows]

    def _y(self, row: Row) -> float:
        weights, te = self.weights[row.pair], self.te[row.pair]
        swapped = [write for write in row.writes if write.component == "mlp_neurons"]
        moved = sum(weights[write.layer, list(write.columns)].sum() for write in swapped)
        return te - moved if row.base else moved


def canned(key: str, count: int) -> np.ndarray:
    """The values of a row: any numbers, but always the same for the same key."""
    return np.random.default_rng([SALT, int(key, 16)]).normal(size=count).astype(np.float32)


class Watcher:
    """Counts what a study says of its progress, and may interrupt it."""

    def __init__(self, stop_after: float = np.inf) -> None:
        self.totals: list[int] = []
        self.done: list[int] = []
        self._stop_after = stop_after

    def total(self, rows: int) -> None:
        self.totals.append(rows)

    def ahead(self, operations: float) -> None:
        pass

    def advance(self, rows: int, operations: float) -> None:
        self.done.append(rows)
        if len(self.done) >= self._stop_after:
            raise KeyboardInterrupt
