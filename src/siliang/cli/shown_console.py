"""A Rich console that cleans all texts: only Rich's own escapes reach the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from siliang.terminal import shown, shown_changes, without_controls


class ShownConsole(Console):
    """Cleans texts before they are wrapped, while secrets are still in one piece, and all else after rendering."""

    def render_str(self, text: str, **settings: Any) -> Text:  # type: ignore[override]
        """Renders a string without secrets and control characters."""
        return super().render_str(shown(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Renders an object to segments whose texts are clean."""
        if isinstance(renderable, Text):
            renderable = shown_text(renderable)
        for segment in super().render(renderable, options):
            clean = segment.text if segment.control else without_controls(segment.text)
            yield segment if clean == segment.text else Segment(clean, segment.style, segment.control)


def shown_text(text: Text) -> Text:
    """A styled text without secrets, even those that span several styles, and with control characters escaped."""
    changes = shown_changes(text.plain)
    if not changes:
        return text
    out, at = text.blank_copy(), 0
    for first, last, instead in changes:
        out.append_text(text[at:first])
        start = len(out)
        out.append(instead)
        for style in [span.style for span in text.spans if span.start <= first < span.end]:
            out.stylize(style, start)
        at = last
    return out.append_text(text[at:])
