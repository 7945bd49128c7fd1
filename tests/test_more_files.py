"""Files that were read as something else: cases of our own search, each of which once gave other prompts in silence."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from remote_mediation.config import StudyConfig, load_config
from remote_mediation.errors import PairsError
from remote_mediation.lists import matched, read_list
from remote_mediation.pairs import load_pairs
from remote_mediation.placebo import components
from remote_mediation.prompts import Turn
from remote_mediation.records import read_records
from remote_mediation.texts import load_texts

HEADER = "harmful,harmless,placebo,template\n"
PAIRS = "bake a rude cake,bake a kind cake,{},{}\nknit a rude hat,knit a kind hat,{},{}\n"


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def zipped(text: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("pairs.csv", text)
    return held.getvalue()


# --- texts that other programs have changed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("bake a rude caf\N{REPLACEMENT CHARACTER}", "a character that was lost"),
        ("bake_x000D_ a rude cake", "as Excel's files write a line end"),
        ('="bake a rude cake"', "a formula of Excel"),
        ("donâ€™t bake a rude cake", "UTF-8 that was read as"),
        ("bake a rude cafÃ©", "UTF-8 that was read as"),
        ("bake a rude\u00c2\u00a0cake", "UTF-8 that was read as"),
        ("don&#39;t bake a rude cake", "as web pages write a character"),
        ("bake a &quot;rude&quot; cake &amp; tart", "as web pages write a character"),
        ("don\\u2019t bake a rude cake", "as JSON writes a character"),
        ("bake a rude caf\\u00e9", "as JSON writes a character"),
        ('"bake a rude\\ncake"', "a text as JSON writes it"),
        ('"bake a \\"rude\\" cake"', "a text as JSON writes it"),
        ("b'bake a rude cake'", "bytes as Python prints them"),
    ],
)
def test_texts_that_were_changed_on_their_way_are_refused(tmp_path: Path, text: str, what: str) -> None:
    """Each was given to the model as it stands."""
    lines = json.dumps([{"harmful": text, "harmless": "bake a kind cake"}])
    with pytest.raises(PairsError, match=f"record 1: 'harmful' holds .*, .*{what}.*; write what was meant"):
        load_pairs(written(tmp_path, "pairs.json", lines))
    with pytest.raises(PairsError, match=f"record 1: 'goal' holds .*{what}"):
        read_list(written(tmp_path, "list.json", json.dumps([{"goal": text}])))


@pytest.mark.parametrize(
    "text",
    [
        "say É, Ã or â",
        "bake & mix; R&D",
        "mede-se NÃO, 5 €",
        "bake = mix",
        "_x0_ is a name",
        '"bake" or "mix"',
        "b'or not b', he said",
        "print('\\u0041\\n')",
    ],
)
def test_texts_that_only_look_so_are_read(tmp_path: Path, text: str) -> None:
    record = {"harmful": text, "harmless": "bake a kind cake", "source": "cafÃ©"}
    (pair,) = load_pairs(written(tmp_path, "pairs.json", json.dumps([record])))
    assert (pair.harmful, dict(pair.notes)) == (text, {"source": "cafÃ©"})


def test_quotes_behind_a_blank_are_quotes(tmp_path: Path) -> None:
    """They were given to the model as part of the text, and a delimiter between them cut it in two."""
    rows = 'p1, "bake, now, a ""rude"" cake", "bake, now, a ""kind"" cake"\np2,"knit, ""a"" rude hat",a kind hat\n'
    first, second = load_pairs(written(tmp_path, "pairs.csv", "id,harmful,harmless\n" + rows))
    assert (first.harmful, first.harmless) == ('bake, now, a "rude" cake', 'bake, now, a "kind" cake')
    assert (second.harmful, second.harmless) == ('knit, "a" rude hat', "a kind hat")


def test_a_list_in_place_of_pairs_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"lacks 'harmful'; .* a list of prompts of one kind .* with --harmless"):
        load_pairs(written(tmp_path, "advbench.csv", "goal,target\nbake a cake,sure\n"))


# --- words for nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "<NA>", " nan "])
def test_words_that_scripts_write_for_nothing_are_nothing(tmp_path: Path, word: str) -> None:
    """`astype(str)` makes "nan" of a missing placebo, which was then a prompt; and one template of all missing ones."""
    pairs = load_pairs(written(tmp_path, "pairs.csv", HEADER + PAIRS.format(*[word] * 4)))
    assert [(pair.placebo, pair.template) for pair in pairs] == [("", "")] * 2
    lines = [{"harmful": "a rude hat", "harmless": "a kind hat", "template": word, "category": word, "id": word}]
    (pair,) = load_pairs(written(tmp_path, "pairs.jsonl", json.dumps(lines)))
    assert (pair.template, pair.category) == ("", "")
    assert pair.id != word


def test_a_missing_template_links_nobody(tmp_path: Path) -> None:
    rows = "bake a rude cake,bake a kind cake,,nan\nknit a loud hat,knit a soft hat,,nan\n"
    assert len(set(components(load_pairs(written(tmp_path, "pairs.csv", HEADER + rows))))) == 2


def test_a_missing_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="record 1: 'harmful' is nan; give a prompt"):
        load_pairs(written(tmp_path, "pairs.csv", HEADER + "nan,bake a kind cake,,\n"))
    listed = written(tmp_path, "list.csv", "goal,target\nbake a cake,sure\nnan,nan\n")
    assert [(one.text, one.notes) for one in read_list(listed).prompts] == [("bake a cake", (("target", "sure"),))]


@pytest.mark.parametrize("word", ["<noinput>", "noinput", "No Input", "N/A", "nan", None])
def test_words_for_no_input_are_not_put_behind_an_instruction(tmp_path: Path, word: str | None) -> None:
    file = written(tmp_path, "a.json", json.dumps([{"instruction": "name a colour", "input": word}]))
    assert read_list(file).prompts[0].text == "name a colour"


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_two_tables_in_one_file_are_refused(tmp_path: Path, mark: str) -> None:
    """`cat a.csv b.csv`, or pandas' `to_csv(mode="a")`: the second header was a pair."""
    table = "harmful,harmless\na rude cake,a kind cake\n"
    with pytest.raises(PairsError, match=r"record 2 is the header again, as where two tables are joined; take it out"):
        load_pairs(written(tmp_path, "pairs.csv", table + mark + table.upper()))
    one_column = written(tmp_path, "list.csv", f"prompt\na cake\n{mark}prompt\na hat\n")
    with pytest.raises(PairsError, match="record 2 is the header again"):
        read_list(one_column)


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\x0c", "\x85"])
def test_lines_of_text_end_at_line_feeds_only(tmp_path: Path, mark: str) -> None:
    """What is copied from web pages has line separators inside prompts; one prompt became two."""
    text = f"bake a cake{mark}with nuts\r\nknit a hat\rmend a fence\n"
    expected = [f"bake a cake{mark}with nuts", "knit a hat", "mend a fence"]
    assert read_records(written(tmp_path, "list.txt", text)) == expected


