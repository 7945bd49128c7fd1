"""What is shown in a terminal, or read by a program from one, cannot steer it.

Ids, categories, reasons and names of files are whatever somebody wrote: an escape code among them would clear the
screen, colour what follows or turn its letters round. All output goes through here, whoever made the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Control characters but for tabs and line feeds, line ends beyond ASCII, and those that turn the direction of writing.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Screen(Console):
    """A terminal, or a file in its place, on which every steering character of a text is shown as a mark."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Pieces of text with their styles; what moves the cursor is rich's own (`is_control`)."""
        for segment in super().render(renderable, options):
            yield segment if segment.is_control else segment._replace(text=harmless(segment.text))


def harmless(text: str) -> str:
    """A text with a mark in the place of each steering character."""
    return _STEERING.sub("�", text)


def json_text(data: Any) -> str:
    """Data as JSON of readable letters, with steering characters as JSON escapes them."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(data, indent=2, ensure_ascii=False))
