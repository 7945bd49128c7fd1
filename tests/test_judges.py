"""Judges and their measure: numbers against formulas written out here, classifiers against their own plain forward."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from oracle import Subject
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.proportion import proportion_confint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from remote_mediation.errors import InputError, JudgeError
from remote_mediation.judges import Judge, Labelled, check_judge, load_judge, load_labelled, refuses
from remote_mediation.report import judge_table
from remote_mediation.stats import cohen_kappa

WORDS = [f"w{number}" for number in range(40)]
LABELS = {0: "safe", 1: "harmful", 2: "unclear"}


# --- refusal phrases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but no.",
        "I\u2019m SORRY, but no.",
        '  **"Sorry**, not this."',
        "I cannot do that.",
        "Thank you, but I\ncan't  help with that.",
        "As an AI, I have rules.",
    ],
)
def test_refusals(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    ["", "Sure, here is how.", "Do not be sorry.", "You cannot miss it.", "This apology is fine: I apologize."],
)
def test_what_is_no_refusal(answer: str) -> None:
    assert not refuses(answer)


def test_an_empty_answer_neither_refuses_nor_complies() -> None:
    judge = load_judge("refusal-phrases")
    assert judge.name == "refusal-phrases"
    assert judge(["a"] * 4, ["", " \n", "Sure, first", "I cannot"]) == [False, False, True, False]


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["", "refusal", "classifier:", "classifier", "python:", "refusal-phrases:x", "http://x"]
)
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(JudgeError, match=r"unknown judge .*; use refusal-phrases, classifier:.* or python:"):
        load_judge(spec)
    assert issubclass(JudgeError, InputError)


# --- functions --------------------------------------------------------------------------------------------------------

MODULE = """
import numpy
import torch
seen = []
table = {"a": 1}
def bools(prompts, answers):
    seen.append((prompts, answers))
    return [answer.startswith("yes") for answer in answers]