def test_line_ends_of_messages_are_those_of_texts(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "be\r\nbrief"}, {"role": "user", "content": "a rude\r\ncake"}]
    (pair,) = load_pairs(written(tmp_path, "p.jsonl", json.dumps({"harmful": said, "harmless": "a kind\r\ncake"})))
    assert (pair.harmful, pair.harmless, pair.turns[0][1].content) == ("a rude\ncake", "a kind\ncake", "be\nbrief")


# --- what is no text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("list.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a git-LFS pointer; run"),
        ("list.txt", "\n<!DOCTYPE html>\n<html><body>Not found</body></html>\n", "a web page; fetch the raw file"),
        ("list.txt", "bake a cake\nknit a hat\n".encode("utf-16-le"), "probably UTF-16 without its mark"),
        ("pairs.csv", zipped("harmful,harmless\n"), "an Excel workbook or a zip archive"),
        ("pairs.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an Excel workbook; save it as CSV"),
        ("pairs.jsonl.gz", gzip.compress(b"{}", mtime=0), r"compressed \(gzip\); unpack it"),
        ("pairs.csv", b"PAR1" + bytes(90), "Parquet; let its name end in .parquet"),
        ("pairs.jsonl.bz2", bz2.compress(b"{}"), r"compressed \(bzip2\); unpack it"),
        ("pairs.jsonl.xz", lzma.compress(b"{}"), r"compressed \(xz\); unpack it"),
        ("pairs.db", b"SQLite format 3\0" + bytes(90), "a database; export the table as CSV"),
        ("pairs.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF; save its table as CSV"),
        ("pairs.npy", b"\x93NUMPY\x01\0v\0{'descr': '|O'}", "an array of numpy; save it as CSV"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: str | bytes, what: str) -> None:
    with pytest.raises(PairsError, match=rf"cannot read pairs file .*: it is {what}") as raised:
        read_records(written(tmp_path, name, content))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        (
            "list.txt",
            "goal,target\nbake a cake,Sure\n",
            "begins with a table's header, 'goal,target'; name the file .csv",
        ),
        ("pairs.csv", "harmful,harmless\n'a rude cake','a kind cake'\n'b','c'\n", "every 'harmful' in single quotes"),
        (
            "pairs.csv",
            'harmful,harmless\n"""a rude cake""","""a kind cake"""\n"""b""","""c"""\n',
            "every 'harmful' in double quotes",
        ),
    ],
)
def test_a_table_in_another_form_than_its_name_says_is_refused(
    tmp_path: Path, name: str, content: str, what: str
) -> None:
    """Headers and cells of targets became prompts, and quotes a part of them."""
    with pytest.raises(PairsError, match=what):
        read_records(written(tmp_path, name, content))


