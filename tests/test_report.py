"""Reports of synthetic studies whose answers are known by hand: what a reader must find in them, and must not."""

from __future__ import annotations

import dataclasses
import io
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from remote_mediation import report as report_module
from remote_mediation.analyses import chosen
from remote_mediation.analyses.claims.ask import SET_COLUMNS
from remote_mediation.analyses.neurons.ask import mediators
from remote_mediation.config import StatisticsSettings, StudyConfig, load_config
from remote_mediation.effects import EFFECT_COLUMNS
from remote_mediation.lab import Study
from remote_mediation.outcomes import OUTCOMES, LogitOutcome, OutcomeName
from remote_mediation.pairs import load_pairs
from remote_mediation.report import PairText, write_report
from remote_mediation.result import Analysis, Result
from remote_mediation.shares import ANY_EDIT
from remote_mediation.show.section import Verdict
from remote_mediation.show.sites import _strongest_in_words, sites_table
from remote_mediation.show.tables import literal, markdown_table, number, p_value, percent
from remote_mediation.sites import ModelInfo
from remote_mediation.store import Store
from remote_mediation.summary import SUMMARY_COLUMNS, UNITS, Identity, summarise
from remote_mediation.terminal import terminal_summary
from remote_mediation.tokens import Refusal, TokenPair

CLUSTERS = 16
LAYERS = 4
INFO = ModelInfo("planted", "", "llama", LAYERS, 8, 16, 2, 2, 4, 50, True, True, (), None)
RECORD: dict[str, Any] = {
    "study": {},
    "finished": "2026-01-02T03:04:05+00:00",
    "git": {"commit": "abc123", "dirty": True},
    "host": None,
}
TEXT = PairText("p0", "how to steal a car", "how to wash a car", "first cut the wire", "take a sponge")

Share = Callable[[int], float]
"""Share of TE that a site carries in a pair, by the pair's number."""


@dataclasses.dataclass(frozen=True)
class Planted:
    """A site and the shares of TE that are its NIE and TIE."""

    analysis: str
    component: str
    layer: int
    position: str
    nie: Share
    tie: Share
    units: tuple[int, int] | None = None


def cluster_of(pair: int) -> int:
    return pair // 2 % CLUSTERS