def scores(prompts, answers): return [1.0, 0]
def array(prompts, answers): return numpy.array([True, False])
def tensor(prompts, answers): return torch.tensor([1, 0])
def short(prompts, answers): return [True]
def half(prompts, answers): return [1, 0.5]
def text(prompts, answers): return ["1", "0"]
def nothing(prompts, answers): return [True, None]
def nan(prompts, answers): return [0, float("nan")]
def string(prompts, answers): return "10"
def unordered(prompts, answers): return {0, 1}
def lazy(prompts, answers): return (True for _ in answers)
def breaks(prompts, answers):
    return prompts[9]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of judges on the path."""
    (tmp_path / "jury").mkdir()
    (tmp_path / "jury/__init__.py").write_text("")
    (tmp_path / "jury/mine.py").write_text(MODULE)
    (tmp_path / "jury/broken.py").write_text("first = 1\nsecond = first / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("jury", "jury.mine", "jury.broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "jury.mine"


@pytest.mark.parametrize("function", ["bools", "scores", "array", "tensor"])
def test_functions(module: str, function: str) -> None:
    judge = load_judge(f"python:{module}:{function}")
    assert judge.name == f"python:{module}:{function}"
    verdicts = judge(("p", "q"), ("yes", "no"))
    assert verdicts == [True, False]
    assert all(type(verdict) is bool for verdict in verdicts)


def test_a_function_sees_prompts_and_answers(module: str) -> None:
    load_judge(f"python:{module}:bools")(("p", "q"), ("yes", "no"))
    import jury.mine  # type: ignore[import-not-found]

    assert jury.mine.seen[-1] == (["p", "q"], ["yes", "no"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "gave 1 verdicts for 2 answers; return one per answer"),
        ("half", "gave 0.5 as verdict 2; return True, False, 1 or 0"),
        ("text", "gave '1' as verdict 1"),
        ("nothing", "gave None as verdict 2"),
        ("nan", "gave nan as verdict 2"),
        ("string", "returned str; return a list"),
        ("unordered", "returned set; return a list"),
        ("lazy", "returned generator; return a list"),
        ("breaks", r"failed with IndexError: list index out of range \(mine.py, line 21\); mend the function"),
    ],
)
def test_functions_that_answer_amiss(module: str, function: str, message: str) -> None:
    judge = load_judge(f"python:{module}:{function}")
    with pytest.raises(JudgeError, match=message) as caught:
        judge(["p", "q"], ["yes", "no"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jury.mine", "names no function; write python:package.module:function"),
        ("jury.mine:", "names no function"),
        ("jury.none:bools", "cannot import module 'jury.none' .*ModuleNotFoundError.* on PYTHONPATH"),
        ("jury.broken:bools", r"cannot import module 'jury.broken' .*division by zero \(broken.py, line 2\)"),
        ("jury.mine:none", "module 'jury.mine' .* has no 'none'; name a function in it"),
        ("jury.mine:table", "holds a value, not a function, as 'table'"),
    ],
)
@pytest.mark.usefixtures("module")
def test_functions_that_cannot_be_loaded(name: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        load_judge(f"python:{name}")


# --- classifiers ------------------------------------------------------------------------------------------------------


def tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **settings)


def classifier(folder: Path, family: str = "bert", pad: bool = True, **settings: Any) -> Any:
    """A random model of three labels, saved to a folder with its tokenizer; also returned, for its plain forward."""
    shape = {"vocab_size": len(WORDS) + 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {**shape, "intermediate_size": 16, "max_position_embeddings": 34, "id2label": LABELS, **settings}
    kinds: dict[str, Any] = {
        "bert": (BertConfig, BertForSequenceClassification),
        "llama": (LlamaConfig, LlamaForSequenceClassification),
    }
    config, model_class = kinds[family]
    torch.manual_seed(0)
    model = model_class(config(pad_token_id=0 if pad else None, **common)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5)
        if family == "bert":  # else its biases would decide for every answer
            model.classifier.bias -= plain(model, answers()[1:-1]).mean(dim=0)
    model.save_pretrained(folder)
    tokenizer(**({"pad_token": "<pad>"} if pad else {})).save_pretrained(folder)
    return model


def answers() -> list[str]:
    """Forty answers of 1 to 60 words, more than a batch and longer than the model reads, and two without a word."""
    rng = np.random.default_rng(1)
    return ["", *(" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(40)), "  "]


def plain(model: Any, given: Sequence[str]) -> torch.Tensor:
    """[answer, label]: logits of one answer at a time, cut to the 32 tokens the model reads."""
    rows = [tokenizer()(answer, return_tensors="pt")["input_ids"][:, :32] for answer in given]
    with torch.no_grad():
        return torch.cat([model(input_ids=row).logits for row in rows])


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("pad", [True, False])
def test_a_classifier_says_harmful_where_that_label_is_highest(tmp_path: Path, family: str, pad: bool) -> None:
    model, given = classifier(tmp_path / "model", family, pad), answers()
    highest = plain(model, given[1:-1]).argmax(dim=1)
    assert set(highest.tolist()) == {0, 1, 2}
    for number, label in LABELS.items():
        judge = load_judge(f"classifier:{tmp_path / 'model'}:{label}")
        assert judge(["p"] * len(given), given) == [False, *(highest == number).tolist(), False]


def test_labels_that_do_not_exclude_each_other_count_from_one_half(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", problem_type="multi_label_classification")
    given = answers()[1:-1]
    expected = torch.sigmoid(plain(model, given))[:, 1] >= 0.5
    highest = plain(model, given).argmax(dim=1) == 1
    assert expected.tolist() != highest.tolist()
    assert load_judge(f"classifier:{tmp_path / 'model'}")(given, given) == expected.tolist()


def test_a_single_label_counts_from_one_half(tmp_path: Path) -> None:
    model = classifier(tmp_path / "model", id2label={0: "harmful"}, num_labels=1)
    given = answers()[1:-1]
    expected = torch.sigmoid(plain(model, given))[:, 0] >= 0.5
    assert len(set(expected.tolist())) == 2
    assert load_judge(f"classifier:{tmp_path / 'model'}")(given, given) == expected.tolist()


def test_the_label_is_harmful_where_none_is_named_and_folders_may_have_colons(tmp_path: Path) -> None:
    given = answers()
    for name in ("model", "mod:el"):
        classifier(tmp_path / name)
        bare, named = (load_judge(f"classifier:{tmp_path / name}{label}") for label in ("", ":harmful"))
        assert bare(given, given) == named(given, given)
        assert any(bare(given, given))


def test_no_answers_need_no_model(tmp_path: Path) -> None:
    classifier(tmp_path / "model")
    assert load_judge(f"classifier:{tmp_path / 'model'}")([], []) == []


def test_classifiers_that_cannot_be_used(
    tmp_path: Path, subject: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    classifier(tmp_path / "model")
    with pytest.raises(JudgeError, match="no label 'unsafe'; its labels are safe, harmful, unclear: write"):
        load_judge(f"classifier:{tmp_path / 'model'}:unsafe")
    with pytest.raises(JudgeError, match=r"was not trained to classify, it lacks score\.weight; give a text-class"):
        load_judge(f"classifier:{subject('llama').info.name}:LABEL_1")
    for name in ("nowhere", "nobody/no-such-model:harmful"):
        with pytest.raises(JudgeError, match=r"cannot load classifier .*; give a local folder or a hub id"):
            load_judge(f"classifier:{name}")
    (tmp_path / "model/model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(JudgeError, match="cannot load classifier"):
        load_judge(f"classifier:{tmp_path / 'model'}")


# --- quality ----------------------------------------------------------------------------------------------------------


class Says:
    """A judge whose verdicts are given."""

    name = "says"

    def __init__(self, verdicts: Sequence[int]) -> None:
        self.verdicts = [bool(verdict) for verdict in verdicts]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        return self.verdicts


def labelled(labels: Sequence[int]) -> list[Labelled]:
    return [Labelled("p", f"answer {number}", bool(label)) for number, label in enumerate(labels)]


def cells(both: int, missed: int, false_alarm: int, neither: int) -> tuple[list[int], list[int]]:
    """Labels and verdicts with so many answers in each cell."""
    truth = [1] * (both + missed) + [0] * (false_alarm + neither)
    return truth, [1] * both + [0] * missed + [1] * false_alarm + [0] * neither


def test_quality_against_longhand_formulas() -> None:
    a, b, c, d = 19, 6, 14, 21
    truth, said = cells(a, b, c, d)
    n = a + b + c + d
    judge: Judge = Says(said)
    found = check_judge(judge, labelled(truth), np.random.default_rng(0), resamples=200)
    assert (found.judge, found.n, found.harmful) == ("says", n, a + b)
    shares = {"accuracy": (a + d, n), "recall": (a, a + b), "specificity": (d, c + d)}
    for name, (successes, trials) in shares.items():
        share = getattr(found, name)
        assert share.n_pairs == trials
        assert share.value == pytest.approx(successes / trials)
        assert (share.low, share.high) == pytest.approx(proportion_confint(successes, trials, method="wilson"))
        assert share.reason == ""
    observed = (a + d) / n
    chance = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
    assert found.kappa.value == pytest.approx((observed - chance) / (1 - chance))
    assert found.kappa.value == pytest.approx(cohen_kappa_score(truth, said))


def test_the_interval_of_kappa_is_a_bootstrap_over_answers() -> None:
    truth, said = (np.array(side) for side in cells(40, 15, 20, 45))
    found = cohen_kappa(truth, said, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    draws = [rng.integers(0, len(truth), len(truth)) for _ in range(1000)]
    resampled = [cohen_kappa_score(truth[drawn], said[drawn]) for drawn in draws]
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found == cohen_kappa(truth, said, np.random.default_rng(0))


@pytest.mark.parametrize("truth", [[1, 1, 1], [0, 0, 0]])
def test_labels_of_one_class(truth: list[int]) -> None:
    found = check_judge(Says([1, 0, 1]), labelled(truth), np.random.default_rng(0))
    missing = found.specificity if truth[0] else found.recall
    assert math.isnan(missing.value)
    assert missing.reason == ("all answers are" if truth[0] else "no answer is") + " labelled harmful"
    assert math.isnan(found.kappa.value)
    assert math.isnan(found.kappa.low)
    assert found.kappa.reason == "all labels are the same"
    assert not math.isnan(found.accuracy.value)


def test_no_answers_at_all() -> None:
    found = check_judge(Says([]), [], np.random.default_rng(0))
    assert (found.n, found.accuracy.reason, found.kappa.reason) == (0, "no answers", "no labels")


@pytest.mark.parametrize(("said", "kappa"), [([1] * 10 + [0] * 10, 1.0), ([1] * 20, 0.0)])
def test_a_kappa_that_no_resample_changes_is_a_point_without_spread(said: list[int], kappa: float) -> None:
    found = check_judge(Says(said), labelled([1] * 10 + [0] * 10), np.random.default_rng(0)).kappa
    assert found.low == found.value == found.high == kappa
    assert found.reason == "no spread"


def test_kappa_refuses_sides_of_unequal_length() -> None:
    with pytest.raises(ValueError, match=r"must both be \[item\]; got \(2,\) and \(3,\)"):
        cohen_kappa([1, 0], [1, 0, 1], np.random.default_rng(0))


def test_the_table_shows_every_number_and_why_one_is_missing() -> None:
    truth, said = cells(2, 2, 1, 3)
    table = judge_table(check_judge(Says(said), labelled(truth), np.random.default_rng(0), resamples=200))
    assert table.header[0] == "judge says"
    shown = {row[0].split(",")[0]: (row[1].split()[0], row[2]) for row in table.rows}
    assert shown == {"accuracy": ("62.5%", "8"), "recall": ("50%", "4"), "specificity": ("75%", "4")} | {
        "Cohen's kappa": ("0.25", "8")
    }
    one_class = judge_table(check_judge(Says([1]), labelled([1]), np.random.default_rng(0)))
    assert "n/a [n/a]" in one_class.rows[2][1]
    assert "- specificity, others let pass: all answers are labelled harmful" in one_class.markdown()


# --- labelled answers -------------------------------------------------------------------------------------------------


def test_labelled_answers_are_read(tmp_path: Path) -> None:
    rows = [("p", "a, b\nc", " TRUE "), ("q", "", "0"), ("r", 'say "no"', "False"), ("s", "x", "1")]
    with (tmp_path / "mine.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("prompt", "answer", "harmful", "id"))
        writer.writerows((*row, number) for number, row in enumerate(rows))
    found = load_labelled(str(tmp_path / "mine.csv"))
    assert [record.harmful for record in found] == [True, False, False, True]
    assert [(record.prompt, record.answer) for record in found] == [row[:2] for row in rows]


HEAD = "prompt,answer,harmful\n"
FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot read labelled answers .*No such file.*; give a CSV file"),
    "binary": (b"\xff\xfe\x00", "cannot read labelled answers .*can't decode.*; give a CSV file"),
    "empty": (b"", "has no column 'prompt'; it needs prompt, answer, harmful"),
    "columns": (b"prompt,answer,label\na,b,1\n", "has no column 'harmful'"),
    "rows": (HEAD.encode(), "holds no labelled answers; give at least one row"),
    "value": ((HEAD + 'a,"b\nb",1\n\na,b,yes\n').encode(), r", line 5: harmful is 'yes'; write 1, 0, true or false"),
    "lines": ((HEAD + 'a,"b\nb",2\n').encode(), ", line 2: harmful is '2'"),
    "score": ((HEAD + "a,b,0.7\n").encode(), ", line 2: harmful is '0.7'"),
    "blank": ((HEAD + "a,b,1\na,b,\n").encode(), ", line 3: harmful is ''"),
    "short": ((HEAD + "a,b\n").encode(), ", line 2: fewer cells than columns"),
    "long": ((HEAD + "a,b,c,1\n").encode(), ", line 2: more cells than columns; quote cells that hold commas"),
    "quote": ((HEAD + 'a,"b,1\n').encode(), "are not CSV: unexpected end of data"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    if content is not None:
        (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(JudgeError, match=message) as caught:
        load_labelled(str(tmp_path / "mine.csv"))
    assert len(str(caught.value).splitlines()) == 1


def test_the_built_in_answers_are_ours_and_hard() -> None:
    records = load_labelled()
    assert len(records) == 60
    assert len({(record.prompt, record.answer) for record in records}) == 60
    assert 20 <= sum(record.harmful for record in records) <= 40
    pairs = Path(load_labelled.__code__.co_filename).parent / "data" / "pairs.jsonl"
    harmful = {json.loads(line)["harmful"] for line in pairs.read_text("utf-8").splitlines()}
    assert not harmful & {record.prompt for record in records}  # stand-ins only
    quality = check_judge(load_judge("refusal-phrases"), records, np.random.default_rng(0), resamples=200)
    assert 0 < quality.kappa.value < 0.9  # wrong in both directions
    assert max(quality.recall.value, quality.specificity.value) < 1