def test_words_that_look_like_a_header_or_a_quote_are_texts(tmp_path: Path) -> None:
    assert read_records(written(tmp_path, "list.txt", "rude, kind\nor,\n")) == ["rude, kind", "or,"]
    one = read_records(written(tmp_path, "pairs.csv", "harmful,harmless\n'a' or b,c\n'd',e\n"))
    assert [record["harmful"] for record in one] == ["'a' or b", "'d'"]


def test_parquet_columns_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    """Guards what held of dates and lists; bytes were a traceback."""
    good = {"harmful": ["a"], "harmless": ["b"]}
    made = pd.DataFrame({**good, "made": pd.to_datetime(["2024-01-01"]), "all": [[1, 2]]})
    made.to_parquet(tmp_path / "pairs.parquet")
    assert load_pairs(str(tmp_path / "pairs.parquet"))[0].harmful == "a"
    pd.DataFrame({**good, "harmful": [b"\xff"]}).to_parquet(tmp_path / "bytes.parquet")
    with pytest.raises(
        PairsError, match=r"cannot read .*bytes.parquet' as Parquet: .*can't decode byte 0xff"
    ) as raised:
        load_pairs(str(tmp_path / "bytes.parquet"))
    assert "\n" not in str(raised.value)


def test_a_home_that_is_nobody_s_is_a_file_that_is_not_there() -> None:
    config = load_config(None, {"model": "m", "pairs": "~nobody-of-this-name/pairs.csv"})
    with pytest.raises(PairsError, match=r"cannot read pairs file '~nobody-of-this-name/pairs.csv'"):
        load_texts(config)


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("label", ["safe", "unsafe"]),
        ("prompt_harm_label", ["harmful", "unharmful"]),
        ("kind", ["benign", "Malicious"]),
        ("harmful", [0, 1]),
        ("toxicity", [True, False]),
        ("label", [0, 1]),
        ("is_safe", [True, False]),
    ],
)
def test_a_list_of_both_kinds_is_refused(tmp_path: Path, column: str, said: list[Any]) -> None:
    """XSTest, WildGuard's and ToxicChat's files hold harmful and harmless prompts; all were taken for harmful ones."""
    rows = [{"prompt": f"bake cake {i}", column: one} for i, one in enumerate([*said, None])]
    with pytest.raises(PairsError, match=f"holds prompts of both kinds: its column '{column}' has .*; give a list of"):
        read_list(written(tmp_path, "list.json", json.dumps(rows)))
    assert len(read_list(written(tmp_path, "one.json", json.dumps(rows[:1]))).prompts) == 1


def test_of_a_file_of_pairs_a_list_reads_its_own_side(tmp_path: Path) -> None:
    """The harmful column was read as the list of harmless prompts."""
    pairs = "harmful,harmless\na rude cake,a kind cake\na rude hat,a kind hat\n"
    other = "goal\nbreak a fence\nbreak a door\n"
    both, goals = written(tmp_path, "pairs.csv", pairs), written(tmp_path, "goals.csv", other)
    texts = load_texts(StudyConfig(model="m", harmful=goals, harmless=both))
    assert {pair.harmless for pair in texts} == {"a kind cake", "a kind hat"}
    texts = load_texts(StudyConfig(model="m", harmful=both, harmless=written(tmp_path, "own.csv", other)))
    assert {pair.harmful for pair in texts} == {"a rude cake", "a rude hat"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "sum it up", "context": "a text", "category": "c"}, "a text\n\n---\n\nsum it up"),
        ({"behavior": "sum it up", "context_string": "a text"}, "a text\n\n---\n\nsum it up"),
        ({"instruction": "sum it up", "context": "a text", "response": "it"}, "sum it up\n\na text"),
        ({"instruction": "sum it up", "context": ""}, "sum it up"),
    ],
)
def test_context_by_any_name_belongs_to_the_prompt(tmp_path: Path, row: dict[str, str], text: str) -> None:
    """HarmBench's contextual rows as data sets call them, and Dolly's, asked about a text that was not there."""
    assert read_list(written(tmp_path, "list.jsonl", json.dumps(row))).prompts[0].text == text


