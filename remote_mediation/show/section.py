"""What an analysis puts into a report: sections, and verdicts on claims for the table on top.

A section says what was done and on which pairs, shows one figure and a table or two, and says in words what their
intervals allow. Generated text never enters: the run folder has a judge's verdicts, not the answers.
"""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure

from remote_mediation.show.tables import Table, paragraphs


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

    def drawn(self) -> str:
        """Its figure as Markdown; empty where there is none."""
        return f"![{self.title}]({self.figure_path})" if self.figure else ""

    def markdown(self) -> str:
        """As Markdown, below its title."""
        return paragraphs(
            self.did, "" if self.lead else self.drawn(), self.finding, *(table.markdown() for table in self.tables)
        )


class Verdict(NamedTuple):
    """What a run says of a claim, a row of the table on top of the report."""

    label: str
    """How the headline names it, such as `claim 2`."""
    claim: str
    """In words."""
    harm: str
    """The numbers that decide."""
    placebo: str
    """The same for the placebo; empty where there is none."""
    said: str
    """Supported, not supported, undecided, not tested, with what qualifies it."""
