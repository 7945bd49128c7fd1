"""Charts in a page that needs nothing else: Vega as one script, and each chart's specification as JSON beside it."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from remote_mediation.errors import SettingsError

if TYPE_CHECKING:
    import altair

START = """
for (const place of document.querySelectorAll("[data-chart]")) {
  const spec = JSON.parse(document.getElementById(place.dataset.chart).textContent);
  vegaEmbed(place, spec, {renderer: "svg", actions: false}).then(
    () => place.setAttribute("data-drawn", "yes"),
    (error) => { place.textContent = "This chart could not be drawn: " + error; });
}
"""
"""Draws every chart in its place."""


class Charts:
    """Charts of a page: each has its place in the text, and its specification as JSON at the end."""

    def __init__(self) -> None:
        self.specs: list[str] = []

    def place(self, chart: altair.TopLevelMixin, description: str) -> str:
        """The place of a chart. description: for those who do not see it."""
        config = {"font": "system-ui, sans-serif", "view": {"stroke": None}}
        spec = {**chart.to_dict(), "description": description, "background": None, "config": config}
        name = f"chart-{len(self.specs)}"
        self.specs.append(f'<script type="application/json" id="{name}">{_json(spec)}</script>')
        return f'<div class="chart" data-chart="{name}" role="figure" aria-label="{escape(description)}"></div>'


def library() -> str:
    """Vega, Vega-Lite and vega-embed as one script.

    Raises:
        SettingsError: altair or vl-convert is not installed.
    """
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise SettingsError(f"{error}; the page needs altair: pip install 'remote-mediation[view]'") from error
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    # The snippet is optional, which the stub does not say.
    return str(vl_convert.javascript_bundle(vl_version=version))  # type: ignore[call-arg]


def _json(spec: dict[str, Any]) -> str:
    """JSON that no HTML parser takes for the end of its script."""
    return json.dumps(spec, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
