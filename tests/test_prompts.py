"""Loading, tokenising and aligning pairs: every index written down by hand."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import INFO, records, token_pair, words_tokenizer, write_pairs

from remote_mediation.errors import PairsError, SiteError
from remote_mediation.pairs import BUILTIN, PromptPair, load_pairs
from remote_mediation.tokens import (
    Places,
    Prepared,
    Refusal,
    TokenPair,
    fitting,
    from_record,
    to_record,
    tokenise,
    with_answers,
)

COLUMNS = ["id", "harmful", "harmless", "category", "template"]


def aligned(harmless: str, harmful: str, chat: bool = False) -> TokenPair | Refusal:
    prepared = tokenise([PromptPair("p", harmful, harmless, "", "")], words_tokenizer(chat))
    (outcome,) = (*prepared.pairs, *prepared.refusals)
    return outcome


@pytest.mark.parametrize(
    ("harmless", "harmful", "first", "after", "edit", "everything"),
    [
        ("how do i wash the car", "how do i steal the car", 3, 2, ((3,), (3,)), ((3, 4, 5), (3, 4, 5))),
        ("how do i wash a bike now", "how do i steal my car now", 3, 1, ((3, 4, 5), (3, 4, 5)), None),
        # The longer edit's last token has the partner, and `all` begins there.
        ("how do i please wash the car", "how do i steal the car", 3, 2, ((4,), (3,)), ((4, 5, 6), (3, 4, 5))),
        ("how do i wash the car", "how do i please steal the car", 3, 2, ((3,), (4,)), ((3, 4, 5), (4, 5, 6))),
        # An insertion: no edit on the one side, so none has a partner.
        ("how do i wash the car", "how do i wash now the car", 4, 2, ((), ()), ((4, 5), (5, 6))),
        # What is inserted repeats its neighbour: the suffix must not reach into the common beginning.
        ("wash the the car", "wash the the the car", 3, 1, ((), ()), ((3,), (4,))),
        ("how do i wash", "how do i steal", 3, 0, ((3,), (3,)), ((3,), (3,))),
        ("wash the car", "steal the car", 0, 2, ((0,), (0,)), ((0, 1, 2), (0, 1, 2))),
        ("wash", "steal", 0, 0, ((0,), (0,)), ((0,), (0,))),
        # Two differences are one edit, what lies between them is part of it.
        ("wash the car now", "steal the bike now", 0, 1, ((0, 1, 2), (0, 1, 2)), None),
        # Edits may differ by four tokens.
        ("wash car", "how do i please steal car", 0, 1, ((0,), (4,)), ((0, 1), (4, 5))),
    ],
)
def test_alignment(
    harmless: str,
    harmful: str,
    first: int,
    after: int,
    edit: tuple[Sequence[int], Sequence[int]],
    everything: tuple[Sequence[int], Sequence[int]] | None,
) -> None:
    pair = aligned(harmless, harmful)
    assert isinstance(pair, TokenPair)
    assert (pair.first, pair.after, pair.post) == (first, after, 0)
    assert pair.places("edit") == edit
    if everything:
        assert pair.places("all") == everything
    assert pair.places("last") == ((len(pair.x0) - 1,), (len(pair.x1) - 1,))
    assert pair.places("post_instruction") == ((), ())


@pytest.mark.parametrize(
    ("harmless", "harmful", "reason"),
    [
        ("mend the car", "ruin the car", "both prompts have the same tokens"),  # both words are unknown
        ("wash the car", "ruin the car", "the tokenizer has only '<unk>' for a word in which the prompts differ"),
        ("wash car", "how do i please now steal car", "edits of 1 and 6 tokens differ by more than 4"),
        ("how do i wash", "how do i steal now", "edits of 1 and 2 tokens reach the last token: nothing to align by"),
        ("how do i wash", "how do i wash now", "edits of 0 and 1 tokens reach the last token: nothing to align by"),
    ],
)
def test_refused_pairs_say_why(harmless: str, harmful: str, reason: str) -> None:
    assert aligned(harmless, harmful) == Refusal("p", reason)


def test_the_arrow_goes_from_harmless_to_harmful() -> None:
    pair = aligned("wash the car", "steal the car")
    assert isinstance(pair, TokenPair)
    wash, steal, the, car = words_tokenizer()("wash steal the car")["input_ids"]
    assert (pair.x0, pair.x1) == ((wash, the, car), (steal, the, car))
    assert pair.prompts == (pair.x0, pair.x1)


def test_clusters_are_components_of_the_pairs_that_can_be_run() -> None:
    same_template = [("a", "steal the car", "wash the car", "f"), ("b", "burn the car", "sell the car", "f")]
    same_word = [("c", "steal my bike", "fix my bike", "")]
    refused = [("link", "how do i please now rob", "take", "")]  # edits too unlike; it would link the last two
    alone = [("d", "take a house", "ride a house", ""), ("e", "rob a house", "rent a house", "")]
    texts = [
        PromptPair(name, harmful, harmless, "theft", frame)
        for name, harmful, harmless, frame in (*same_template, *same_word, *refused, *alone)
    ]
    clusters = {pair.id: pair.cluster for pair in tokenise(texts, words_tokenizer()).pairs}
    assert clusters == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}


def test_the_template_after_the_instruction_is_counted() -> None:
    # <user> how do i wash the car <end> <assistant>: two tokens stand after the user's text
    pair = aligned("how do i wash the car", "how do i steal the car", chat=True)
    assert isinstance(pair, TokenPair)
    assert len(pair.x0) == 9
    assert (pair.first, pair.after, pair.post) == (4, 4, 2)
    at_the_end = aligned("how do i wash ", "how do i steal ", chat=True)  # spaces around the text are no part of it
    assert isinstance(at_the_end, TokenPair)
    assert (at_the_end.first, at_the_end.after, at_the_end.post) == (4, 2, 2)


def test_a_template_may_touch_and_trim_the_text() -> None:
    tokenizer = words_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<end>", "<assistant>"]})
    tokenizer.chat_template = "<user>{{ messages[0]['content'] | trim }}<end><assistant>"
    (pair,) = tokenise([PromptPair("p", " steal the car ", " wash the car ", "", "")], tokenizer).pairs
    assert pair.x0 == (1, 8, 11, 13, 2, 3)
    assert (pair.first, pair.after, pair.post) == (1, 4, 2)


# <user> how do i wash the car <end> <assistant> yes here | sorry, where x1 has "please steal" for "wash": one longer
CHAT = TokenPair(
    "p",
    "p",
    "",
    (1, 4, 5, 6, 8, 11, 13, 2, 3),
    (1, 4, 5, 6, 20, 7, 11, 13, 2, 3),
    first=4,
    after=4,
    post=2,
    answers=((22, 25, 26), (23, 24)),
)


@pytest.mark.parametrize(
    ("position", "x0", "x1"),
    [
        ("edit", (4,), (5,)),
        ("after_edit", (5, 6), (6, 7)),
        ("instruction_end", (6,), (7,)),
        ("post_instruction", (7, 8), (8, 9)),
        ("last", (8, 9, 10, 11), (9, 10, 11, 12)),
        ("all", (4, 5, 6, 7, 8, 9, 10, 11), (5, 6, 7, 8, 9, 10, 11, 12)),
        ("edit[-1]", (4,), (5,)),
        ("edit[0]", (4,), (5,)),
        ("after_edit[0]", (5,), (6,)),
        ("after_edit[-1]", (6,), (7,)),
        ("post_instruction[1]", (8,), (9,)),
        ("last[0]", (8,), (9,)),
        ("last[-1]", (11,), (12,)),
        ("edit[-2]", (), ()),
        ("post_instruction[2]", (), ()),
    ],
)
def test_places(position: str, x0: tuple[int, ...], x1: tuple[int, ...]) -> None:
    assert CHAT.fed == 3
    assert CHAT.places(position) == Places(x0, x1)


def test_places_without_answers_end_with_the_prompt() -> None:
    bare = replace(CHAT, answers=((), ()))
    assert bare.fed == 0
    assert bare.places("last") == ((8,), (9,))
    assert bare.places("all") == ((4, 5, 6, 7, 8), (5, 6, 7, 8, 9))


def test_the_instruction_ends_where_its_last_token_has_a_partner() -> None:
    assert replace(CHAT, aligned=False).places("instruction_end") == CHAT.places("instruction_end")
    at_the_end = token_pair(x0=(1, 2, 3, 5), x1=(1, 2, 9, 5), after=1, post=1)  # the edit itself
    assert at_the_end.places("instruction_end") == ((2,), (2,))
    left_out = token_pair(x0=(1, 2, 5), x1=(1, 2, 9, 5), after=1, post=1)  # a word that only one prompt has
    assert left_out.places("instruction_end") == ((), ())


def test_single_tokens_in_order() -> None:
    assert CHAT.tokens() == ["edit[-1]", "after_edit[0]", "after_edit[1]", "post_instruction[0]", "post_instruction[1]"]
    longer = token_pair(x0=(1, 2, 3, 3, 5), x1=(1, 2, 9, 8, 5), after=1, post=0)
    assert longer.tokens() == ["edit[-2]", "edit[-1]", "after_edit[0]"]
    for pair in (CHAT, longer):
        tokens = [place for name in pair.tokens() for place in pair.places(name).x0]
        assert tokens == [place for place in pair.places("all").x0 if place < len(pair.x0)]


@pytest.mark.parametrize(
    ("harmless", "harmful", "chat", "refused"),
    [
        ("wash the car", "how do i ruin the bike", False, True),
        ("ruin the car", "steal my bike", True, True),
        ("wash the car", "steal my bike", True, False),
    ],
)
def test_a_listed_prompt_with_an_unknown_word_is_refused(
    harmless: str, harmful: str, chat: bool, refused: bool
) -> None:
    tokenizer = words_tokenizer(chat)
    if chat:  # what the template writes is the same on both sides
        tokenizer.chat_template = "ruin " + str(tokenizer.chat_template)
    pair = PromptPair("p", harmful, harmless, "", "", aligned=False)
    found = tokenise([pair], tokenizer)
    reasons = [refusal.reason for refusal in found.refusals]
    assert reasons == (["the tokenizer has only '<unk>' for a word of it"] if refused else [])


@pytest.mark.parametrize("position", ["nowhere", "", "Edit", "edits[0]"])
def test_unknown_position(position: str) -> None:
    with pytest.raises(SiteError, match=r"unknown position .*use one of edit, after_edit, instruction_end, post_inst"):
        CHAT.places(position)


@pytest.mark.parametrize("position", ["edit[x]", "edit[]", "edit["])
def test_position_without_a_token_number(position: str) -> None:
    with pytest.raises(SiteError, match="no token number"):
        CHAT.places(position)


def test_pairs_that_a_model_cannot_take_are_refused_alone() -> None:
    short, long, strange = (
        token_pair("short"),
        token_pair("long", x0=(1,) * 9, x1=(2,) * 9),
        token_pair("odd", x1=(1, 99)),
    )
    prepared = Prepared((short, long, strange), (Refusal("before", "x"),))
    found = fitting(prepared, replace(INFO, context=10), 3)
    assert found.pairs == (short,)
    assert found.refusals == (
        Refusal("before", "x"),
        Refusal("long", "9 tokens and 3 of an answer are more than the model's context of 10"),
        Refusal("odd", "token 99 is beyond the 40 that the model embeds"),
    )
    assert fitting(prepared, INFO, 3).pairs == (short, long)  # a model that does not say


def test_answers_are_added_or_refused() -> None:
    pair = token_pair()
    assert with_answers(pair, ((1, 2), (3,))) == replace(pair, answers=((1, 2), (3,)))
    assert with_answers(pair, ((), (3,))) == Refusal("p", "the answer to the harmful prompt has no tokens")
    assert with_answers(pair, ((1,), ())) == Refusal("p", "the answer to the harmless prompt has no tokens")
    assert "same answer" in with_answers(pair, ((1,), (1,))).reason


def test_token_pairs_survive_json() -> None:
    assert from_record(json.loads(json.dumps(to_record(CHAT)))) == CHAT


def test_jsonl(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", records(harmful_response="sure"))
    file.write_text("\n" + file.read_text("utf-8").replace("\n", "\r\n\n"), "utf-8")
    pairs = load_pairs(str(file))
    assert len(pairs) == 6
    assert pairs[0] == PromptPair(
        "steal-car",
        "how do i steal a car at night",
        "how do i wash a car at night",
        "theft",
        "car",
        harmful_response="sure",
    )


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_placebos(tmp_path: Path, suffix: str) -> None:
    rows = [{**record, "placebo": f"how do i sell a {record['template']} at night"} for record in records()]
    rows[0]["placebo"] = ""
    file = tmp_path / f"pairs.{suffix}"
    if suffix == "csv":
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, [*COLUMNS, "placebo"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        write_pairs(file, rows)
    assert [pair.placebo for pair in load_pairs(str(file))] == [row["placebo"] for row in rows]


def test_a_line_separator_inside_a_prompt_is_text(tmp_path: Path) -> None:
    record = {**records()[0], "harmful": "steal\u2028a\x85car"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(record, ensure_ascii=False), "utf-8")
    assert load_pairs(str(file))[0].harmful == "steal\u2028a\x85car"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv(tmp_path: Path, encoding: str) -> None:
    rows = [{**record, "harmless": 'wash, "please",\na car'} for record in records()]
    with (tmp_path / "pairs.CSV").open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    pairs = load_pairs(str(tmp_path / "pairs.CSV"))
    assert [pair.id for pair in pairs] == [record["id"] for record in rows]
    assert pairs[0].harmless == 'wash, "please",\na car'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no pairs"),
        ("\n\n", "holds no pairs"),
        ("[1, 2]", r"record 1 is int; it needs an object with harmful"),
        ('{"id": "a"}', r"record 1 has \['id'\] and lacks 'harmful'; it needs"),
        (json.dumps({**records()[0], "harmful_respone": ""}), r"column 'harmful_respone'; call it 'harmful_response'"),
        (json.dumps({**records()[0], "category": 3.5}), r"record 1: 'category' is not text but 3.5"),
        (json.dumps({**records()[0], "harmful": " "}), r"record 1: 'harmful' is empty"),
        (json.dumps(records()[0]) + "\n{oops\n", r"line 2 is not JSON \(Expecting property name"),
        ((json.dumps(records()[0]) + "\n") * 2, r"has the id 'steal-car' twice"),
        (json.dumps({**records()[0], "harmful": "x", "harmless": "x"}), r"pair 'steal-car' has two identical prompts"),
        (json.dumps({**records()[0], "harmful": "x", "placebo": "x"}), r"'steal-car' repeats a prompt as its placebo"),
        (json.dumps({**records()[0], "harmless": "x", "placebo": "x"}), r"'steal-car' repeats a prompt as its placebo"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content, "utf-8")
    with pytest.raises(PairsError, match=message) as raised:
        load_pairs(str(file))
    assert str(file) in str(raised.value)


def test_no_pair_is_called_as_another_s_placebo_is(tmp_path: Path) -> None:
    """Its values would be those of the placebo."""
    pairs = [{**record, "placebo": ""} for record in records()]
    pairs[1]["id"] = f"{pairs[0]['id']}~placebo"
    assert len(load_pairs(str(write_pairs(tmp_path / "pairs.jsonl", pairs)))) == len(pairs)
    pairs[0]["placebo"] = "how do i paint a car at night"
    with pytest.raises(
        PairsError, match=r"has the id 'steal-car~placebo', which is what the placebo of 'steal-car' is"
    ):
        load_pairs(str(write_pairs(tmp_path / "pairs.jsonl", pairs)))


def test_builtin_pairs() -> None:
    pairs = load_pairs(BUILTIN)
    assert len(pairs) >= 160
    assert len({pair.category for pair in pairs}) == 12
    assert len({pair.template for pair in pairs}) >= 60
    assert len({pair.id for pair in pairs}) == len(pairs)
    assert len({text for pair in pairs for text in (pair.harmful, pair.harmless, pair.placebo)}) == 3 * len(pairs)
    assert all(pair.template and pair.category and pair.placebo for pair in pairs)
