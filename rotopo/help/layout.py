"""Text in lines of 80 columns."""

import textwrap
from collections.abc import Iterable

WIDTH = 80


def paragraph(text: str, indent: int = 0) -> str:
    """A text in lines."""
    margin = " " * indent
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(rows: Iterable[tuple[str, str]], column: int, lines: int = 1) -> str:
    """Names, and beside them what is said of each; below those that are too long.

    Args:
        rows: the names and what is said of them.
        column: where that begins.
        lines: how many it has at most; it is cut between words.
    """
    found = []
    for name, said in rows:
        head = f"  {name}"
        beside = textwrap.wrap(
            said, WIDTH - column, max_lines=lines, placeholder=" …", break_on_hyphens=False
        )
        if len(head) > column - 2 or not beside:
            found.append(head)
        else:
            found.append(f"{head:<{column}}{beside.pop(0)}")
        found += [" " * column + line for line in beside]
    return "\n".join(found)


def entries(rows: Iterable[tuple[str, str]]) -> str:
    """Names, each on a line of its own, and what is said of them below, in full."""
    return "\n".join(
        "\n".join([f"  {name}", *([paragraph(said, 6)] if said else [])]) for name, said in rows
    )


def page(*parts: str) -> str:
    """Parts with an empty line between them."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
