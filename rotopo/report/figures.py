"""How every picture is made: one style, names that fit, legends that grow the figure, one way to
save it. Studies and tools draw with it too."""

import math
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font

# Okabe and Ito's colours and their like, which the colour-blind can tell apart.
CHOSEN, REJECTED, MARGIN = "#0072b2", "#d55e00", "#009e73"
# Of policies and models: not those of chosen and rejected, until there are many.
SERIES = ("#8a6fd1", "#c98a00", "#009e73", "#cc79a7", "#56b4e9", "#9a6324", CHOSEN, REJECTED)
GREY = "#848b94"
# Of axes and letters. The page makes it, and blue, lighter in the dark.
INK = "#1f2328"
FONT = "DejaVu Sans"  # comes with matplotlib, so that it is there
_LEGEND = 8  # points of a legend's letters
_BESIDE = 4.4  # of these, what a legend's column has beside its letters: the line, and gaps
STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": _LEGEND,
    "legend.handlelength": 1.6,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "hatch.linewidth": 0.6,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
WIDTH, HEIGHT = 3.7, 2.8  # inches: the width of a phone's column at 96 pixels an inch
TITLE = 2.9  # inches of a panel's title at most, and so of any name on it
TICK = 1.25  # inches of a name beside an axis at most


def new(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure, in inches, that makes room for what is outside of its axes."""
    return Figure(figsize=(width, height), layout="constrained")


def panel(title: str, height: float = HEIGHT, names: bool = False) -> tuple[Figure, Axes]:
    """A figure with one pair of axes.

    Args:
        title: shortened to what fits.
        height: of the figure, in inches.
        names: whether there will be names beside the axes, which leave the title less room.
    """
    figure = new(height=height)
    axes = figure.subplots()
    axes.set_title(short(title, TITLE - TICK * names, 9.5, bold=True))
    return figure, axes


@matplotlib.rc_context(STYLE)
def save(figure: Figure, place: Path | IO[bytes], kind: str | None = None) -> None:
    """Write a picture of dots.

    Args:
        figure: to draw.
        place: a file or a stream.
        kind: its format; None for that of the file's suffix.
    """
    figure.savefig(place, format=kind, dpi=150)


def legend_below(
    figure: Figure, handles: list[Artist] | None = None, labels: list[str] | None = None
) -> None:
    """A legend below all axes, in as many columns as there is room for; the figure grows by its
    height, so that the axes do not shrink.

    Args:
        figure: with everything drawn that is to be named.
        handles, labels: what is named; None for all that has a label, each label once, shortened
            to what fits.
    """
    if handles is None or labels is None:
        found: dict[str, Artist] = {}
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
        most = figure.get_figwidth() - 0.6
        handles, labels = list(found.values()), [short(label, most) for label in found]
    if not labels:
        return
    across = max(_width(label, _LEGEND, False) for label in labels) + _BESIDE * _LEGEND / 72
    columns = min(len(labels), max(1, int(figure.get_figwidth() / across)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + (1.7 * rows + 1) * _LEGEND / 72)


def short(name: str, inches: float, size: float = 8, bold: bool = False) -> str:
    """:func:`shortened`, for a picture, where dollars would begin a formula."""
    return shortened(name, inches, size, bold).replace("$", r"\$")


def shortened(name: str, inches: float, size: float = 8, bold: bool = False) -> str:
    """A name that fits: where it is too long, what is in its middle gives way, since paths and
    names of runs differ at their ends.

    Args:
        name: to show.
        inches: that there are for it.
        size: of the letters, in points.
        bold: whether they are.
    """
    shown = name
    kept = min(len(name), 200)
    while _width(shown, size, bold) > inches and kept:
        kept -= 1
        head = kept * 2 // 5
        shown = f"{name[:head]}…{name[len(name) - kept + head :]}"
    return shown


def lines(name: str, inches: float, size: float, most: int = 2, bold: bool = True) -> str:
    """A name on so many lines at most, each of which fits."""
    letters = max(1, int(inches / _width("n", size, bold)))
    parts = textwrap.wrap(name, letters, break_long_words=False) or [""]
    parts = [*parts[: most - 1], " ".join(parts[most - 1 :])] if len(parts) > most else parts
    return "\n".join(short(part, inches, size, bold) for part in parts)


def grid(figure: Any, n: int, columns: int) -> list[Axes]:
    """n axes in rows of so many columns; what is left of the last row stays empty."""
    columns = min(columns, n)
    cells = figure.subplots(math.ceil(n / columns), columns, squeeze=False).flatten().tolist()
    for axes in cells[n:]:
        axes.remove()
    return cells[:n]


def font_file(bold: bool = False) -> Path:
    """The file of the letters of all pictures."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path(), "fonts", "ttf", name)


def _width(name: str, size: float, bold: bool) -> float:
    """A line's width in inches."""
    return sum(_advance(sign, bold) for sign in name) * size / 72


@lru_cache(maxsize=1000)
def _advance(sign: str, bold: bool) -> float:
    """A sign's width, of letters whose size is 1; of one that the font lacks that of a wide one."""
    font = get_font(font_file(bold))
    font.set_size(100, 72)
    font.set_text(sign if ord(sign) in font.get_charmap() else "W", 0)
    return font.get_width_height()[0] / 64 / 100