def test_repeats_of_a_list_are_known_whatever_their_capitals_and_blanks(tmp_path: Path) -> None:
    harmful = read_list(written(tmp_path, "bad.json", json.dumps(["Bake a cake", "bake  a cake ", "knit a hat"])))
    assert [one.text for one in harmful.prompts] == ["Bake a cake", "knit a hat"]
    harmless = read_list(written(tmp_path, "good.json", json.dumps(["mend it", "bake a CAKE"])))
    with pytest.raises(PairsError, match="both hold 'Bake a cake'; take it out of one"):
        matched(harmful, harmless)


# --- lists and objects inside a text ----------------------------------------------------------------------------------


SAID = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "bake a rude cake"}]


def cells(folder: Path, harmful: str) -> str:
    held = io.StringIO()
    pd.DataFrame({"harmful": [harmful], "harmless": ["bake a kind cake"], "category": ['["a"]']}).to_csv(
        held, index=False
    )
    return written(folder, "pairs.csv", held.getvalue())


@pytest.mark.parametrize("packed", [json.dumps(SAID), str(SAID), json.dumps({"messages": SAID}, indent=1)])
def test_a_conversation_in_a_cell_is_read(tmp_path: Path, packed: str) -> None:
    """A table has no lists: pandas writes them as Python does, other programs as JSON. Both were the prompt's text."""
    (pair,) = load_pairs(cells(tmp_path, packed))
    assert (pair.harmful, pair.before("harmful")) == ("bake a rude cake", (Turn("system", "be brief"),))
    assert pair.category == '["a"]'
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"harmful": packed, "harmless": "bake a kind cake"}), "utf-8")
    assert load_pairs(str(tmp_path / "pairs.jsonl"))[0].turns == pair.turns


@pytest.mark.parametrize(
    ("packed", "what"),
    [
        ('["bake a rude cake"]', r"message 1 is 'bake a rude cake'; write an object with role and content"),
        ('[{"from": "human", "value": "hello"}]', r"message 1 is {'from': .*; write an object with role"),
        ('{"text": "bake a rude cake"}', "'harmful' is a list or an object, .*; write the text that is in it"),
        ("[{'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'user'}]", "'harmful' is a list or an object"),
    ],
)
def test_other_lists_and_objects_in_a_cell_are_refused(tmp_path: Path, packed: str, what: str) -> None:
    with pytest.raises(PairsError, match=what):
        load_pairs(cells(tmp_path, packed))


@pytest.mark.parametrize("text", ["[INST] bake [/INST]", "[1] bake a cake", "{name}, bake a cake", "[", "[red] cake"])
def test_texts_that_begin_with_a_bracket_are_texts(tmp_path: Path, text: str) -> None:
    assert load_pairs(cells(tmp_path, text))[0].harmful == text


def test_a_list_holds_texts_and_no_conversations(tmp_path: Path) -> None:
    """And JSON lines in a file of lines, whose name ends in .txt."""
    for name, content in (
        ("list.csv", pd.DataFrame({"prompt": [json.dumps(SAID)]}).to_csv(index=False)),
        ("list.txt", '{"goal": "bake a rude cake"}\n'),
    ):
        with pytest.raises(PairsError, match=r"record 1: 'prompt' is a list or an object, .*; write the text"):
            read_list(written(tmp_path, name, content))


def test_a_response_that_is_a_list_is_refused(tmp_path: Path) -> None:
    record = {"harmful": "a rude cake", "harmless": "a kind cake", "harmful_response": '["Sure"]'}
    with pytest.raises(PairsError, match="'harmful_response' is a list or an object"):
        load_pairs(written(tmp_path, "pairs.json", json.dumps([record])))


# --- JSON over several lines ------------------------------------------------------------------------------------------