def constant(share: float) -> Share:
    """The same in every pair but for 0.01, which cancels over all pairs and within each split."""
    return lambda pair: share + (0.01 if cluster_of(pair) // 4 % 2 else -0.01)


def carries(analysis: str, component: str, layer: int, position: str, share: float, **more: Any) -> Planted:
    return Planted(analysis, component, layer, position, constant(share), constant(share), **more)


def modules(late: float = 0.8) -> list[Planted]:
    """The last layer's MLP carries `late`, every other module next to nothing."""
    return [
        carries("modules", component, layer, "all", late if (component, layer) == ("mlp_output", LAYERS - 1) else 0.02)
        for layer in range(LAYERS)
        for component in ("attention_output", "mlp_output")
    ]


def layers() -> list[Planted]:
    """The residual stream hands everything from `edit` to `last` in the middle, and is checked at `all`."""
    everything = [Planted("checks", "layer_output", layer, "all", lambda _: 1.0, lambda _: 1.0) for layer in (0, 3)]
    shares = {"edit": (0.9, 0.9, 0.1, 0.0), "last": (0.0, 0.1, 0.9, 0.95)}
    named = [
        carries("layers", "layer_output", layer, position, share)
        for position, by_layer in shares.items()
        for layer, share in enumerate(by_layer)
    ]
    return [*everything, *named]


def units() -> list[Planted]:
    """Neuron 5 of the last layer carries a fifth of TE, neuron 6 nothing."""
    return [carries(UNITS, "mlp_neurons", 3, "last", share, units=(n, n + 1)) for n, share in ((5, 0.2), (6, 0.0))]


def strong(pair: int) -> float:
    """TE of 2 in the mean, over all pairs and within each split."""
    return 2.1 if cluster_of(pair) % 2 else 1.9


def absent(pair: int) -> float:
    """TE of 0 in the mean, over all pairs and within each split."""
    return 1.0 if cluster_of(pair) % 2 else -1.0


def effects(planted: Sequence[Planted], te: Callable[[int], float] = strong, pairs: int = 2 * CLUSTERS) -> pd.DataFrame:
    """Two pairs per cluster; two clusters for discovery, two held out, and so on."""
    records = [_record(pair, site, te(pair)) for pair in range(pairs) for site in planted]
    return pd.DataFrame(records, columns=list(EFFECT_COLUMNS)).astype({"unit_start": "Int64", "unit_stop": "Int64"})


def _record(pair: int, site: Planted, te: float) -> dict[str, Any]:
    cluster = cluster_of(pair)
    nie, tie = site.nie(pair) * te, site.tie(pair) * te
    start, stop = site.units or (None, None)
    return {
        **{"pair_id": f"p{pair}", "cluster": f"c{cluster}", "split": ("discovery", "heldout")[cluster // 2 % 2]},
        **{"analysis": site.analysis, "component": site.component, "layer": site.layer},
        **{"position": site.position, "unit_start": start, "unit_stop": stop},
        **{"y_base": -1.0, "y_source": te - 1, "y_base_patched": nie - 1, "y_source_patched": te - tie - 1},
        **{"te": te, "nie": nie, "nde": te - tie, "tie": tie, "int": tie - nie},
        **{"outcome": "logit_diff", "unit": "logits"},
    }


def result(
    table: pd.DataFrame, refusals: Sequence[Refusal] = (), more: tuple[Analysis, ...] = (), **settings: Any
) -> Result:
    """The table as a measured study; pair p0 alone has prompts of unequal length."""
    logits = {"plus": ["a"], "minus": ["b"]}
    by = StatisticsSettings(resamples=200)
    settings = {"outcome": "logit_diff", "logit_diff": logits, "statistics": by, **settings}
    config = StudyConfig(model="planted", **settings)
    ids = list(dict.fromkeys(table["pair_id"]))
    pairs = tuple(TokenPair(name, "c", "theft", (1, 2, 3), (1, 4, 3)[: 3 - (name == "p0")], 1, 1, 0) for name in ids)
    outcome = LogitOutcome((1,), (2,)) if config.outcome == "logit_diff" else OUTCOMES[config.outcome]()
    study = Study(config, INFO, outcome, pairs, tuple(refusals))
    summary = summarise(table, set(ids) - {"p0"}, LAYERS, config.seed, config.statistics)
    tables = {}
    if UNITS in set(table["analysis"]):
        tables["mediators.csv"] = mediators(table, summary.total, lambda: np.random.default_rng(0), config.statistics)
    return Result(study, table, tables, summary, more or chosen(named(table)))


def named(table: pd.DataFrame) -> list[str]:
    """The analyses of an effects table."""
    return [name for name in dict.fromkeys(table["analysis"].str.partition(":")[0]) if name != "checks"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.create(tmp_path / "run", {})
    store.save_record(RECORD)
    return store


def written(store: Store, found: Result, texts: Sequence[PairText] = ()) -> str:
    return write_report(store, found, texts).read_text("utf-8")


def answer(report: str) -> str:
    """The first paragraph."""
    return report.split("\n\n")[1]


def section(report: str, title: str) -> str:
    return report.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows, headers included."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_planted_late_mlp_is_the_answer(store: Store) -> None:
    report = written(store, result(effects(modules())))
    assert answer(report).startswith(
        "**This run maps where harmful text acts in planted; it tests no claim.** "
        "The harmful prompts raise the outcome: the total effect (TE) is 2 ["
    )


def test_the_planted_site_comes_first_with_its_share_of_te(store: Store) -> None:
    header, nie, tie, *_ = rows(section(written(store, result(effects(modules()))), "Modules"))
    assert header == [
        "site",
        "effect",
        "mean [95% interval], logits",
        "q",
        "held-out mean",
        "held-out q",
        "share of TE",
    ]
    assert nie[:2] == ["MLP, layer 3 at 'all'", "NIE"]
    assert tie[:2] == ["MLP, layer 3 at 'all'", "TIE"]
    assert nie[2].startswith("1.6 [")
    assert nie[4] == "1.6"
    assert nie[6].startswith("80% [")


@pytest.mark.parametrize(("position", "anew"), [("all", True), ("edit", True), ("last", False)])
def test_the_mlp_that_embeds_the_changed_words_anew_is_marked_and_not_the_answer(
    store: Store, position: str, anew: bool
) -> None:
    first = carries("modules", "mlp_output", 0, position, 1.0)
    second = carries("modules", "mlp_output", 3, position, 0.8)
    part = section(written(store, result(effects([first, second]))), "Modules")
    found = [row[0] for row in rows(part)[1::2]]
    mark = ", which embeds the changed words anew" if anew else ""
    assert found == [f"MLP, layer 0 at '{position}'{mark}", f"MLP, layer 3 at '{position}'"]
    said = "Strongest on the discovery pairs"
    but, named = (f", but for the MLP of layer 0{mark}", found[1]) if anew else ("", found[0])
    assert f"{said}{but}: {named}. Held out its mean NIE is {'1.6' if anew else '2'}" in part


def test_a_map_of_nothing_but_what_embeds_anew_names_no_site() -> None:
    found = result(effects([carries("modules", "mlp_output", 0, "all", 1.0)]))
    said = _strongest_in_words(sites_table(found, "modules"), found)
    assert said == "Nothing was measured, but for the MLP of layer 0, which embeds the changed words anew."


def test_sites_are_ranked_on_the_discovery_pairs_alone(store: Store) -> None:
    def in_split(half: int) -> Share:
        return lambda pair: 0.5 if cluster_of(pair) // 2 % 2 == half else 0.1

    lucky = [Planted("heads", "attention_heads", 0, "last", in_split(n), in_split(n), (n, n + 1)) for n in (1, 0)]
    _, first, *_ = rows(section(written(store, result(effects(lucky))), "Heads"))
    assert first[0] == "head 0, layer 0 at 'last'"
    assert first[4] == "0.2"  # what the held-out pairs see of it: a tenth of 2


def test_the_smaller_of_nie_and_tie_ranks_and_te_gives_the_direction(store: Store) -> None:
    lopsided = [
        Planted("heads", "attention_heads", layer, "last", constant(nie), constant(tie), (0, 1))
        for layer, (nie, tie) in enumerate([(0.9, 0.1), (0.3, 0.2), (0.0, 0.0)])
    ]
    for te in (strong, lambda pair: -strong(pair)):
        table = rows(section(written(store, result(effects(lopsided, te))), "Heads"))
        assert [row[0] for row in table[1::2]] == [f"head 0, layer {layer} at 'last'" for layer in (1, 0, 2)]


def test_an_absent_effect_is_said_first_and_leaves_every_share_undefined(store: Store) -> None:
    report = written(store, result(effects(modules(), absent)))
    assert answer(report).startswith(
        "**This run cannot say where in planted harmful text is decided.** The total effect (TE)"
    )
    assert "not told apart from 0" in answer(report)
    modules_section = section(report, "Modules")
    assert {row[6] for row in rows(modules_section)[4:]} == {"-"}
    assert re.search(r"^- share of TE: the interval of the denominator, -\S+ to \S+, spans 0$", modules_section, re.M)


def test_harmful_prompts_that_lower_the_outcome_are_not_called_harmful(store: Store) -> None:
    first = answer(written(store, result(effects(modules(), lambda pair: -strong(pair)))))
    said = "**This run maps where the refusal acts in planted; it tests no claim.** The harmful prompts lower"
    assert first.startswith(said)


def test_verdicts_are_the_first_sentence() -> None:
    said = ["supported", "not supported", "supported", "undecided", "supported, of any edit"]
    claims = pd.DataFrame({"number": range(1, 6), "claim": "it", "said": said, "why": "so"})
    sets = pd.DataFrame(columns=list(SET_COLUMNS)).astype({"decides": bool})
    found = result(effects(modules()), more=chosen(["claims", "modules"]))
    first = report_module.headline(dataclasses.replace(found, tables={"claims.csv": claims, "sets.csv": sets}))
    assert first == (
        "**What decides harmful text? Supported: late layers, sparse gate; not supported: MLPs over "
        "attention; undecided: early understanding; supported, of any edit: handed on through MLPs.**"
    )


def test_what_is_of_any_edit_is_explained_where_it_is_said() -> None:
    verdict = Verdict("claim 1", "1. it is late", "90%", "", "supported")
    notes = [
        report_module._verdict_table([one]).notes for one in (verdict, verdict._replace(said=f"supported, {ANY_EDIT}"))
    ]
    assert [[note.column for note in of].count(ANY_EDIT) for of in notes] == [0, 1]


def test_few_clusters_are_said_to_be_few_in_the_answer(store: Store) -> None:
    first = answer(written(store, result(effects(modules(), pairs=8))))
    assert "To be read with care: only 4 clusters: t takes their means as normal." in first


def test_one_cluster_gives_no_interval_and_the_reason(store: Store) -> None:
    found = result(effects(modules(), pairs=6))  # c0 and c1 for discovery, c2 alone held out
    part = section(written(store, found), "Modules")
    assert {row[5] for row in rows(part)[4:]} == {"-"}
    assert "- held-out q: one cluster only" in part


def test_a_test_too_coarse_for_single_sites_says_so(store: Store) -> None:
    part = section(written(store, result(effects(modules()))), "Modules")
    # 16 clusters allow 2^-15, but 200 resamples only 1/201; 8 sites x 1/201 / 0.05 is 0.8: one site suffices.
    assert "give no p below" not in part
    part = section(written(store, result(effects(modules(), pairs=12))), "Modules")
    assert (
        "6 clusters and 200 resamples give no p below 0.031, so among 8 sites q ≤ 0.05 is reached by 5 together" in part
    )
    part = section(written(store, result(effects(modules(), pairs=8))), "Modules")
    assert "so among 8 sites q ≤ 0.05 is out of reach" in part


def test_left_out_pairs_are_counted_and_named_by_reason(store: Store) -> None:
    refusals = [Refusal("a", "same answer"), Refusal("b", "edit too long"), Refusal("c", "edit too long")]
    store.save_failure("d", "out of <memory>")
    part = section(written(store, result(effects(modules()), refusals)), "What was measured")
    table = rows(part)
    assert ["refused", "3 pairs"] in table
    assert table[-3:] == [
        ["refused: edit too long", "2", "b, c"],
        ["refused: same answer", "1", "a"],
        [r"failed while it ran, measured in part at most: out of &lt;memory&gt;", "1", "d"],
    ]


def test_what_was_measured(store: Store) -> None:
    table = dict(rows(section(written(store, result(effects(modules()))), "What was measured")))
    assert table["pairs"] == "builtin: 32 pairs in 16 clusters, of 32 that can be run"
    assert table["discovery split"] == "16 pairs in 8 clusters"
    assert table["held-out split"] == "16 pairs in 8 clusters; TE there, which shares are of: 2 [1.9, 2.1] logits"
    assert table["outcome"] == f"logit_diff, in logits: {LogitOutcome.meaning}"
    assert "No pair was left out." in section(written(store, result(effects(modules()))), "What was measured")


def test_every_outcome_has_a_meaning_that_says_what_positive_means() -> None:
    assert set(OUTCOMES) == set(get_args(OutcomeName))
    assert all("positive: " in one.meaning for one in OUTCOMES.values())


def test_unequal_edits_and_the_model_s_own_answers_are_among_the_limits(store: Store) -> None:
    assert "1 of 32 pairs have edits of unequal length" in section(written(store, result(effects(modules()))), "Limits")
    own = section(written(store, result(effects(modules()), outcome="response_logprob")), "Limits")
    assert "may be a refusal: a positive outcome then means refusing" in own


def test_texts_are_shown_only_where_given_and_go_again(store: Store) -> None:
    found = result(effects(modules()))
    shown = section(written(store, found, [TEXT]), "Prompts and answers")
    assert rows(shown)[1] == [TEXT.id, TEXT.harmful, TEXT.harmful_answer, TEXT.harmless, TEXT.harmless_answer]
    assert "hidden" not in shown
    assert "not to be shared" in shown
    assert (store.folder / "report.md").stat().st_mode & 0o077 == 0
    hidden = written(store, found)
    assert "not to be shared" not in hidden
    assert (store.folder / "report.md").stat().st_mode & 0o044
    assert "are hidden" in section(hidden, "Prompts and answers")
    assert "--show-text" in section(hidden, "Prompts and answers")
    files = [path.read_text("utf-8", errors="replace") for path in store.folder.rglob("*") if path.is_file()]
    assert not any(text in content for content in files for text in TEXT[1:])


def test_generated_text_cannot_become_markup(store: Store) -> None:
    hostile = TEXT._replace(harmful_answer="a | b\n![x](http://evil) <script> **bold**")
    shown = section(written(store, result(effects(modules())), [hostile]), "Prompts and answers")
    cell = rows(shown)[1][2]
    assert cell == r"a \| b<br>\!\[x\]\(http\://evil\) &lt;script&gt; \*\*bold\*\*"


def test_csv_files_have_the_documented_columns_and_every_digit(store: Store) -> None:
    found = result(effects([*modules(), *units()]))
    write_report(store, found)
    table = pd.read_csv(store.folder / "effects.csv").astype({"unit_start": "Int64", "unit_stop": "Int64"})
    assert list(table.columns) == list(EFFECT_COLUMNS)
    pd.testing.assert_frame_equal(table, found.effects, check_exact=True, check_dtype=False)
    assert list(pd.read_csv(store.folder / "summary.csv").columns) == list(SUMMARY_COLUMNS)
    mediators = pd.read_csv(store.folder / "mediators.csv")
    assert mediators[["layer", "unit", "mediates"]].to_numpy().tolist() == [[3, 5, True]]


def test_mediators_are_written_only_where_units_were_measured(store: Store) -> None:
    write_report(store, result(effects(modules())))
    assert not (store.folder / "mediators.csv").exists()


def test_the_mediating_neuron_is_reported_as_the_held_out_pairs_see_it(store: Store) -> None:
    part = section(written(store, result(effects(units()))), "Single neurons")
    assert "1 neuron reached 5% of TE by NIE and by TIE on the discovery pairs; 1 of them also do" in part
    # Eight held-out clusters, all of one sign: p is near 2 / 2^8, from 200 of the 256 flips. One neuron was tested.
    *cells, q, mediates = rows(part)[1]
    assert cells == ["3.5 at 'last'", "0.4", "0.4", "20%", "20%"]
    assert float(q) < 0.03
    assert mediates == "yes"


def test_no_neuron_chosen_is_said_so(store: Store) -> None:
    part = section(written(store, result(effects(units()[1:]))), "Single neurons")
    assert "No neuron reaches 5% of TE by NIE and by TIE on the discovery pairs." in part


def test_every_figure_is_in_the_report_and_of_readable_size(store: Store) -> None:
    report = written(store, result(effects([*layers(), *modules(), *units()])))
    linked = re.findall(r"!\[[^]]*\]\((figures/[^)]*)\)", report)
    assert linked == ["figures/layers.png", "figures/modules.png", "figures/neurons-units.png"]
    assert sorted(path.name for path in store.folder.glob("figures/*")) == sorted(Path(name).name for name in linked)
    for name in linked:
        image = (store.folder / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        assert 1000 <= int.from_bytes(image[16:20], "big") <= 1400
        assert len(image) > 20_000


def test_the_same_run_gives_the_same_bytes(store: Store) -> None:
    found = result(effects([*layers(), *units()]))

    def contents() -> dict[str, bytes]:
        write_report(store, found, [TEXT])
        return {str(path): path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}

    first = contents()
    assert {Path(name).name for name in first} >= {"report.md", "effects.csv", "layers.png", "mediators.csv"}
    assert contents() == first


def test_sites_that_follow_by_construction_are_neither_ranked_nor_drawn(store: Store) -> None:
    whole = [Planted("layers", "layer_output", layer, "all", lambda _: 1.0, lambda _: 1.0) for layer in (0, 3)]
    report = written(store, result(effects([*whole, *layers()])))
    assert not any("'all'" in row[0] for row in rows(section(report, "Layers")))
    checks_only = section(written(store, result(effects(whole))), "Layers")
    assert "Only sites whose effects follow by construction were measured." in checks_only
    assert "![" not in checks_only


def test_an_analysis_without_sections_still_has_a_table_of_its_sites(store: Store) -> None:
    mine = Analysis("mine", sites=lambda config, info, pair: [])
    found = result(effects([carries("mine", "mlp_output", 1, "all", 0.3)]), more=(mine,))
    part = section(written(store, found), "mine")
    assert rows(part)[1][0] == "MLP, layer 1 at 'all'"
    assert "![" not in part


def with_deviation(found: Result, deviation: float, n: int = 5) -> Result:
    summary = dataclasses.replace(found.summary, identities=(Identity("NDE = 0", n, deviation),))
    return dataclasses.replace(found, summary=summary)


@pytest.mark.parametrize(
    ("deviation", "n", "dtype", "verdict"),
    [
        (1e-4, 5, "float32", "holds"),
        (1.1e-4, 5, "float32", "violated"),
        (float("nan"), 5, "float32", "violated"),
        (1e-2, 5, "bfloat16", "not judged"),
        (float("nan"), 0, "float32", "not checked"),
    ],
)
def test_identities_are_judged_by_their_largest_deviation(
    store: Store, deviation: float, n: int, dtype: str, verdict: str
) -> None:
    report = written(store, with_deviation(result(effects(modules()), dtype=dtype), deviation, n))
    assert rows(section(report, "Identities"))[1][-1] == verdict
    assert answer(report).startswith("**Do not trust these numbers") == (verdict == "violated")


def test_identities_of_this_run_hold_on_pairs_of_equal_length(store: Store) -> None:
    table = rows(section(written(store, result(effects(layers()))), "Identities"))
    assert [row[1:] for row in table[1:3]] == [["62", "0", "holds"]] * 2  # two layers of 32 pairs less p0
    assert [row[1:] for row in table[3:]] == [["0", "-", "not checked"]] * 2  # 'last' was not measured


def test_provenance_is_flattened_and_gaps_are_named(store: Store) -> None:
    table = dict(rows(section(written(store, result(effects(modules()))), "Provenance")))
    assert (table["git.commit"], table["git.dirty"]) == ("abc123", "True")
    assert (table["host"], table["versions"]) == ("not recorded", "not recorded")


def test_what_really_ran_is_told(store: Store) -> None:
    served = {"host": "https://ndif.example", "torch": "2.9", "revision": "", "weights": "0123456789abcdef"}
    store.save_record({**store.record(), "served": served})
    table = dict(rows(section(written(store, result(effects(modules()))), "Provenance")))
    found = {name.removeprefix("served."): value for name, value in table.items() if name.startswith("served.")}
    assert found == {**served, "revision": "not recorded"}


def test_a_run_that_has_not_ended_says_so_first(store: Store) -> None:
    found = result(effects(modules()))
    assert "not finished" not in written(store, found)
    store.save_record({"study": {}})
    assert answer(written(store, found)).startswith("**This run is not finished**")


def test_half_a_run_can_be_reported(store: Store) -> None:
    """Before the first held-out pair there is nothing to judge neurons by, and before any pair nothing at all."""
    table = effects([*layers(), *modules()])
    discovery = section(written(store, result(table[table["split"] == "discovery"])), "Modules")
    assert "- held-out q: not measured on these pairs" in discovery
    heldout = section(written(store, result(table[table["split"] == "heldout"])), "Modules")
    assert "no discovery pair has been measured" in heldout


def test_the_terminal_shows_the_answer_verdicts_sites_and_where_the_report_lies() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    found = result(effects([*modules(), carries("tokens", "layer_output", 1, "edit[-1]", 0.5)]))
    path = Path("/some") / ("very-long-name" * 20) / "report.md"
    console.print(terminal_summary(found, path))
    text = console.export_text(clear=False)
    assert "This run maps where harmful text acts in planted; it tests no claim." in " ".join(text.split())
    assert "MLP, layer 3 at 'all'" in " ".join(text.split())
    assert "residual stream, layer 1 at 'edit[-1]'" in " ".join(text.split())
    assert str(path) in text.replace("\n", "")


def test_markdown_cells_keep_bars_and_line_breaks_inside() -> None:
    assert markdown_table(("a", "b"), [("x|y", "1\n2"), (r"z\|", "")]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        r"| x\|y | 1<br>2 |",
        r"| z\| |  |",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0.0001234, "0.00012"), (0.0000425, "0.00004"), (4e-07, "0"), (-1.85e-06, "0"), (0.0, "0")),
        *((0.01234, "0.0123"), (9.996, "10"), (1.5, "1.5"), (99.96, "100"), (float("nan"), "-")),
        *((-17.04, "-17"), (999.4, "999"), (999.6, "1,000"), (-2605.6, "-2,606"), (1e12, "1e+12")),
    ],
)
def test_numbers_have_no_powers_of_ten_where_people_write_none(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.939, "94%"),
        (0.0938, "9.4%"),
        (1.006, "101%"),
        (26.1, "2610%"),
        (1.33e-07, "0%"),
        (-2e-08, "0%"),
        (0.00012, "0.01%"),
        (0.5, "50%"),
    ],
)
def test_shares_have_two_significant_digits_and_two_decimals_at_most(share: float, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("p", "floor", "shown"),
    [
        *((0.0001, 1e-4, "0 of 9,999 sign flips"), (0.03125, 2**-5, "0 of 31 sign flips")),
        *((0.0002, 1e-4, "< 0.001"), (0.04, 1e-4, "0.04"), (float("nan"), float("nan"), "-")),
    ],
)
def test_a_p_at_its_floor_is_a_count(p: float, floor: float, shown: str) -> None:
    assert p_value(p, floor) == shown


