"""Sections of the report from small tables made by hand: every number and sentence follows from the rows given."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from remote_mediation.analyses import EVERY as ANALYSES
from remote_mediation.analyses import chosen
from remote_mediation.config import StudyConfig
from remote_mediation.effects import EFFECT_COLUMNS
from remote_mediation.lab import Study
from remote_mediation.outcomes import LogitOutcome
from remote_mediation.report import csv_tables, sections
from remote_mediation.result import Result
from remote_mediation.show.section import Section
from remote_mediation.sites import ModelInfo
from remote_mediation.stats import Estimate
from remote_mediation.summary import SUMMARY_COLUMNS, Summary, heldout_effect
from remote_mediation.terminal import overview

NaN = math.nan
INFO = ModelInfo("planted", "", "llama", 6, 8, 16, 2, 2, 4, 50, True, True, (), None)
EVERY = ["neurons", "detect", "paths", "intervene", "attacks", "monitor"]
COLUMNS = {name: columns for one in ANALYSES for name, columns in one.columns.items()}
TITLES = ["Gate neurons", "Early understanding", "Paths", "Repair", "Circumvention", "Monitor"]
TOTAL = Estimate(8, 8, 2.0, 1.5, 2.5, "", 0.01)
FLAT = Estimate(8, 8, 0.1, -0.5, 0.7, "", 0.6)
LOWERS = Estimate(8, 8, -2.0, -2.5, -1.5, "", 0.01)


def table(name: str, *rows: dict[str, Any]) -> pd.DataFrame:
    """Rows with the documented columns; what is not said is missing."""
    return pd.DataFrame([{"reason": "", **row} for row in rows], columns=list(COLUMNS[name]))


def ends(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def search() -> pd.DataFrame:
    screened = {"step": "screened by gradients", "sites": 96, "pairs": 4, "kept": 8, "followed": 8}
    others = {"step": "measured, random others", "sites": 8, "pairs": 4, "kept": 0, "followed": 0}
    return table("search.csv", screened, {**others, "missed": 0.0, "missed_high": 28.5})


def gate_row(name: str, layer: int, units: str, nie: float, tie: float) -> dict[str, Any]:
    effects = {**ends("nie", nie, nie - 0.1, nie + 0.1), **ends("tie", tie, tie - 0.1, tie + 0.1)}
    shares = {"nie_share": nie / 2, "tie_share": tie / 2}
    return {
        "set": name,
        "layer": layer,
        "position": "last",
        "size": len(units.split()),
        "units": units,
        **effects,
    } | shares


def gates(sign: int = 1) -> pd.DataFrame:
    """Two neurons carry 1.6 and 1.4; of four random sets one reaches the TIE."""
    random = [(0.0, 0.02), (0.01, 0.0), (0.02, 0.01), (0.04, 1.5)]
    return table(
        "gates.csv",
        gate_row("mlp", 5, " ".join(map(str, range(16))), sign * 1.8, sign * 1.7),
        gate_row("gates", 5, "3 7", sign * 1.6, sign * 1.4),
        gate_row("earlier", 4, "1 2", sign * 0.2, sign * 0.3),
        *(gate_row("random", 5, f"{n} {n + 8}", sign * nie, sign * tie) for n, (nie, tie) in enumerate(random)),
    )


def curve() -> pd.DataFrame:
    sizes = [(1, 0.5, 0.4), (2, 0.9, 0.88), (16, 1.0, 1.0)]
    return table("gate_curve.csv", *({"size": n, "discovery": d, "heldout": h} for n, d, h in sizes))


def sparsity(by: str = "attribution patching") -> pd.DataFrame:
    rows = [
        {"layer": n, "gini": 0.15 * n, "fewest": 6 - n, "of": 16, "negative_share": 0.1, "by": by} for n in range(6)
    ]
    return table("sparsity.csv", *rows)


def probes() -> pd.DataFrame:
    """Read at `last` from layer 2 on."""
    rows = [
        {
            **{"position": "last", "layer": n, "relative_depth": n / 5, "n": 16, "clusters": 8},
            **{"accuracy": 0.91 if n > 1 else 0.55, "low": 0.85 if n > 1 else 0.4, "high": 0.97 if n > 1 else 0.6},
            **{"control": 0.501, "control_high": 0.66, "q": 0.01 if n > 1 else 0.5},
        }
        for n in range(6)
    ]
    return table("probes.csv", *rows)


def paths() -> pd.DataFrame:
    shares = {"nothing": (0.0, NaN, NaN), "MLPs": (0.72, 0.6, 0.81), "attention": (0.93, 0.88, 0.99)}
    return table(
        "paths.csv",
        *(
            {
                **{"quantity": quantity, "layer": 1, "frozen": name, "n": 4, "clusters": 4},
                **{"mean": 1.5, "ci_low": 1.2, "ci_high": 1.8, **ends("share", *share)},
            }
            for quantity in ("nie", "tie")
            for name, share in shares.items()
        ),
    )


def held(plain: float = 0.8, with_gates: float = 0.1, sign: int = 1) -> pd.DataFrame:
    """The gates at their mean undo 1.7 of a TE of 2. plain, with_gates: rates of complying answers."""
    conditions = {
        "nothing": (0, 0.0, plain),
        "gates at their harmless mean": (2, -1.7, with_gates),
        "gates times 0": (2, -1.2, with_gates),
        "random sets at their harmless mean": (2, 0.013, plain),
        "whole MLP at its harmless mean": (16, -1.9, with_gates),
    }
    rows = []
    for name, (size, change, rate) in conditions.items():
        harmful = ends("change", sign * change, sign * change - 0.1, sign * change + 0.1)
        shared = {"held": name, "size": size, "n": 10, "judged": 10}
        comply = ends("complied", rate, max(rate - 0.1, 0), min(rate + 0.1, 1))
        rows.append({**shared, "prompts": "harmful", **harmful, "share": -change / 2, **comply})
        cost = {**ends("change", 0.031, 0.01, 0.05), **ends("kl", 0.0123, 0.01, 0.02), "perplexity": 3.21}
        rows.append({**shared, "prompts": "harmless", **cost, **ends("complied", 0.05, 0.0, 0.2)})
    return table("intervene.csv", *rows)


def judge(kappa_low: float = 0.3) -> pd.DataFrame:
    measures = {"accuracy": (0.81, 0.7, 0.9), "recall": (0.77, 0.6, 0.88), "specificity": (0.84, 0.7, 0.93)}
    rows = [
        {"measure": name, **dict(zip(("value", "low", "high"), one, strict=True))} for name, one in measures.items()
    ]
    kappa = {"measure": "kappa", "value": 0.62, "low": kappa_low, "high": 0.79}
    return table("judge.csv", *({"judge": "refusal-phrases", "n": 60, **row} for row in [*rows, kappa]))


def attacked(plain: float = 1.0, spans: bool = False) -> pd.DataFrame:
    """Role play leaves the gates 40% and undoes nothing for sure; the checkpoint leaves all."""
    rows = []
    for name, share, repair_low in (("none", 0.9, 0.7), ("role play", 0.4, -0.2), ("checkpoint tuned", 0.88, 0.7)):
        rows.append(
            {
                **{"attack": name, "n": 4, "clusters": 4},
                **ends("te", 2.0, -0.4 if spans and name == "role play" else 1.6, 2.4),
                **ends("nie_share", share, share - 0.1, share + 0.1),
                **ends("tie_share", share, share - 0.1, share + 0.1),
                **({} if name == "none" else ends("spearman", 0.654, 0.5, 0.8) | ends("overlap", 0.5, 0.25, 0.75)),
                **ends("repair", repair_low + 0.1, repair_low, repair_low + 0.3),
                **ends("complied", plain, 0.7, 1.0),
                **ends("complied_held", 0.2 if plain < 1 else 1.0, 0.1, 0.3),
            }
        )
    return table("attacks.csv", *rows)


def detectors(probe: float = 0.95) -> pd.DataFrame:
    rates = {name: value for recall in (90, 95) for name, value in ends(f"recall_{recall}", 0.875, 0.7, 0.95).items()}
    rates |= {
        name: value for recall in (90, 95) for name, value in ends(f"false_alarms_{recall}", 0.125, 0, 0.4).items()
    }
    shared = {"n": 16, "clusters": 8, "positives": 8, "random_sets": 4}
    return table(
        "detectors.csv",
        *(
            {**shared, "detector": name, "evaluation": where, **ends("auroc", area, area - 0.05, area + 0.05), **more}
            for where in ("heldout", "hard negatives")
            for name, area, more in (
                ("gates", 0.8, {**rates, "rank": 2.0, "p": 0.4}),
                ("residual probe", probe, {**rates, "rank": 1.0, "p": 0.2}),
                ("random neurons", 0.5, {}),
            )
        ),
    )


def tables(**changed: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """All tables; None takes one away."""
    found = {
        **{"search": search(), "sparsity": sparsity(), "gates": gates(), "gate_curve": curve(), "probes": probes()},
        **{"paths": paths(), "intervene": held(), "judge": judge(), "attacks": attacked(), "detectors": detectors()},
        **changed,
    }
    return {f"{name}.csv": one for name, one in found.items() if one is not None}


def effects(te: float, spread: float) -> pd.DataFrame:
    """TE of eight pairs in as many clusters, half of them held out."""
    rows = [
        {
            **{
                "pair_id": f"p{n}",
                "cluster": f"c{n}",
                "split": "heldout" if n % 2 else "discovery",
                "analysis": "layers",
            },
            **{"te": te + (spread if n % 4 < 2 else -spread)},
        }
        for n in range(8)
    ]
    return pd.DataFrame(rows, columns=list(EFFECT_COLUMNS))


def acting(first: int = 3) -> pd.DataFrame:
    """The residual stream at `last` acts from a layer on; before it next to nothing."""
    rows = [
        {
            **{"analysis": "layers", "component": "layer_output", "layer": n, "position": "last", "quantity": "nie"},
            **{"split": "all", "q": 0.01 if n >= first else 0.9, "ci_low": 1.0 if n >= first else -0.01},
            **{"ci_high": 2.0 if n >= first else 0.02},
        }
        for n in range(6)
    ]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))


def result(found: dict[str, pd.DataFrame], total: Estimate = TOTAL, spread: float = 0.1, **settings: Any) -> Result:
    logits = {"plus": ["a"], "minus": ["b"]}
    factors = {"factors": [0.0]}
    config = StudyConfig(
        **{
            "model": "planted",
            "analyses": EVERY,
            "outcome": "logit_diff",
            "logit_diff": logits,
            "intervene": factors,
        }
        | settings
    )
    study = Study(config, INFO, LogitOutcome((1,), (2,)), (), ())
    heldout = heldout_effect(effects(total.value, spread), config.seed, config.statistics)
    summary = Summary(acting(), total, (), heldout, {})
    return Result(study, effects(total.value, spread), found, summary, chosen(config.analyses))


def part(title: str, found: Result) -> Section:
    return next(one for one in sections(found) if one.title == title)


def text(title: str, found: Result) -> str:
    return part(title, found).markdown()


def rows(markdown: str) -> dict[str, list[str]]:
    """Cells of all table rows by the first one."""
    lines = [line.strip("|").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_sections_come_in_order_and_only_where_asked_for() -> None:
    assert [one.title for one in sections(result(tables()))] == ["Total effect", *TITLES]
    assert [one.title for one in sections(result(tables(), analyses=["paths", "detect"]))] == [
        "Total effect",
        *TITLES[1:3],
    ]
    assert all(one.figure and "![" in one.markdown() for one in sections(result(tables()))[1:])


@pytest.mark.parametrize("title", [title for title in TITLES if title != "Early understanding"])
def test_without_a_total_effect_a_section_says_so_and_stops(title: str) -> None:
    stopped = part(title, result(tables(), FLAT))
    assert stopped.finding == "There is no total effect to mediate: 0.1 [-0.5, 0.7] logits spans 0."
    assert (stopped.tables, stopped.figure) == ((), None)
    unknown = Estimate(2, 1, 0.1, NaN, NaN, "one cluster only", NaN)
    finding = part(title, result(tables(), unknown)).finding
    assert finding == "Whether there is a total effect to mediate is not known: one cluster only."


def test_probes_stand_without_a_total_effect_but_say_nothing_of_acting() -> None:
    found = part("Early understanding", result(tables(), FLAT))
    assert "There is no total effect to mediate" in found.finding
    assert "before it acts cannot be asked" in found.finding
    assert rows(found.markdown())["'last'"][-1] == "none found"


@pytest.mark.parametrize(("title", "use"), [("Repair", "hold"), ("Circumvention", "hold"), ("Monitor", "watch")])
def test_without_a_gate_set_there_is_none_to_hold_or_watch(title: str, use: str) -> None:
    for nothing in (None, gates().iloc[:0]):
        stopped = part(title, result(tables(gates=nothing)))
        assert stopped.finding == f"The search found no gate set, so there is none to {use}."
        assert (stopped.tables, stopped.figure) == ((), None)
    unfinished = part(title, result(tables(gates=None, search=None)))
    assert unfinished.finding == f"No gate set has been measured yet, so there is none to {use}."
    unasked = part(title, result(tables(gates=None, search=None), analyses=EVERY[1:]))
    assert "analysis `neurons`, which finds it, was not part of this study" in unasked.finding


def test_no_gate_set_is_said_where_it_was_searched() -> None:
    found = part("Gate neurons", result(tables(gates=None)))
    assert "There is no gate set" in found.finding
    assert (len(found.tables), found.figure) == (1, None)


@pytest.mark.parametrize(
    ("title", "missing"),
    [
        *[("Gate neurons", "search"), ("Early understanding", "probes"), ("Paths", "paths"), ("Repair", "intervene")],
        *[("Circumvention", "attacks"), ("Monitor", "detectors")],
    ],
)
def test_what_is_not_measured_yet_is_said_to_be(title: str, missing: str) -> None:
    assert part(title, result(tables(**{missing: None}))).finding.startswith("Not measured yet")


def test_the_gate_set_stands_beside_its_controls_as_the_table_has_it() -> None:
    found = text("Gate neurons", result(tables()))
    table = rows(found)
    assert table["gates"] == ["5", "2", "1.6 [1.5, 1.7]", "1.4 [1.3, 1.5]", "80%", "70%"]
    assert table["whole MLP"] == ["5", "16", "1.8 [1.7, 1.9]", "1.7 [1.6, 1.8]", "90%", "85%"]
    assert table["best set of an earlier layer"][2] == "0.2 [0.1, 0.3]"
    assert table["4 random sets: median [95% range]"][2:4] == ["0.015 [0.00075, 0.038]", "0.015 [0.00075, 1.4]"]
    assert [name for name in table if name in ("gates", "whole MLP")] == ["gates", "whole MLP"]
    assert "2 of 16 neurons of layer 5, at 'last'" in found
    assert "its NIE (sufficient) and its TIE (necessary) lie clear of 0" in found
    assert "Of 4 random sets of its size in the same layer 0 reach its NIE and 1 reach its TIE (p = 0.4)" in found


def test_an_interval_that_holds_0_is_no_effect_of_the_gates() -> None:
    doubtful = gates()
    doubtful.loc[doubtful["set"] == "gates", "tie_low"] = -0.1
    finding = part("Gate neurons", result(tables(gates=doubtful))).finding
    assert "its NIE (sufficient) lie clear" in finding
    assert "its TIE (necessary) are not shown to differ from 0" in finding
    doubtful["nie_low"] = NaN
    assert "The held-out pairs cannot test it" in part("Gate neurons", result(tables(gates=doubtful))).finding


def test_shares_of_a_held_out_effect_that_spans_0_are_not_given() -> None:
    found = text("Gate neurons", result(tables(), spread=8.0))
    assert rows(found)["gates"][-2:] == ["-", "-"]
    assert "- NIE / TE: of the held-out pairs, TE, " in found
    assert rows(text("Repair", result(tables(), spread=8.0)))["gates at their harmless mean"][2] != "85%"


def test_how_the_search_went_is_told() -> None:
    found = text("Gate neurons", result(tables()))
    assert "The search followed every lead that it had." in found
    assert rows(found)["measured, random others"] == ["8", "4", "0", "0", "0, at most 28.5"]
    short = search().assign(followed=[5, 0])
    assert "cut short by the study's limit: 3 leads" in text("Gate neurons", result(tables(search=short)))


def test_how_far_the_screen_agreed_is_told() -> None:
    assert "screen against exact effects" not in text("Gate neurons", result(tables()))
    row = {"component": "mlp_neurons", "screen": "relp", "first": 8, "random": 8, "recall": 0.75}
    agreed = [
        {**row, "quantity": "nie", "spearman_first": 0.5, "spearman_random": 0.25},
        {**row, "quantity": "tie", "spearman_first": 0.75, "spearman_random": NaN},
    ]
    found = rows(text("Gate neurons", result(tables(screen=table("screen.csv", *agreed)))))
    assert found["relevance patching, mlp_neurons"] == ["TIE", "0.75 (8)", "- (8)", "75%"]


def test_sparsity_says_what_is_estimated() -> None:
    found = text("Gate neurons", result(tables()))
    assert rows(found)["5"] == ["0.75", "1 of 16", "10%", "attribution patching"]
    assert "a first-order estimate by gradients, not measured" in found
    assert "first-order" not in text("Gate neurons", result(tables(sparsity=sparsity("measured"))))


def test_a_set_that_never_carried_enough_is_said_to_be_short_of_it() -> None:
    weak = curve().assign(discovery=[0.1, 0.2, 0.3])
    assert "No set that was tried carries 80%" in part("Gate neurons", result(tables(gate_curve=weak))).finding


def test_probes_stand_beside_the_layer_that_acts() -> None:
    found = text("Early understanding", result(tables()))
    assert rows(found)["'last'"] == ["layer 2", "91% [85%, 97%]", "layer 2", "50%, 66%", "layer 3"]
    assert "At 'last' harm is first readable after layer 2 and first acts after layer 3" in found
    assert "(before)" in found
    bare = result(tables())
    unmeasured = replace(bare, summary=replace(bare.summary, sites=acting().iloc[:0]))
    assert "where it acts was not measured there (undecided)" in text("Early understanding", unmeasured)


def test_paths_give_what_is_gone_with_intervals() -> None:
    found = text("Paths", result(tables()))
    assert rows(found)["MLPs"] == ["1.5 [1.2, 1.8]", "72% [60%, 81%]"] * 2
    assert rows(found)["nothing"] == ["1.5 [1.2, 1.8]", ""] * 2
    assert rows(found)["attention"] == ["1.5 [1.2, 1.8]", "93% [88%, 99%]"] * 2
    assert "frozen modules take away: MLPs 72% [60%, 81%].\n" in found
    assert "- attention: no finding: nothing else reads other tokens" in found
    assert "no parts of a whole" in found
    assert "on held-out pairs" in found
    assert "on all pairs" in text("Paths", result(tables(gates=None)))


def test_benefit_and_cost_of_holding_are_those_of_the_table() -> None:
    benefit, cost = (one.markdown() for one in part("Repair", result(tables())).tables)
    assert rows(benefit)["gates at their harmless mean"] == ["2", "-1.7 [-1.8, -1.6]", "85%", "10% [0%, 20%]"]
    assert rows(benefit)["nothing"] == ["0", "", "", "80% [70%, 90%]"]
    assert rows(cost)["gates times 0"] == ["0.031 [0.01, 0.05]", "0.012 [0.01, 0.02]", "3.21", "5% [0%, 20%]"]
    finding = part("Repair", result(tables())).finding
    assert "changes by -1.7 [-1.8, -1.6] logits, which undoes 85% of TE on these pairs" in finding
    assert "random sets of their size by 0.013 [-0.087, 0.11]" in finding
    assert "80% [70%, 90%] comply, and 10% [0%, 20%] with the gates held." in finding


def test_a_change_that_spans_0_undoes_nothing() -> None:
    weak = held()
    weak.loc[weak["held"] == "gates at their harmless mean", "change_high"] = 0.2
    finding = part("Repair", result(tables(intervene=weak))).finding
    assert "which is not shown to go against TE" in finding
    assert "undoes" not in finding


def test_every_table_with_rates_has_the_judge_s_quality_below() -> None:
    quality = "accuracy 81% [70%, 90%], recall 77% [60%, 88%], specificity 84% [70%, 93%], kappa 0.62 [0.3, 0.79]"
    for title in ("Repair", "Circumvention"):
        judged = [one for one in part(title, result(tables())).tables if any("comply" in name for name in one.header)]
        assert judged
        for one in judged:
            assert f"judge `refusal-phrases`, on 60 labelled answers: {quality}" in one.markdown()
    unknown = text("Circumvention", result(tables(judge=None, attacks=attacked(0.9))))
    assert "the judge's quality was not measured" in unknown


def test_rates_of_a_judge_no_better_than_chance_are_weak() -> None:
    assert "weak evidence" in part("Repair", result(tables(judge=judge(kappa_low=-0.1)))).finding
    assert "weak evidence" not in part("Repair", result(tables())).finding


@pytest.mark.parametrize(("rate", "what"), [(1.0, "complies"), (0.0, "fails to comply")])
def test_rates_without_variation_say_nothing(rate: float, what: str) -> None:
    same = f"every answer to a harmful prompt {what}, whatever is held: these rates say nothing"
    finding = part("Repair", result(tables(intervene=held(rate, rate)))).finding
    assert same in finding
    assert ("may be a refusal" in finding) == (rate == 0)
    flat = attacked().assign(complied=rate, complied_held=rate)
    assert same in part("Circumvention", result(tables(attacks=flat))).finding


def test_overlapping_rates_are_not_told_apart() -> None:
    assert "not told apart" in part("Repair", result(tables(intervene=held(0.5, 0.4)))).finding
    assert "not told apart" not in part("Repair", result(tables())).finding


def test_where_te_is_negative_the_gates_carry_refusal_and_nothing_is_repaired() -> None:
    found = result(tables(gates=gates(-1), intervene=held(0.1, 0.8, sign=-1)), LOWERS)
    made = {one.name: one for one in sections(found)}
    titles = [one.title for one in made.values()]
    assert titles == ["Total effect", *("Removing refusal" if title == "Repair" else title for title in TITLES)]
    for name in ("gates", "repair", "attacks"):
        assert "Holding them at their harmless mean works against it" in made[name].finding
        assert ("removes refusal" in made[name].finding) == (name == "repair")
        assert "repair" not in made[name]._replace(figure=None).markdown().lower()
        assert "Benefit" not in made[name].did
    assert "its NIE (sufficient) and its TIE (necessary) lie clear of 0" in made["gates"].finding
    assert "0 reach its NIE and" in made["gates"].finding
    assert "changes by 1.7 [1.6, 1.8] logits, which undoes 85% of TE" in made["repair"].finding
    assert "refusal" not in "".join(one.markdown() for one in sections(result(tables()))[1:]).replace(
        "refusal-phrases", ""
    )


@pytest.mark.parametrize(("plain", "with_gates"), [(0.1, 0.25), (0.8, 0.1), (0.0, 0.0)])
def test_refusal_is_said_to_be_removed_only_where_more_answers_comply(plain: float, with_gates: float) -> None:
    found = result(tables(gates=gates(-1), intervene=held(plain, with_gates, sign=-1)), LOWERS)
    made = {one.name: one for one in sections(found)}
    assert made["repair"].title == "Working against refusal"
    assert not any("removes refusal" in one.finding for one in made.values())


def test_attacks_are_counted_by_their_intervals() -> None:
    found = text("Circumvention", result(tables()))
    assert "Under 2 of 2 attacks the gates' shares of TE are above 0 by NIE and by TIE, and under 1 holding" in found
    assert "least under role play: -10% [-20%, 10%]" in found
    shares, ranks = (rows(one.markdown()) for one in part("Circumvention", result(tables())).tables)
    assert shares["role play"] == ["4", "2 [1.6, 2.4]", "40% [30%, 50%]", "40% [30%, 50%]", "-10% [-20%, 10%]"]
    assert "checkpoint tuned" in shares
    assert ranks["role play"][:2] == ["0.65 [0.5, 0.8]", "50% [25%, 75%]"]
    assert ranks["none"][:2] == ["", ""]
    spans = text("Circumvention", result(tables(attacks=attacked(spans=True))))
    assert "under role play TE, -0.4 to 2.4, spans 0: there are no shares of it" in spans
    assert "moves them further" not in found
    worse = attacked()
    worse.loc[worse["attack"] == "role play", "repair_high"] = -0.05
    assert "some of TE on harmful prompts, under 1 it moves them further" in text(
        "Circumvention", result(tables(attacks=worse))
    )


def test_the_monitor_is_compared_by_intervals() -> None:
    found = text("Monitor", result(tables()))
    assert (
        "On held-out pairs the gates' AUROC is 0.8 [0.75, 0.85], rank 2 beside 4 random sets (p = 0.4), below" in found
    )
    assert "On hard negatives the gates' AUROC" in found
    rates = ["88% [70%, 95%]", "12% [0%, 40%]"]
    assert rows(found)["residual probe"] == ["hard negatives", "0.95 [0.9, 1]", "0 of 4 sets", *rates, *rates]
    assert rows(found)["random neurons"][2:] == [""] * 5
    for probe, words in ((0.82, "not told apart from the residual probe's"), (0.6, "above the residual probe's")):
        assert words in text("Monitor", result(tables(detectors=detectors(probe))))


def test_csv_tables_have_every_documented_column_in_order() -> None:
    shuffled = {name: one[one.columns[::-1]] for name, one in tables().items()}
    written = csv_tables(result(shuffled))
    assert set(written) == {"effects.csv", "summary.csv", *shuffled}
    assert all(list(one.columns) == list(COLUMNS[name]) for name, one in written.items() if name in shuffled)


def test_the_terminal_has_a_line_for_every_section() -> None:
    found = overview(sections(result(tables())))
    assert [row[0] for row in found.rows] == ["total", "gates", "probes", "paths", "repair", "attacks", "monitor"]
    assert found.rows[1][1] == "2 of 16 neurons of layer 5; held out NIE 1.6 [1.5, 1.7] and TIE 1.4 [1.3, 1.5] logits"
    stopped = overview(sections(result(tables(), FLAT)))
    assert "no total effect" in stopped.rows[-1][1]
