"""What an analysis puts into a report: sections, and verdicts on claims for the table on top.

A section begins with what it found, in a line; then it says what was done and on which pairs, shows one figure and a
table or two, and says in words what their intervals allow. Generated text never enters: the run folder has a judge's
verdicts, not the answers.
"""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure

from remote_mediation.shares import ANY_EDIT
from remote_mediation.show.tables import Table, paragraphs
from remote_mediation.stats import Interval

_ALT = str.maketrans({"[": "(", "]": ")", "*": None, "`": None, "\n": " "})
"""What would end an alternative text, or be read aloud as a mark."""


class Section(NamedTuple):
    """A part of the report."""

    name: str
    """Of its figure's file, and for `show`."""
    title: str
    did: str
    """What was done, and on which pairs."""
    finding: str
    """What the numbers say, or why there are none."""
    tables: tuple[Table, ...] = ()
    figure: Figure | None = None
    brief: str = ""
    """The finding in a line; the whole finding where it is one."""
    lead: str = ""
    """Where its figure answers the study's question: what it shows, in a sentence; the figure then stands on top."""
    appendix: bool = False
    """Whether it stands at the end, for those who doubt the rest."""

    @property
    def figure_path(self) -> str:
        """Where its figure lies in the run folder."""
        return f"figures/{self.name.replace(':', '-')}.png"

    @property
    def line(self) -> str:
        """The finding in a line."""
        return self.brief or self.finding

    def drawn(self) -> str:
        """Its figure as Markdown, with what it shows for those who cannot see it; empty where there is none."""
        if not self.figure:
            return ""
        said = f"{self.title}: {self.lead or self.line}".translate(_ALT)
        return f"![{said}]({self.figure_path})"

    def markdown(self) -> str:
        """As Markdown, below its title: the finding in a line first."""
        rest = self.finding.replace(self.line, "").replace("  ", " ").strip()
        figure = "" if self.lead else self.drawn()
        return paragraphs(self.line, self.did, figure, rest, *(table.markdown() for table in self.tables))

    def titled(self) -> str:
        """The same with its title and without its figure, for a terminal."""
        return paragraphs(f"## {self.title}", self._replace(figure=None).markdown())


class Share(NamedTuple):
    """A number that a verdict rests on."""

    measure: str
    """What was swapped, or read."""
    direction: str
    """`nie`, `tie`, or another word where it is neither."""
    of: str
    """What it is a share of: TE, or something else."""
    harm: Interval
    placebo: Interval
    beta_harm: float
    """Slope of the effect on TE over pairs; NaN where it has none."""
    beta_placebo: float


class Verdict(NamedTuple):
    """What a run says of a claim, a row of the table on top of the report."""

    label: str
    """How it is called, such as `claim 2`."""
    claim: str
    """In words."""
    harm: str
    """The numbers that decide."""
    placebo: str
    """The same for the placebo; empty where there is none."""
    said: str
    """Supported, not supported, undecided, not tested, with what qualifies it."""
    short: str = ""
    """The claim in two or three words, for narrow tables; the label where it is empty."""
    shares: tuple[Share, ...] = ()
    """The numbers that decide, as numbers."""
    why: str = ""
    """The reason, in a sentence."""

    @property
    def name(self) -> str:
        """In a few words."""
        return self.short or self.label

    @property
    def supported(self) -> bool:
        """Whether its rule is met, whatever qualifies that."""
        return self.said.startswith("supported")

    @property
    def general(self) -> bool:
        """Whether it is one of any edit, not shown to be of harm."""
        return ANY_EDIT in self.said.split(", ")

    @property
    def control(self) -> str:
        """What a control takes from it; empty for nothing."""
        return ", ".join(one for one in self.said.split(", ")[1:] if one != ANY_EDIT)

    @property
    def row(self) -> str:
        """In a few words with its number or kind: `3. sparse gate`, `rival: one direction`."""
        kind, _, number = self.label.partition(" ")
        if not self.short:
            return self.label
        return f"{number}. {self.short}" if kind == "claim" else f"{kind}: {self.short}"
