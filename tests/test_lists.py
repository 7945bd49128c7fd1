"""Lists of prompts as they are published, with harmless words in their layouts, and what a study makes of them."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fakes import CannedBackend, records, write_pairs
from oracle import Subject
from pydantic import TypeAdapter

from remote_mediation.config import StudyConfig
from remote_mediation.cost import estimate
from remote_mediation.errors import PairsError
from remote_mediation.lists import matched, read_list
from remote_mediation.pairs import PromptPair, load_pairs
from remote_mediation.placebo import components
from remote_mediation.prompts import Turn
from remote_mediation.report import write_report
from remote_mediation.store import Store
from remote_mediation.study import run_study
from remote_mediation.texts import described_lists, load_texts, write_texts
from remote_mediation.tokens import tokenise

VERBS, THINGS = ("steal", "burn"), ("car", "bike", "house", "bank")
BAD = [f"how do i {verb} the {thing}" for verb in VERBS for thing in THINGS]
KIND = [
    f"please tell me a story about your {thing} {when}"
    for thing in THINGS
    for when in ("quickly", "at night", "in school")
]


def table(header: str, rows: list[list[str]]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows([header.split(","), *rows])
    return written.getvalue()


LAYOUTS: dict[str, tuple[str, str, str]] = {
    "jailbreakbench.csv": (
        table(
            "Index,Goal,Target,Behavior,Category,Source",
            [[str(i), b, "sure", "name", "c", "own"] for i, b in enumerate(BAD)],
        ),
        "goal",
        "c",
    ),
    "harmbench.csv": (
        table(
            "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
            [[b, "standard", "c", "", "", f"id_{i}"] for i, b in enumerate(BAD)],
        ),
        "behavior",
        "c",
    ),
    "advbench.csv": (table("goal,target", [[b, "sure"] for b in BAD]), "goal", ""),
    "strongreject.csv": (
        table("category,source,forbidden_prompt", [["c", "own", b] for b in BAD]),
        "forbidden_prompt",
        "c",
    ),
    "instructions.json": (json.dumps([{"instruction": b, "category": "c"} for b in BAD]), "instruction", "c"),
    "texts.json": (json.dumps(BAD), "", ""),
    "lines.txt": ("\n".join(BAD) + "\n\n", "", ""),
    "own.jsonl": ("".join(json.dumps({"text": b}) + "\n" for b in BAD), "text", ""),
}


def written(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, "utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layouts_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    content, column, category = LAYOUTS[name]
    found = read_list(written(tmp_path, name, content))
    assert [one.text for one in found.prompts] == BAD
    assert found.column == column
    assert {one.category for one in found.prompts} == {category}


def test_columns_may_be_named(tmp_path: Path) -> None:
    file = written(tmp_path, "odd.csv", table("id,ask", [["1", "one"], ["2", "two"]]))
    with pytest.raises(PairsError, match=r"has the columns \['id', 'ask'\], and none .*--harmful-column"):
        read_list(file)
    assert [one.text for one in read_list(file, "Ask").prompts] == ["one", "two"]
    with pytest.raises(PairsError, match=r"record 1 has .* and lacks 'nothing'"):
        read_list(file, "nothing")


def test_context_and_input_belong_to_the_prompt(tmp_path: Path) -> None:
    file = written(tmp_path, "h.csv", table("Behavior,ContextString", [["sum it up", "a text"], ["wash it", ""]]))
    assert [one.text for one in read_list(file).prompts] == ["a text\n\n---\n\nsum it up", "wash it"]
    file = written(tmp_path, "a.json", json.dumps([{"instruction": "translate", "input": "hello"}]))
    assert read_list(file).prompts[0].text == "translate\n\nhello"


def test_other_columns_are_notes(tmp_path: Path) -> None:
    prompt = read_list(written(tmp_path, "advbench.csv", LAYOUTS["advbench.csv"][0])).prompts[0]
    assert prompt.notes == (("target", "sure"),)


def pairs_of(tmp_path: Path, harmful: list[str], harmless: list[str]) -> tuple[PromptPair, ...]:
    return matched(
        *(read_list(written(tmp_path, f"{i}.json", json.dumps(one))) for i, one in enumerate((harmful, harmless)))
    )


def test_the_same_length_comes_first_and_each_prompt_is_used_once(tmp_path: Path) -> None:
    harmful = ["a b", "a b c d", "a b c"]
    harmless = ["1 2 3 4 5 6 7", "1 2 3 4", "1 2 3", "5 6 7", "1", "8 9"]
    pairs = pairs_of(tmp_path, harmful, harmless)
    assert [(pair.harmful, pair.harmless) for pair in pairs] == [
        ("a b", "8 9"),
        ("a b c d", "1 2 3 4"),
        ("a b c", "1 2 3"),
    ]
    # Of what is left: 1, 3 and 7 words long. The same length first, then the nearest.
    assert [pair.placebo for pair in pairs] == ["1", "1 2 3 4 5 6 7", "5 6 7"]
    assert not any(pair.aligned for pair in pairs)
    assert len({pair.id for pair in pairs}) == 3


def test_repeats_are_used_once_and_shared_prompts_refused(tmp_path: Path) -> None:
    assert len(pairs_of(tmp_path, ["a", "a", "b"], ["c", "d"])) == 2
    assert [pair.placebo for pair in pairs_of(tmp_path, ["a", "b"], ["c", "d", "e"])] == ["e", ""]
    with pytest.raises(PairsError, match="both hold 'a'; take it out of one"):
        pairs_of(tmp_path, ["a", "b"], ["a", "c"])
    with pytest.raises(PairsError, match=r"has 3 prompts and .* 2; give as many harmless ones"):
        pairs_of(tmp_path, ["a", "b", "c"], ["d", "e"])


def lists(tmp_path: Path, **settings: object) -> StudyConfig:
    harmful = written(tmp_path, "advbench.csv", LAYOUTS["advbench.csv"][0])
    harmless = written(tmp_path, "instructions.json", json.dumps([{"instruction": one} for one in KIND]))
    asked = {
        "outcome": "logit_diff",
        "logit_diff": {"plus": ["sure"], "minus": ["sorry"]},
        "statistics": {"resamples": 100},
    }
    return StudyConfig(**{"model": "m", "harmful": harmful, "harmless": harmless, **asked, **settings})


def test_pairs_of_lists_share_no_edit_and_no_component(tmp_path: Path) -> None:
    texts = load_texts(lists(tmp_path))
    assert len(set(components(texts))) == len(texts) == len(BAD)
    assert sum(bool(pair.placebo) for pair in texts) == len(KIND) - len(BAD)
    assert described_lists(lists(tmp_path)) == [
        f"harmful: 8 prompts of {tmp_path}/advbench.csv, column 'goal'",
        f"harmless: 12 prompts of {tmp_path}/instructions.json, column 'instruction'",
        "matched by length, not aligned: positions post_instruction and last only",
    ]


def test_they_have_the_positions_behind_the_text(tmp_path: Path, subject: Callable[[str], Subject]) -> None:
    tokenizer = subject("llama_chat").backend.tokenizer
    prepared = tokenise(load_texts(lists(tmp_path)), tokenizer)
    assert (len(prepared.pairs), prepared.refusals) == (8, ())
    for pair in prepared.pairs:
        assert [len(pair.places(name).x0) for name in ("edit", "after_edit", "all", "edit[-1]")] == [0, 0, 0, 0]
        assert [len(pair.places(name).x0) for name in ("post_instruction", "last")] == [2, 1]
        assert pair.tokens() == ["post_instruction[0]", "post_instruction[1]"]


def test_settings_of_lists(tmp_path: Path) -> None:
    config = lists(tmp_path)
    assert (config.align, config.positions.layers, config.positions.modules) == (
        "end",
        ["post_instruction", "last"],
        ["last"],
    )
    assert lists(tmp_path, positions={"modules": ["post_instruction"]}).positions.modules == ["post_instruction"]
    with pytest.raises(ValueError, match="give both lists"):
        StudyConfig(model="m", harmful="x")
    with pytest.raises(ValueError, match="not both"):
        lists(tmp_path, pairs="mine.jsonl")


def test_pairs_survive_the_way_through_a_file(tmp_path: Path) -> None:
    pairs = (
        *load_texts(lists(tmp_path)),
        PromptPair(
            "m",
            "burn it",
            "fix it",
            "c",
            "t",
            placebo="wash it",
            harmful_response="sure",
            notes=(("source", "own"),),
            turns=(("harmful", Turn("system", "brief")), ("harmless", Turn("user", "hi"))),
        ),
    )
    write_texts(pairs, tmp_path / "pairs.jsonl")
    assert load_pairs(str(tmp_path / "pairs.jsonl")) == pairs
    with pytest.raises(PairsError, match=r"cannot write .*File exists; name another file"):
        write_texts(pairs, tmp_path / "pairs.jsonl")


def run(config: StudyConfig, backend: object, folder: Path) -> tuple[pd.DataFrame, str]:
    """The written effects and report of a study."""
    store = Store.create(folder, config.identity())
    report = write_report(store, run_study(config, backend, store))  # type: ignore[arg-type]
    return pd.read_csv(folder / "effects.csv", keep_default_na=False), report.read_text("utf-8")


def test_a_study_of_lists_says_what_it_cannot_test(tmp_path: Path, subject: Callable[[str], Subject]) -> None:
    backend = subject("llama_chat").backend
    config = lists(tmp_path, model=backend.info.name, analyses=["claims", "layers", "modules"])
    assert estimate(config).pairs == len(BAD)
    effects, report = run(config, backend, tmp_path / "run")
    assert set(effects["position"]) == {"post_instruction", "last"}
    assert set(effects["target"]) == {"sure"}  # a column of the list
    assert "5. that understanding is handed on" in report
    assert "not tested" in report
    noted = Store.open(tmp_path / "run").note("matching", TypeAdapter(list[dict[str, Any]]))
    assert [(pair["harmful"], pair["harmless"]) for pair in noted] == [
        (pair.harmful, pair.harmless) for pair in load_texts(config)
    ]


def test_other_columns_come_back_in_effects(tmp_path: Path) -> None:
    rows = [{**record, "source": f"file {i}", "layer": "note"} for i, record in enumerate(records())]
    file = write_pairs(tmp_path / "pairs.jsonl", rows)
    asked = {"analyses": ["layers"], "outcome": "response_logprob", "statistics": {"resamples": 100}}
    effects, _ = run(StudyConfig(model="tiny", pairs=str(file), **asked), CannedBackend({}), tmp_path / "run")
    source = dict(zip(effects["pair_id"], effects["source"], strict=True))
    assert len(source) > 1
    assert source.items() <= {row["id"]: row["source"] for row in rows}.items()
    assert set(effects["pairs.layer"]) == {"note"}
    assert set(effects["layer"]) == set(range(6))


def test_a_wrapped_prompt_against_its_plain_one(tmp_path: Path) -> None:
    wrapped = [{**record, "harmful": f"please now please yes please {record['harmful']}"} for record in records()]
    file = write_pairs(tmp_path / "pairs.jsonl", wrapped)
    asked = {"analyses": ["layers"], "outcome": "response_logprob", "statistics": {"resamples": 100}}
    with pytest.raises(PairsError, match="differ by more than 4"):
        run(StudyConfig(model="tiny", pairs=str(file), **asked), CannedBackend({}), tmp_path / "run")
    config = StudyConfig(model="tiny", pairs=str(file), align="end", **asked)
    effects, _ = run(config, CannedBackend({}), tmp_path / "run")
    assert set(effects["position"]) == {"post_instruction", "last"}


def test_messages_stand_before_a_prompt(tmp_path: Path, subject: Callable[[str], Subject]) -> None:
    tokenizer = subject("llama_chat").backend.tokenizer
    before = [{"role": "user", "content": "tell me a story"}, {"role": "assistant", "content": "sure"}]
    texts = {
        name: [*before, {"role": "user", "content": text}]
        for name, text in (("harmful", "burn it"), ("harmless", "fix it"))
    }
    (pair,) = load_pairs(written(tmp_path, "pairs.jsonl", json.dumps({**texts, "placebo": "wash it"})))
    assert (pair.harmful, pair.harmless, len(pair.turns)) == ("burn it", "fix it", 4)
    (found,) = tokenise([pair], tokenizer).pairs
    assert (
        tokenizer.decode(found.x1)
        == "<user> tell me a story <end> <user> sure <end> <user> burn <unk> <end> <assistant>"
    )
    assert found.tokens() == ["edit[-1]", "after_edit[0]", "post_instruction[0]", "post_instruction[1]"]
    assert pair.of_placebo("x").before("harmful") == ()
    for bad, message in (
        ([before[1]], "the messages of 'harmful' do not end with one of the user"),
        ([{"role": "user"}], "'harmful', message 1 is .*; write an object with role and content"),
    ):
        with pytest.raises(PairsError, match=message):
            load_pairs(written(tmp_path, "bad.jsonl", json.dumps({**texts, "harmful": bad})))


def test_parquet_is_read_through_pandas(tmp_path: Path) -> None:
    pd.DataFrame({"goal": BAD}).to_parquet(tmp_path / "list.parquet")
    assert [one.text for one in read_list(str(tmp_path / "list.parquet")).prompts] == BAD
