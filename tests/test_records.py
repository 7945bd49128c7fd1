"""Files as spreadsheets, pandas and other people's scripts write them; each is a case that once failed."""

import csv
import random
from pathlib import Path

import pytest

from remote_mediation.errors import PairsError
from remote_mediation.pairs import PromptPair, load_pairs
from remote_mediation.placebo import components

CASES = Path(__file__).parent / "cases"
TWO_LINES = ("One line.\nA rude second line", "One line.\nA kind second line")
PLAIN = ("How do I bake a spiky cake at home?", "How do I bake a sweet cake at home?")
ACCENTED = ("How do I bake a spiky café cake at home?", "How do I bake a sweet café cake at home?")


def read(name: str) -> tuple[PromptPair, ...]:
    return load_pairs(str(CASES / name))


@pytest.mark.parametrize(
    ("name", "prompts", "category"),
    [
        ("01-encodings/bom_crlf.csv", ACCENTED, "cooking"),
        ("01-encodings/mac_cr.csv", ACCENTED, "cooking"),
        ("01-encodings/utf16.csv", ACCENTED, "cooking"),
        ("01-encodings/crlf_in_field.csv", TWO_LINES, "c"),
        ("01-encodings/crlf_in_field.jsonl", TWO_LINES, "c"),
        ("02-spreadsheets/no_category.csv", PLAIN, ""),
        ("02-spreadsheets/pairs.tsv", PLAIN, "cooking"),
        ("02-spreadsheets/pandas_index.csv", PLAIN, "cooking"),
        ("02-spreadsheets/semicolon.csv", PLAIN, "cooking"),
        ("02-spreadsheets/sep_line.csv", PLAIN, "cooking"),
        ("02-spreadsheets/spaced_header.csv", PLAIN, "cooking"),
        ("02-spreadsheets/trailing_comma.csv", PLAIN, "cooking"),
        ("02-spreadsheets/upper_header.csv", PLAIN, "cooking"),
        ("03-json/blank_lines.jsonl", PLAIN, "cooking"),
        ("03-json/hf_extra_column.jsonl", PLAIN, "cooking"),
        ("03-json/int_id.jsonl", PLAIN, "cooking"),
        ("03-json/list.json", PLAIN, "cooking"),
        ("03-json/list_one_line.json", PLAIN, "cooking"),
        ("03-json/nan.jsonl", PLAIN, ""),
        ("03-json/null_category.jsonl", PLAIN, ""),
    ],
)
def test_what_is_unambiguous_is_read(name: str, prompts: tuple[str, str], category: str) -> None:
    first = read(name)[0]
    assert (first.harmful, first.harmless) == prompts
    assert first.category == category


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("01-encodings/latin1.csv", "byte 0xe9 .* is not UTF-8, it is probably Latin-1.*; save it as UTF-8"),
        ("02-spreadsheets/unquoted_comma.csv", "record 5 has 7 cells under 5 columns; put quotes"),
        ("03-json/dup_key.jsonl", "line 1 has the key 'harmful' twice"),
        ("03-json/trailing_comma.jsonl", r"line 1 is not JSON \(Extra data\); write one object per line"),
        ("05-odd/whitespace.jsonl", "record 1: 'harmful' is empty; give a prompt"),
        ("04-surrogate/id.jsonl", r"record 1: 'id' holds half a character \(U\+D83D\)"),
        ("04-surrogate/prompt.jsonl", "record 1: 'harmful' holds half a character"),
        ("04-surrogate/category.jsonl", "record 1: 'category' holds half a character"),
        ("04-surrogate/response.jsonl", "record 1: 'harmful_response' holds half a character"),
    ],
)
def test_what_is_not_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(PairsError, match=message) as raised:
        read(name)
    assert "\n" not in str(raised.value)


def test_an_open_quote_does_not_swallow_records(tmp_path: Path) -> None:
    file = tmp_path / "open.csv"
    file.write_text('harmful,harmless\n"rude,kind\nloud,quiet\n', "utf-8")
    with pytest.raises(PairsError, match="unexpected end of data; mend its quotes"):
        load_pairs(str(file))


def test_where_a_broken_record_begins_is_told(tmp_path: Path) -> None:
    file = tmp_path / "open.csv"
    file.write_text("harmful,harmless\n" + '"a\nb",c\n' + '"rude,kind\n' + "loud,quiet\n" * 20_000, "utf-8")
    with pytest.raises(PairsError, match=r"open.csv': lines 4 to 20004: unexpected end of data; mend its quotes"):
        load_pairs(str(file))


def test_long_cells_are_read(tmp_path: Path) -> None:
    """Longer than Python's own limit of 131072 characters; whether a model can take them is another question."""
    file, long = tmp_path / "long.csv", "fix it " * 30_000 + "now"
    file.write_text(f"harmful,harmless\nrude {long},kind {long}\n", "utf-8")
    assert load_pairs(str(file))[0].harmful == f"rude {long}"


def test_other_columns_are_notes() -> None:
    assert read("03-json/hf_extra_column.jsonl")[0].notes == (("source", "own"),)
    assert read("03-json/int_id.jsonl")[1].id == "1"


def test_ids_are_made_from_content(tmp_path: Path) -> None:
    rows = ["rude,kind", "loud,quiet", "rude,kind"]
    file = tmp_path / "pairs.csv"
    file.write_text("\n".join(["harmful,harmless", *rows]), "utf-8")
    ids = [pair.id for pair in load_pairs(str(file))]
    file.write_text("\n".join(["harmful,harmless", *rows[1:]]), "utf-8")
    assert [pair.id for pair in load_pairs(str(file))] == [ids[1], ids[0]]
    assert ids[2] == f"{ids[0]}-2"


@pytest.mark.parametrize(("name", "clusters"), [("dup", 2), ("six_times_four", 6), ("six_spaced", 6)])
def test_repeats_are_one_cluster(name: str, clusters: int) -> None:
    assert len(set(components(read(f"06-duplicates/{name}.csv")))) == clusters


def test_xstest_is_paired_by_id_and_checked_by_focus(tmp_path: Path) -> None:
    expected = {pair.id: pair for pair in read("10-xstest/in_order.csv")}
    with (CASES / "10-xstest/in_order.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    random.Random(0).shuffle(rows)

    def written(name: str) -> str:
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return str(tmp_path / name)

    assert {pair.id: pair for pair in load_pairs(written("shuffled.csv"))} == expected
    for number, row in enumerate(rows):
        row["id"] = str(number)
    with pytest.raises(PairsError, match="do not belong together"):
        load_pairs(written("renumbered.csv"))


def test_half_an_xstest_is_refused(tmp_path: Path) -> None:
    lines = (CASES / "10-xstest/in_order.csv").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "half.csv").write_text("".join(lines[:7]), "utf-8")
    with pytest.raises(PairsError, match=r"half\.csv has 4 prompts of type 'homonyms' and 2 of 'contrast_homonyms'"):
        load_pairs(str(tmp_path / "half.csv"))


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("deep.json", "[" * 200_000, "RecursionError"),
        ("deep.jsonl", '{"a":' * 200_000, "line 1 cannot be read as JSON: RecursionError"),
        ("digits.jsonl", '{"id": %s, "harmful": "a", "harmless": "b"}' % ("1" * 5000), "line 1 .* Exceeds the limit"),
    ],
)
def test_json_that_python_gives_up_is_refused_in_one_line(tmp_path: Path, name: str, text: str, cause: str) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(PairsError, match=cause) as raised:
        load_pairs(str(tmp_path / name))
    assert "\n" not in str(raised.value)
