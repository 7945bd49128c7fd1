"""What the pictures of the gate set show, read back from the figure objects; tables are those of `test_sections`."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_sections import attacked, curve, gates, held, paths

from remote_mediation.analyses.attacks.show import attack_figure
from remote_mediation.analyses.intervene.show import dose_figure
from remote_mediation.analyses.neurons.figures import gate_figure
from remote_mediation.analyses.paths.show import path_figure

DOSES = {"nothing": 1.0, "gates times 0": 0.0}


def panels(figure: Figure) -> list[Axes]:
    return list(figure.axes)


def drawn(axis: Axes, label: str) -> list[tuple[float, float]]:
    """Points of a labelled series."""
    line = next(line for line in axis.lines if line.get_label() == label)
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def intervals(axis: Axes, number: int) -> list[list[float]]:
    """Ends of the horizontal intervals of a series."""
    return [[float(x) for x in segment[:, 0]] for segment in axis.collections[number].get_segments()]


def names(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_yticklabels()]


def test_the_curve_has_both_splits_and_marks_where_it_was_cut() -> None:
    left, _ = panels(gate_figure(curve(), gates(), 0.8, "logits"))
    assert drawn(left, "discovery") == [(1, 0.5), (2, 0.9), (16, 1.0)]
    assert drawn(left, "held out") == [(1, 0.4), (2, 0.88), (16, 1.0)]
    assert drawn(left, "chosen: 2")[0][0] == 2
    assert drawn(left, "80% of the MLP's NIE")[0][1] == 0.8
    assert left.get_xscale() == "log"


def test_the_gates_stand_beside_every_control_and_each_random_set_is_a_dot() -> None:
    figure = gate_figure(curve(), gates(), 0.8, "logits")
    assert figure.get_suptitle() == "The gate set: 2 neurons of layer 5"
    right = panels(figure)[1]
    assert names(right) == ["gates", "whole MLP", "earlier layer", "random sets"]
    assert sorted(drawn(right, "NIE"), key=lambda point: point[1]) == [(1.6, -0.12), (1.8, 0.88), (0.2, 1.88)]
    assert intervals(right, 0)[1] == pytest.approx([1.5, 1.7])  # the gates are the table's second row
    dots = np.asarray(right.collections[1].get_offsets())
    assert dots[:, 0].tolist() == [0.0, 0.01, 0.02, 0.04]
    assert np.all(np.abs(dots[:, 1] - 2.88) <= 0.1 + 1e-9)
    assert "logits" in right.get_xlabel()


def test_controls_that_were_not_measured_have_no_row() -> None:
    few = gates()[lambda table: table["set"].isin(["gates", "mlp"])]
    assert names(panels(gate_figure(curve(), few, 0.8, "logits"))[1]) == ["gates", "whole MLP"]


def test_paths_have_a_row_for_all_that_was_frozen_with_nie_and_tie_side_by_side() -> None:
    figure = path_figure(paths())
    (axis,) = panels(figure)
    assert names(axis) == ["MLPs", "attention"]
    assert drawn(axis, "NIE") == [(0.72, -0.125), (0.93, 0.875)]
    assert drawn(axis, "TIE") == [(0.72, 0.125), (0.93, 1.125)]
    assert intervals(axis, 0) == [[0.6, 0.81], [0.88, 0.99]]
    assert axis.get_xlim()[0] <= 0
    assert axis.get_xlim()[1] >= 1
    assert figure.get_suptitle().endswith("95% intervals; pairs: 4, clusters: 4")


def test_doses_are_in_order_with_the_plain_model_at_1() -> None:
    outcome, judged = panels(dose_figure(held(), DOSES, "logits", 2.0))
    assert drawn(outcome, "harmful prompts") == [(0, -1.2), (1, 0)]
    assert drawn(judged, "harmful prompts") == [(0, 0.1), (1, 0.8)]
    assert drawn(judged, "harmless prompts") == [(0, 0.05), (1, 0.05)]
    assert drawn(outcome, "-TE: harmful prompts as harmless ones")[0][1] == -2.0
    assert drawn(outcome, "gates at mean, harmful prompts")[0][1] == -1.7
    assert drawn(outcome, "random at mean, harmful prompts")[0][1] == 0.013
    corners = np.concatenate([path.vertices for path in outcome.collections[0].get_paths()])
    assert corners[corners[:, 0] == 0, 1].min() == pytest.approx(-1.3)


def test_attacks_have_a_row_each_and_holding_has_a_panel_of_its_own() -> None:
    carried, undone = panels(attack_figure(attacked(), "TE undone by holding"))
    assert names(carried) == ["none", "role play", "checkpoint tuned"]
    assert [x for x, _ in drawn(carried, "NIE / TE")] == [0.9, 0.4, 0.88]
    assert [y for _, y in drawn(carried, "TIE / TE")] == [0.125, 1.125, 2.125]
    assert [x for x, _ in drawn(undone, "held")] == pytest.approx([0.8, -0.1, 0.8])
    assert intervals(undone, 0)[1] == pytest.approx([-0.2, 0.1])
    assert undone.get_title(loc="left") == "TE undone by holding"
    shown = {line.get_color() for line in carried.lines if line.get_label() in ("NIE / TE", "TIE / TE")}
    assert next(line for line in undone.lines if line.get_label() == "held").get_color() not in shown
