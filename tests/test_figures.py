"""What the pictures show, read back from the figure objects: every expected number is in the table given."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from remote_mediation.analyses.claims.figures import curve_figure
from remote_mediation.analyses.detect.show import probe_figure
from remote_mediation.analyses.maps import show as maps
from remote_mediation.analyses.monitor.show import detector_figure
from remote_mediation.analyses.neurons.figures import units_figure, whole_mlps_figure
from remote_mediation.show import figures
from remote_mediation.stats import Estimate
from remote_mediation.summary import SUMMARY_COLUMNS, UNITS

NaN = math.nan
LAYERS = 6
TOTAL = Estimate(8, 4, 2.0, 1.5, 2.5, "", 0.01)


def site(analysis: str, component: str, layer: int, position: str, **values: Any) -> dict[str, Any]:
    """One row of `Summary.sites`; what is not said does not matter."""
    unit = values.pop("unit", None)
    return {
        **dict.fromkeys(SUMMARY_COLUMNS, NaN),
        **{"analysis": analysis, "component": component, "layer": layer, "position": position},
        **{"unit_start": "", "unit_stop": "", "quantity": "nie", "split": "all", "n": 8, "clusters": 4},
        **({} if unit is None else {"unit_start": str(unit[0]), "unit_stop": str(unit[1])}),
        **{"mean": 0.0, "ci_low": -0.1, "ci_high": 0.1, "q": 0.5, "unit": "logits", "reason": ""},
        **values,
    }


def table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The rows as NIE, and once more as TIE with half the mean."""
    found = list(rows)
    return pd.DataFrame([*found, *({**row, "quantity": "tie", "mean": row["mean"] / 2} for row in found)])


def panels(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.get_title(loc="left")]


def line(axis: Axes, label: str) -> list[float]:
    return [float(y) for y in next(line for line in axis.lines if line.get_label() == label).get_ydata()]


def labels(axis: Axes) -> list[str]:
    return axis.get_legend_handles_labels()[1]


def depth_sites() -> pd.DataFrame:
    rows = [site("layers", "layer_output", layer, "edit", mean=2.0 - 0.3 * layer) for layer in (1, 0, 2)]
    return table([*rows, *(site("layers", "layer_output", layer, "last", mean=0.1 * layer) for layer in range(3))])


def test_depth_draws_the_means_in_layer_order_with_te_beside_them() -> None:
    nie, tie = panels(maps.layers_figure(depth_sites(), TOTAL))
    assert line(nie, "edit") == pytest.approx([2.0, 1.7, 1.4])
    assert line(tie, "edit") == pytest.approx([1.0, 0.85, 0.7])
    assert line(nie, "last") == pytest.approx([0.0, 0.1, 0.2])
    assert line(nie, "TE, 2") == [2.0, 2.0]


def test_titles_say_what_is_asked_and_where_it_is_strongest() -> None:
    nie, tie = panels(maps.layers_figure(depth_sites(), TOTAL))
    assert nie.get_title(loc="left") == "NIE: is it sufficient?\nstrongest: edit, layer 0: 2"
    assert tie.get_title(loc="left") == "TIE: is it necessary?\nstrongest: edit, layer 0: 1"
    assert nie.get_ylabel() == "effect (logits)"


def test_strongest_is_by_size_and_keeps_its_sign() -> None:
    sites = table([site("heads", "attention_heads", 0, "last", unit=(h, h + 1), mean=m) for h, m in enumerate((1, -3))])
    assert panels(maps.heads_figure(sites, 0.05))[0].get_title(loc="left").endswith("strongest: head 1, layer 0: -3")


def test_a_band_covers_the_interval_and_is_left_out_where_there_is_none() -> None:
    rows = [
        site("layers", "layer_output", n, "edit", mean=1.0, ci_low=low, ci_high=3.0) for n, low in ((0, 0.5), (1, NaN))
    ]
    band = panels(maps.layers_figure(table(rows), TOTAL))[0].collections[0]
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    assert set(corners[:, 0]) == {0.0}
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.5, 3.0)


def test_what_most_estimates_ask_to_be_read_with_care_for_is_in_the_title() -> None:
    sites = depth_sites().assign(n=2, clusters=2, reason="only 2 clusters")
    title = maps.layers_figure(sites, TOTAL).get_suptitle()
    assert "mean and 95% interval; pairs: 2, clusters: 2" in title
    assert title.endswith("only 2 clusters")