def test_a_total_effect_that_no_flip_reaches_is_told_by_their_count(store: Store) -> None:
    _, total = rows(section(written(store, result(effects(modules()))), "Total effect"))[:2]
    assert total[3] == "0 of 200 sign flips"  # 16 clusters allow more flips than the 200 that were drawn
    _, flat = rows(section(written(store, result(effects(modules(), absent))), "Total effect"))[:2]
    assert 0.05 < float(flat[3]) <= 1


def test_no_cell_is_a_power_of_ten_or_a_nan(store: Store) -> None:
    tiny = effects([*modules(3e-9), *layers(), *units()], lambda pair: 3000 * strong(pair))
    for name in ("", "Modules", "Layers", "Total effect", "Identities"):
        report = written(store, result(tiny))
        for row in rows(section(report, name) if name else report):
            assert not [cell for cell in row if re.search(r"\bnan\b|n/a|\de[+-]\d|-0(%|\b(?![.\d]))", cell)], row


def test_every_section_begins_with_what_it_found(store: Store) -> None:
    found = result(effects([*layers(), *modules(), *units()]))
    report = written(store, found)
    for part in report_module.sections(found):
        lines = section(report, part.title).strip().splitlines()
        assert lines[0] == part.line
        assert part.did in lines
        assert lines.count(part.line) == 1
    assert section(report, "Total effect").strip().startswith("Harmful prompts change the outcome by 2 [")
    assert "from -1 after harmless ones to 1." in section(report, "Total effect")


