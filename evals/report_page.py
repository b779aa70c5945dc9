"""The page of a report: sections of paragraphs, tables and pictures, as one HTML file that needs nothing else.

The page may load nothing (its content security policy says so), and every text in it is escaped.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from sparsify.errors import UnavailableError

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    # A name with dollar signs is a name, no formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """A figure: its inline SVG, what it shows (alt), and a caption below it; width: its own, in CSS pixels."""

    name: str
    alt: str
    caption: str
    svg: str
    width: int


@dataclass(frozen=True)
class Grid:
    """A table; the first `left` columns are text; marked: rows in bold; folded: shown on a click."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    marked: frozenset[int] = frozenset()
    folded: bool = False


@dataclass
class Part:
    """One section: paragraphs, tables and pictures in their order; missing: (what is not stored, what makes it)."""

    name: str
    title: str
    blocks: list[str | Grid | Picture] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


class Painter:
    """Draws figures into a folder, each as PNG and SVG, and returns them for the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: list[Path] = []

    def draw(
        self, name: str, size: tuple[float, float], paint: Callable[[Any], None], *, alt: str, caption: str
    ) -> Picture:
        """paint(figure) draws into an empty matplotlib figure of this size, in inches."""
        from matplotlib.figure import Figure

        def save(path: Path) -> None:
            figure = Figure(figsize=size, layout="constrained")
            paint(figure)
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)

        return self.save(name, save, alt=alt, caption=caption)

    def save(self, name: str, save: Callable[[Path], object], *, alt: str, caption: str) -> Picture:
        """save(path) writes the figure to a path that ends in .png or .svg."""
        from matplotlib import rc_context

        paths = [self.folder / f"{name}{suffix}" for suffix in (".svg", ".png")]
        with rc_context({**_STYLE, "svg.hashsalt": name}):
            for path in paths:
                save(path)
        self.written += paths
        svg, width = _inline(paths[0].read_text(encoding="utf-8"), name, alt)
        return Picture(name, alt, caption, svg, width)


def check_libraries() -> None:
    """Raises UnavailableError without jinja2 or matplotlib."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as problem:
        raise UnavailableError(f"a report needs {problem.name}: pip install 'sparsify-llm[report]'") from None


def render_page(title: str, subtitle: str, parts: Sequence[Part], footer: str) -> str:
    """Returns the HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, subtitle=subtitle, parts=parts, footer=footer, Markup=Markup)


def _inline(text: str, name: str, alt: str) -> tuple[str, int]:
    """Returns matplotlib's SVG as an element of a page, and its width in CSS pixels.

    Names in it get a prefix, as several stand in one page; its style sheet, which would be the page's, goes.
    """
    body = text[text.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    assert "<image" not in body, "the page loads no pictures: draw them as paths"
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None, "matplotlib writes a viewBox"
    # Points, as matplotlib counts, in CSS pixels.
    width = round(float(box[1].split()[2]) * 96 / 72)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}"><title>{escape(alt)}</title>{rest}', width