def module_sites(*positions: str) -> pd.DataFrame:
    means = {"attention_output": 0.1, "mlp_output": 0.4}
    return table(
        site("modules", component, layer, position, mean=mean * layer)
        for position in positions
        for layer in range(LAYERS)
        for component, mean in means.items()
    )


def test_modules_marks_the_last_third() -> None:
    nie, tie = panels(maps.modules_figure(module_sites("all")))
    assert labels(nie) == ["MLP", "attention", "last third of layers", "its MLP embeds the changed words anew"]
    assert "its MLP embeds the changed words anew" not in labels(panels(maps.modules_figure(module_sites("last")))[0])
    assert line(nie, "MLP") == pytest.approx([0.4 * layer for layer in range(LAYERS)])
    assert line(tie, "attention") == pytest.approx([0.05 * layer for layer in range(LAYERS)])
    shaded = nie.patches[0].get_extents().transformed(nie.transData.inverted())
    assert (shaded.x0, shaded.x1) == pytest.approx((3.5, 5.5))  # layers 4 and 5 of 6


def test_modules_has_a_row_per_position() -> None:
    axes = panels(maps.modules_figure(module_sites("all", "last")))
    assert [axis.get_title(loc="left").split(":")[0] for axis in axes] == [
        "NIE at 'all'",
        "TIE at 'all'",
        "NIE at 'last'",
        "TIE at 'last'",
    ]


def test_tokens_stand_in_reading_order_under_their_number_of_pairs() -> None:
    names = {
        "post_instruction[0]": 8,
        "after_edit[10]": 2,
        "after_edit[9]": 3,
        "edit[-1]": 8,
        "edit[-10]": 1,
        "edit[-9]": 4,
    }
    rows = [
        site("tokens", "layer_output", layer, name, n=n, mean=float(n + layer))
        for name, n in names.items()
        for layer in (0, 1)
    ]
    nie, _ = panels(maps.tokens_figure(table(rows), 0.05))
    order = ["edit[-10]", "edit[-9]", "edit[-1]", "after_edit[9]", "after_edit[10]", "post_instruction[0]"]
    assert [text.get_text() for text in nie.get_xticklabels()] == order
    above = next(child for child in nie.child_axes)
    assert [text.get_text() for text in above.get_xticklabels()] == ["1", "4", "8", "3", "2", "8"]
    assert np.asarray(nie.images[0].get_array()).tolist() == [[1, 4, 8, 3, 2, 8], [2, 5, 9, 4, 3, 9]]


def test_whole_mlps_are_drawn_by_layer_with_te_beside_them() -> None:
    rows = [site("neurons", "mlp_neurons", layer, "last", unit=(0, 64), mean=0.3 * layer) for layer in (1, 0, 2)]
    searched = [site("neurons:windows", "mlp_neurons", 2, "last", unit=(0, 16), mean=9.0)]
    nie, tie = panels(whole_mlps_figure(table([*rows, *searched]), TOTAL))
    assert line(nie, "last") == pytest.approx([0.0, 0.3, 0.6])
    assert line(tie, "last") == pytest.approx([0.0, 0.15, 0.3])
    assert line(tie, "TE, 2") == [2.0, 2.0]


def head_sites() -> pd.DataFrame:
    means = {(0, 0): 0.1, (0, 1): -0.6, (3, 0): 0.2, (3, 1): 0.3}
    return table(
        site(
            "heads", "attention_heads", layer, "last", unit=(head, head + 1), mean=mean, q=0.05 if mean > 0.2 else 0.06
        )
        for (layer, head), mean in means.items()
    )


def test_a_map_is_layer_by_unit_on_one_scale_centred_on_zero() -> None:
    nie, tie = panels(maps.heads_figure(head_sites(), 0.05))
    assert np.asarray(nie.images[0].get_array()).tolist() == [[0.1, -0.6], [0.2, 0.3]]
    assert np.asarray(tie.images[0].get_array()).tolist() == [[0.05, -0.3], [0.1, 0.15]]
    assert [text.get_text() for text in nie.get_yticklabels()] == ["0", "3"]
    assert [image.get_clim() for image in (nie.images[0], tie.images[0])] == [(-0.6, 0.6)] * 2
    assert nie.get_title(loc="left").endswith("strongest: head 1, layer 0: -0.6")