def test_figures_say_in_words_what_they_show(store: Store) -> None:
    report = written(store, result(effects([*layers(), *modules()])))
    texts = dict(re.findall(r"!\[([^]]*)\]\(figures/([^)]*)\)", report)[i][::-1] for i in range(2))
    assert texts["layers.png"].startswith("Layers: Half of TE has left the changed words after layer 2")
    assert texts["modules.png"].startswith("Modules: Strongest on the discovery pairs: MLP, layer 3 at 'all'.")
    assert not [text for text in texts.values() if set(text) & set("[]*`\n")]


def test_layers_are_told_by_where_the_effect_passes(store: Store) -> None:
    """It leaves the edit, and arrives at the answer, between layers 1 and 2; the last layer carries 95%."""
    table = rows(section(written(store, result(effects(layers()))), "Layers"))
    assert table[0] == ["the effect has", "by", "10% of TE", "50% of TE", "90% of TE"]
    assert [row[:2] for row in table[1:]] == [
        *(["left 'edit'", "NIE"], ["left 'edit'", "TIE"]),
        *(["arrived at 'last'", "NIE"], ["arrived at 'last'", "TIE"]),
    ]
    assert {row[3] for row in table[1:]} == {"layer 2"}


def test_how_it_was_made_stands_on_top(store: Store) -> None:
    store.save_record({**RECORD, "seconds": 4000.0, "memory": 3.25, "git": {"commit": "abcdef0123456", "dirty": False}})
    found = result(effects(modules()), outcome="logit_diff", max_pairs=7, neurons={"exact": 12})
    top = written(store, found).split("\n## ")[0]
    (line,) = [line.strip() for line in top.splitlines() if line.startswith("    ")]
    assert shlex.split(line)[:6] == ["remote-mediation", "run", "--model", "planted", "--max-pairs", "7"]
    assert "1 h 7 min of run time, at most 3.25 GB of memory, commit abcdef0123." in top
    arguments = shlex.split(line)[2:]
    flags = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assigned = [value for flag, value in zip(arguments[::2], arguments[1::2], strict=True) if flag == "--set"]
    overrides = {"model": flags["--model"], "max_pairs": int(flags["--max-pairs"]), "outcome": flags["--outcome"]}
    assert load_config(None, overrides, assigned) == found.study.config


