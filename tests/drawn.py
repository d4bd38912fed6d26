"""What is wrong with a drawn figure: what is cut off at its edge, and texts on one another."""

from collections.abc import Iterator
from itertools import combinations

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

_EDGE = 1.0  # points that a letter's rounding may hang over
_LEADING = 0.12  # share of a text's height at its top and at its bottom that holds no letters


def faults(figure: Figure) -> list[str]:
    """Everything that a reader would stumble over, in words; nothing where the figure is well."""
    figure.draw_without_rendering()  # places everything
    renderer = FigureCanvasAgg(figure).get_renderer()
    whole = figure.bbox.padded(_EDGE * figure.dpi / 72)
    found = []
    for artist in _shown(figure):
        box = artist.get_tightbbox(renderer)
        if box is not None and not _inside(box, whole):
            found.append(f"{_named(artist)} is cut off: {_place(box)} in {_place(figure.bbox)}")
    boxes = [(text, _letters(text, renderer)) for text in _texts(figure)]
    for (one, first), (other, second) in combinations(boxes, 2):
        if first.overlaps(second):
            found.append(f"{one.get_text()!r} and {other.get_text()!r} overlap")
    for axes in figure.findobj(Axes):
        if min(axes.get_window_extent(renderer).size) < 0.4 * figure.dpi:
            found.append(f"{axes.get_title()!r} is squeezed to less than 0.4 inches")
    return found


def _shown(figure: Figure) -> list[Artist]:
    """What has to be whole: axes with all that belongs to them, legends, and texts."""
    kinds = [*figure.findobj(Axes), *figure.findobj(Legend)]
    return [artist for artist in [*kinds, *_texts(figure)] if artist.get_visible()]


def _texts(figure: Figure) -> list[Text]:
    """All texts that are drawn; of an axis only those at ticks within its range."""
    ticks: set[Text] = set()
    drawn: set[Text] = set()
    for axis in figure.findobj(Axis):
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            ticks |= {tick.label1, tick.label2}
        drawn |= set(_at_ticks(axis))
        if not axis.get_visible():
            hidden = {axis.label, axis.offsetText}
            ticks |= hidden
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and (text not in ticks or text in drawn)
    ]


def _at_ticks(axis: Axis) -> Iterator[Text]:
    if not axis.get_visible() or not (axis.axes and axis.axes.axison):
        return
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
        if low - slack <= tick.get_loc() <= high + slack:
            yield from (label for label in (tick.label1, tick.label2) if label.get_visible())


def _letters(text: Text, renderer) -> Bbox:
    # Not an annotation's own, which has its arrow in it.
    box = Text.get_window_extent(text, renderer)
    across = text.get_rotation() in (90, 270)
    inset = _LEADING * (box.width if across else box.height)
    x, y = (inset, 0.5) if across else (0.5, inset)
    return Bbox.from_extents(box.x0 + x, box.y0 + y, box.x1 - x, box.y1 - y)


def _inside(box: Bbox, whole: Bbox) -> bool:
    return whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


def _named(artist: Artist) -> str:
    if isinstance(artist, Text):
        return repr(artist.get_text())
    if isinstance(artist, Axes):
        return f"axes {artist.get_title(loc='left') or artist.get_title()!r}"
    return type(artist).__name__


def _place(box: Bbox) -> str:
    return f"[{box.x0:.0f} to {box.x1:.0f}, {box.y0:.0f} to {box.y1:.0f}]"