def test_dots_mark_the_cells_at_or_below_alpha() -> None:
    nie, _ = panels(maps.heads_figure(head_sites(), 0.05))
    assert nie.collections[0].get_offsets().tolist() == [[1.0, 1.0]]  # second head, second layer row


def test_what_was_not_measured_is_left_blank() -> None:
    sites = head_sites()
    nie, _ = panels(maps.heads_figure(sites[(sites["layer"] == 0) | (sites["unit_start"] == "0")], 0.05))
    assert np.ma.getmaskarray(np.ma.masked_invalid(nie.images[0].get_array())).tolist() == [
        [False, False],
        [False, True],
    ]


def test_heads_are_ordered_as_numbers_with_a_row_per_position() -> None:
    rows = [
        site("heads", "attention_heads", 0, position, unit=(head, head + 1), mean=float(head))
        for position in ("last", "edit")
        for head in range(11)
    ]
    axes = panels(maps.heads_figure(table(rows), 0.05))
    assert len(axes) == 4
    assert np.asarray(axes[2].images[0].get_array()).tolist() == [[float(head) for head in range(11)]]


def test_kinds_of_heads_have_rows_of_their_own() -> None:
    rows = [
        site("heads", component, 0, "edit", unit=(head, head + 1), mean=float(head))
        for component, heads in (("attention_heads", 4), ("value_heads", 2))
        for head in range(heads)
    ]
    axes = panels(maps.heads_figure(table(rows), 0.05))
    assert [np.asarray(axis.images[0].get_array()).shape for axis in axes] == [(1, 4), (1, 4), (1, 2), (1, 2)]
    assert "edit, value heads" in axes[2].get_title(loc="left")


def unit_figure() -> Axes:
    values = {5: (0.4, 0.3), 6: (0.2, 0.02), 7: (0.0, 0.0)}
    sites = pd.DataFrame(
        site(UNITS, "mlp_neurons", 4, "last", unit=(unit, unit + 1), quantity=quantity, split="heldout", mean=mean)
        for unit, means in values.items()
        for quantity, mean in zip(("nie", "tie"), means, strict=True)
    )
    records = [{"layer": 4, "unit": unit, "nie": values[unit][0], "tie": values[unit][1]} for unit in (5, 6)]
    mediators = pd.DataFrame(records).assign(mediates=[True, False])
    return units_figure(sites, mediators, threshold=0.1, min_share=0.05).axes[0]


def test_units_names_the_mediating_ones_and_draws_the_share_asked_for() -> None:
    axis = unit_figure()
    assert [text.get_text() for text in axis.texts] == ["4.5"]
    assert labels(axis) == ["all 3 measured", "1 not confirmed", "1 mediating", "5% of TE"]
    offsets = [np.asarray(points.get_offsets()).tolist() for points in axis.collections]
    assert offsets == [[[0.4, 0.3], [0.2, 0.02], [0.0, 0.0]], [[0.2, 0.02]], [[0.4, 0.3]]]
    thresholds = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert [thresholds[0].get_xdata()[0], thresholds[1].get_ydata()[0]] == [0.1, 0.1]