def test_what_went_on_with_a_run_is_told_beside_what_began_it(store: Store) -> None:
    later = {"2026-11-27T10:00:00+00:00": {"commit": "fedcba9876543", "dirty": True}}
    store.save_record({**RECORD, "continued": later})
    report = written(store, result(effects(modules())))
    said = "committed, continued by commit fedcba9876 with changes that were not committed."
    assert said in report.split("\n## ")[0]
    assert dict(rows(section(report, "Provenance")))["continued.2026-11-27T10:00:00+00:00.dirty"] == "True"


def test_what_was_not_recorded_of_its_making_is_said_to_be(store: Store) -> None:
    top = written(store, result(effects(modules()))).split("\n## ")[0]
    assert "run time not recorded, memory not recorded, commit abc123 with changes that were not committed." in top


def test_an_older_run_knows_the_time_of_its_last_sitting_alone(store: Store) -> None:
    store.save_record({**RECORD, "seconds": 88.0})
    top = written(store, result(effects(modules()))).split("\n## ")[0]
    assert "88 s of run time in its last sitting, memory not recorded" in top


def test_provenance_lists_the_settings_that_were_changed(store: Store) -> None:
    model = {"revision": "", "window": None, "sliding": [], "vocab": 50}
    store.save_record({**RECORD, "model": model, "versions": {"torch": None}})
    part = section(written(store, result(effects(modules()), seed=3)), "Provenance")
    table = dict(rows(part))
    assert {name for name in table if name.startswith("config.")} == {
        *("config.model", "config.outcome", "config.seed", "config.statistics.resamples"),
        *("config.logit_diff.plus", "config.logit_diff.minus"),
    }
    assert table["config.seed"] == "3"
    assert (table["model.revision"], table["model.window"], table["model.sliding"]) == (
        "the default one",
        "none",
        "none",
    )
    assert table["versions.torch"] == "not recorded"
    assert "those that are not the defaults; `run.json` has all of them" in part


