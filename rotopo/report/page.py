"""A self-contained HTML page of sections with tables, pictures and texts."""

import base64
import hashlib
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
from matplotlib.figure import Figure

from rotopo.errors import InputError
from rotopo.report.figures import CHOSEN, FONT, INK, STYLE, TICK, shortened

_HERE = Path(__file__).parent
# Of the page and of its pictures, whose letters are texts too, measured in a wider family.
_FAMILY = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica Neue, Arial, sans-serif"
_NAME = 2.2  # inches of a name in a table at most
# Colours of the pictures that a dark page needs lighter; all others read on both.
_IN_THE_DARK = {INK: "#d9dde3", CHOSEN: "#4aa3e0"}
_DARK = "".join(
    f"[style*='{part}: {light}']{{{part}:{dark}!important}}"
    for light, dark in _IN_THE_DARK.items()
    for part in ("stroke", "fill")
)
_DARK = f"<style>@media (prefers-color-scheme: dark){{{_DARK}}}</style>"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and what it is sorted by (a number or a text).

    ``None`` to sort by comes last, whichever the direction. ``below`` is shown under it, and
    ``whole``, where the text is shortened, in a tooltip.
    """

    text: str
    key: float | str | None
    below: str = ""
    whole: str = ""


@dataclass(frozen=True)
class Table:
    """A table that sorts.

    Attributes:
        caption: what it holds, and how it was computed.
        headers: a title for each column.
        rows: cells, as many as there are headers.
        emphasis: for each row, whether it stands apart (figures that are not the run's own).
        long: whether there are whole texts in it, so that rows are stacked on a phone.
        hints: what a header stands for in the files, by header, for a tooltip.
    """

    caption: str
    headers: list[str]
    rows: list[list[Cell]]
    emphasis: list[bool] = field(default_factory=list)
    long: bool = False
    hints: dict[str, str] = field(default_factory=dict)

    @property
    def numeric(self) -> set[int]:
        """The columns without texts, which are set flush right."""
        columns = enumerate(zip(*self.rows, strict=True))
        return {i for i, cells in columns if not any(isinstance(c.key, str) for c in cells)}


@dataclass(frozen=True)
class Panel:
    """A figure, what it shows in words for those who do not see it, and the names on it, which it
    may have shortened."""

    figure: Figure
    alt: str
    names: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The names that are too long to be on a picture for certain."""
        return "\n".join(name for name in self.names if shortened(name, TICK) != name)

    @property
    def address(self) -> str:
        """The figure as an SVG inside a data: address."""
        stream = io.StringIO()
        settings: dict[Any, Any] = STYLE | {
            "svg.hashsalt": "rotopo",
            "svg.fonttype": "none",
            "savefig.transparent": True,
            "savefig.dpi": 192,
        }
        with matplotlib.rc_context(settings):
            self.figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        svg = stream.getvalue()
        svg = svg[svg.index("<svg") :].replace(f"'{FONT}'", _FAMILY)
        start = svg.index(">") + 1
        svg = " ".join((svg[:start] + _DARK + svg[start:]).split())
        return "data:image/svg+xml," + quote(svg.replace('"', "'"), safe=" /:=;,()'-.!*~@+$?[]&")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels, 96 to the inch."""
        width, height = self.figure.get_size_inches()
        return round(96 * width), round(96 * height)


@dataclass(frozen=True)
class Picture:
    """Panels side by side under one caption."""

    title: str
    panels: list[Panel]
    caption: str


@dataclass(frozen=True)
class Answer:
    """A response in a comparison: whose it is, notes such as its scores, and the text."""

    name: str
    notes: list[str]
    text: str


@dataclass(frozen=True)
class Comparison:
    """Responses to one prompt, side by side."""

    title: str
    prompt: str
    answers: list[Answer]


@dataclass(frozen=True)
class Comparisons:
    """Several prompts and how they were picked."""

    caption: str
    items: list[Comparison]


@dataclass(frozen=True)
class Settings:
    """A run's configuration, folded."""

    title: str
    text: str


Part = Table | Picture | Comparisons | Settings


@dataclass(frozen=True)
class Section:
    """A section of the page: its parts in their order."""

    title: str
    parts: list[Part]
    lead: str = ""

    @property
    def anchor(self) -> str:
        return "-".join(self.title.lower().replace(",", "").split())


def number(value: float | None, digits: int = 3, below: str = "") -> Cell:
    """A number, with a true minus sign; a dash where there is none.

    Args:
        value: to show and to sort by.
        digits: behind the point.
        below: what is shown under it, such as its interval.
    """
    if value is None or math.isnan(value):
        return Cell("–", None)
    return Cell(with_minus(value, digits), value, below)


def with_minus(value: float, digits: int) -> str:
    """A number as text, its minus sign a minus sign; with two digits where so few behind the point
    would make it zero."""
    vanishes = value != 0 and abs(value) < 0.5 * 10**-digits
    return (f"{value:.1e}" if vanishes else f"{value:,.{digits}f}").replace("-", "−")


def text(value: str) -> Cell:
    """A text that sorts without regard to case."""
    return Cell(value, value.casefold())


def label(value: str) -> Cell:
    """A name, which may be a path: the whole of a long one is in a tooltip."""
    shown = shortened(value, _NAME)
    return Cell(shown, value.casefold(), whole="" if shown == value else value)


def render(title: str, about: str, summary: list[tuple[str, str]], sections: list[Section]) -> str:
    """The page as HTML: all text escaped, styles and script inside, nothing asked of a network.
    The summary is what it is of, and what there is to say.

    The page's own policy lets no script run but the one that sorts its tables, named by its hash.

    Raises:
        InputError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise InputError("a report takes Jinja2: pip install 'rotopo[report]'.") from error

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["kind"] = lambda part, name: type(part).__name__ == name
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        title=title,
        about=[paragraph.strip() for paragraph in about.split("\n\n") if paragraph.strip()],
        summary=summary,
        sections=sections,
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        family=_FAMILY,
        script=script,
        digest=digest,
    )