def test_png_has_the_size_promised_and_the_same_bytes_each_time() -> None:
    first, second = (figures.png(maps.layers_figure(depth_sites(), TOTAL)) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert int.from_bytes(first[16:20], "big") == figures.WIDTH * figures.DPI
    assert b"Software" not in first  # the version of matplotlib would be a reason to differ


_HEAVY = "{'torch', 'transformers', 'matplotlib.pyplot'}"
_LOADED = f"import sys; import remote_mediation.report; print(*({_HEAVY} & set(sys.modules)))"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "loaded"), [("", ""), ("import matplotlib.pyplot; ", "matplotlib.pyplot")])
def test_reports_load_neither_torch_nor_pyplot(before: str, loaded: str) -> None:
    """The second case shows that the check can fail."""
    done = subprocess.run([sys.executable, "-c", before + _LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == loaded


def probe_profile() -> pd.DataFrame:
    """Three layers in any order; harm is read at `edit`, and at `last` nothing could be measured."""
    rows = [
        {"position": position, "layer": layer, "relative_depth": layer / 2, "accuracy": 0.5 + 0.2 * layer}
        for position in ("edit", "last")
        for layer in (1, 0, 2)
    ]
    table = pd.DataFrame(rows).assign(n=120, clusters=20, control=0.5, control_high=0.6, reason="")
    table = table.assign(low=table["accuracy"] - 0.1, high=table["accuracy"] + 0.05)
    table.loc[table["position"] == "last", ["accuracy", "low", "high"]] = NaN
    table.loc[table["position"] == "last", "reason"] = "one class only"
    return table


def band(axis: Axes, number: int) -> dict[float, list[float]]:
    """Lowest and highest point of a band, by depth."""
    corners = np.concatenate([path.vertices for path in axis.collections[number].get_paths()])
    return {
        float(x): [float(corners[corners[:, 0] == x, 1].min()), float(corners[corners[:, 0] == x, 1].max())]
        for x in np.unique(corners[:, 0])
    }


def test_probes_are_drawn_by_layer_above_what_swapped_labels_reach() -> None:
    figure = probe_figure(probe_profile(), {})
    edit, last = panels(figure)
    assert (edit.get_xlabel(), edit.get_ylabel()) == ("layer", "accuracy on other templates (chance: 50%)")
    assert [float(x) for x in edit.lines[0].get_xdata()] == [0, 1, 2]
    assert [float(y) for y in edit.lines[0].get_ydata()] == pytest.approx([0.5, 0.7, 0.9])
    assert list(band(edit, 0).values()) == [pytest.approx([0.5, 0.6])] * 3
    assert list(band(edit, 1).values()) == [pytest.approx([y - 0.1, y + 0.05]) for y in (0.5, 0.7, 0.9)]
    assert edit.get_title(loc="left") == "at 'edit'\nbest: layer 2: 90%"
    assert last.get_title(loc="left") == "at 'last'\nnone: one class only"
    assert figure.get_suptitle().endswith("prompts: 120, clusters: 20")


def test_where_harm_acts_is_marked_in_every_panel_of_the_probes() -> None:
    for axis in panels(probe_figure(probe_profile(), {"MLP": 1, "attention": 2, "unmeasured": 7})):
        marked = {str(line.get_label()): line.get_xdata()[0] for line in axis.lines if "acts" in str(line.get_label())}
        assert marked == {"MLP first acts after layer 1": 1, "attention first acts after layer 2": 2}


def detectors() -> pd.DataFrame:
    rows = [
        {"detector": name, "evaluation": evaluation, "n": 40 + n, "auroc": area, "false_alarms_90": alarms}
        for n, evaluation in enumerate(("heldout", "hard_negatives"))
        for name, area, alarms in (("gates", 0.9 - n / 10, 0.2 + n / 10), ("random neurons", 0.5, NaN))
    ]
    table = pd.DataFrame(rows)
    table["false_alarms_95"] = NaN
    ends = {
        f"{name}_{end}": table[name] + by
        for name in ("auroc", "false_alarms_90", "false_alarms_95")
        for end, by in (("low", -0.1), ("high", 0.05))
    }
    return table.assign(**ends)


def test_detectors_have_a_dot_and_an_interval_for_every_set_of_prompts() -> None:
    figure = detector_figure(detectors())
    area, alarms = panels(figure)
    assert [text.get_text() for text in area.get_yticklabels()] == ["gates", "random neurons"]
    drawn = {str(line.get_label()): line for line in area.lines}
    assert [float(x) for x in drawn["held-out pairs"].get_xdata()] == [0.9, 0.5]
    assert [float(x) for x in drawn["hard_negatives"].get_xdata()] == [0.8, 0.5]
    assert [float(y) for y in drawn["held-out pairs"].get_ydata()] == [-0.125, 0.875]
    assert [float(y) for y in drawn["hard_negatives"].get_ydata()] == [0.125, 1.125]
    first = area.collections[0].get_segments()[0]
    assert first.tolist() == [pytest.approx([0.8, -0.125]), pytest.approx([0.95, -0.125])]
    assert [float(x) for x in alarms.lines[1].get_xdata()] == pytest.approx([0.3])  # none for random sets
    assert "90% recall" in alarms.get_title(loc="left")
    assert figure.get_suptitle().endswith("prompts: held-out pairs: 40, hard_negatives: 41")


@pytest.mark.parametrize(("defined", "recall"), [((90, 95), 95), ((90,), 90), ((), 90)])
def test_false_alarms_are_drawn_at_the_highest_recall_that_is_defined(defined: tuple[int, ...], recall: int) -> None:
    table = detectors()
    for percent in (90, 95):
        for end in ("", "_low", "_high"):
            table[f"false_alarms_{percent}{end}"] = 0.25 if percent in defined else NaN
    _, alarms = panels(detector_figure(table))
    assert f"for {recall}% recall" in alarms.get_title(loc="left")
    assert bool(alarms.collections[0].get_segments()) == bool(defined)


def streamed(edit: list[float], last: list[float]) -> pd.DataFrame:
    """The residual stream's mean NIE, layer by layer, of a TE of 2."""
    rows = [
        site("layers", "layer_output", layer, position, mean=2 * share)
        for position, shares in (("edit", edit), ("last", last))
        for layer, share in enumerate(shares)
    ]
    return table(rows)


def test_the_passage_from_the_edit_to_the_answer_is_told_by_layer() -> None:
    sites = streamed([1.0, 0.95, 0.8, 0.3, 0.05, 0.02], [0.0, 0.12, 0.05, 0.4, 0.7, 1.0])
    assert maps.passage(sites, TOTAL) == (
        "Half of TE has left the changed words after layer 3 (10% after 2, 90% after 4), and half has arrived where "
        "the answer is read after layer 4 (10% after 3, 90% after 5), by the mean NIE of the residual stream."
    )
    stuck = streamed([1.0] * LAYERS, [0.2] * LAYERS)
    assert "has left the changed words after layer none (10% after none, 90% after none)" in maps.passage(stuck, TOTAL)
    assert "answer is read after layer none (10% after 0, 90% after none)" in maps.passage(stuck, TOTAL)


def test_without_a_total_effect_nothing_passes() -> None:
    assert maps.passage(streamed([1.0], [0.0]), Estimate(8, 4, 0.1, -0.5, 0.7, "", 0.6)) == ""


def test_the_title_of_the_layers_states_the_result() -> None:
    sites = streamed([1.0, 0.95, 0.8, 0.3, 0.05, 0.02], [0.0, 0.12, 0.05, 0.4, 0.7, 1.0])
    said = "Half of the effect has left the changed words after layer 3, and reached the answer after 4\n"
    assert maps.layers_figure(sites, TOTAL).get_suptitle().startswith(said)
    stuck = maps.layers_figure(streamed([1.0] * LAYERS, [0.2] * LAYERS), TOTAL)
    assert stuck.get_suptitle().startswith("Residual stream after each layer, swapped at one position")


def test_where_it_passes_is_told_for_both_effects() -> None:
    sites = streamed([1.0, 0.95, 0.8, 0.3, 0.05, 0.02], [0.0, 0.12, 0.05, 0.4, 0.7, 0.85])
    table = maps.passage_table(sites, TOTAL)
    assert table.header == ("the effect has", "by", "10% of TE", "50% of TE", "90% of TE")
    by = {row[:2]: row[2:] for row in table.rows}
    assert by["left 'edit'", "NIE"] == ("layer 2", "layer 3", "layer 4")
    assert by["arrived at 'last'", "NIE"] == ("layer 3", "layer 4", "-")
    assert len(by) == 4


def test_the_curve_of_late_neurons_has_its_legend_inside_and_no_powers_of_ten() -> None:
    curve = pd.DataFrame({"part": [0.0001, 0.01, 1.0]})
    names = [f"{kind}{way}{end}" for kind in ("", "direct_") for way in ("nie", "tie") for end in ("", "_low", "_high")]
    bands = pd.DataFrame({"direction": ["nie", "tie"], "harm": [0.8, 0.7]})
    figure = curve_figure(curve.assign(**dict.fromkeys(names, 0.5)), bands)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert {"0.01", "1", "100"} <= {text.get_text() for text in figure.axes[0].get_xticklabels()}