def test_harmless_prompts_of_the_package_s_own_pairs_are_shown(store: Store) -> None:
    own = load_pairs("builtin")
    table = effects(modules())
    ids = {f"p{number}": one.id for number, one in enumerate(own[: 2 * CLUSTERS])}
    report = written(store, result(table.assign(pair_id=table["pair_id"].map(ids))))
    shown = rows(section(report, "Example pairs"))[1:]
    assert [row[0] for row in shown] == [own[0].id, own[10].id, own[20].id]
    assert shown[0][1].replace("**", "") == literal(own[0].harmless)
    assert shown[0][2].replace("**", "") == literal(own[0].placebo)
    assert all(cell.count("**") == 2 for row in shown for cell in row[1:])
    assert not [one.id for one in own if one.harmful in report]
    theirs = written(store, result(table.assign(pair_id=table["pair_id"].map(ids)), pairs="mine.jsonl"))
    assert "Example pairs" not in theirs
    assert own[0].harmless not in theirs


@pytest.mark.parametrize("report", ["quickstart", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "refusing-smollm2"])
def test_the_answer_takes_forty_words_at_most(report: str) -> None:
    folder = Path(__file__).parents[1] / "reports" / report
    names = ("claims", "sets", "direction", "direction_sets", "rivals", "rival_sets")
    tables = {f"{name}.csv": pd.read_csv(path) for name in names if (path := folder / f"{name}.csv").exists()}
    found = result(effects(modules(), lambda pair: -strong(pair)), more=chosen(["claims", "directions", "rivals"]))
    said = report_module.headline(dataclasses.replace(found, tables=tables))
    assert len(said.split()) <= 40
    assert said.count(".") == 1