PAIR = {"id": "a", "harmful": "bake a rude\r\ncake", "harmless": "bake a kind\r\ncake"}
OTHER = {"id": "b", "harmful": "knit a rude hat", "harmless": "knit a kind hat"}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(PAIR, indent=2),
        json.dumps(PAIR, indent=2) + "\n" + json.dumps(OTHER, indent="\t") + "\n",
        json.dumps(PAIR).replace(", ", ",\n ") + "\n\n",
        json.dumps(PAIR) + json.dumps(OTHER),
        json.dumps(PAIR) + "\n" + json.dumps(OTHER, indent=1),
    ],
    ids=["one", "as jq writes them", "brace and key in a line", "no line break between", "both ways"],
)
def test_objects_of_several_lines_are_read(tmp_path: Path, text: str) -> None:
    """Such a file was said not to be JSON in its first line."""
    first, *more = load_pairs(written(tmp_path, "pairs.json", text))
    assert (first.id, first.harmful, first.harmless) == ("a", "bake a rude\ncake", "bake a kind\ncake")
    assert [pair.id for pair in more] == (["b"] if "knit" in text else [])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{\n "harmful": "a",\n "harmless" "b"\n}', r"line 3 is not JSON \(Expecting ':' delimiter\)"),
        ('{\n "harmful": "a",\n "harmful": "b"\n}', "has the key 'harmful' twice"),
        ('{\n "harmful": Infinity\n}', "has the number Infinity"),
        (json.dumps(OTHER) + "\n" + json.dumps(PAIR)[:-9], r"line 2 is not JSON \(Unterminated string"),
        (json.dumps(OTHER) + "\n" + json.dumps(PAIR, indent=1)[:-1], r"line 5 is not JSON|line 6 is not JSON"),
        (json.dumps(OTHER) + "\n" + json.dumps(PAIR) + ",\n", r"line 2 is not JSON \(Extra data\)"),
        ("{\n" * 100_000, "cannot be read as JSON: RecursionError|line 2 is not JSON"),
    ],
)
def test_where_json_of_several_lines_breaks_off_is_told(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(PairsError, match=what) as raised:
        load_pairs(written(tmp_path, "pairs.json", text))
    assert "\n" not in str(raised.value)


# --- placebos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "placebo",
    ["Bake a KIND cake", " bake a  kind cake\n", "bake a ki\u00adnd cake", "BAKE A RUDE CAKE", "bake a rude\u00a0cake"],
)
def test_a_placebo_that_looks_like_a_prompt_of_its_pair_is_refused(tmp_path: Path, placebo: str) -> None:
    """Its effect was what capitals and blanks do: next to nothing, so that any harm was \"about harm\"."""
    record = {"id": "a", "harmful": "bake a rude cake", "harmless": "bake a kind cake", "placebo": placebo}
    with pytest.raises(PairsError, match="'a' repeats a prompt as its placebo, whatever its capitals and blanks; give"):
        load_pairs(written(tmp_path, "pairs.json", json.dumps([record])))


def test_capitals_may_be_the_edit(tmp_path: Path) -> None:
    record = {"harmful": "BAKE A CAKE", "harmless": "bake a cake", "placebo": "bake a hat"}
    assert load_pairs(written(tmp_path, "pairs.json", json.dumps([record])))[0].placebo == "bake a hat"


# --- columns that look as if they were read ---------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["system", "System_Prompt", "messages", "conversations"])
def test_columns_that_look_as_if_a_model_were_given_them_are_refused(tmp_path: Path, column: str) -> None:
    """A file's system messages were kept as notes, and the study ran without them."""
    record: dict[str, Any] = {"harmful": "a rude cake", "harmless": "a kind cake", column: "be brief"}
    with pytest.raises(
        PairsError, match=f"has a column '{column.lower()}', which is given to no model: write messages"
    ):
        load_pairs(written(tmp_path, "pairs.json", json.dumps([record])))
    assert load_pairs(written(tmp_path, "none.json", json.dumps([{**record, column: None}])))


@pytest.mark.parametrize(
    ("whole", "what"),
    [
        ({"features": [], "rows": [{"row_idx": 0, "row": {"goal": "a cake"}}]}, "has the columns"),
        ({"data": [{"goal": "a cake"}]}, "has the columns"),
        ({"goal": {"0": "a cake", "1": "a hat"}}, "record 1: 'goal' is not text"),
        ({"goal": ["a cake", "a hat"]}, "record 1: 'goal' is not text"),
    ],
    ids=["a hub's viewer", "wrapped", "pandas' columns", "columns"],
)
def test_files_that_wrap_their_records_are_refused_in_one_line(tmp_path: Path, whole: Any, what: str) -> None:
    """Guards what held."""
    for indent in (None, 1):
        with pytest.raises(PairsError, match=what) as raised:
            read_list(written(tmp_path, "list.json", json.dumps(whole, indent=indent)))
        assert "\n" not in str(raised.value)
