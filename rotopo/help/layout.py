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


def cut(text: str, width: int) -> str:
    """A text in one line, cut between words where it is too long."""
    return textwrap.shorten(text, width, placeholder=" …", break_on_hyphens=False)


def table(rows: Iterable[tuple[str, str]], column: int) -> str:
    """Names, and beside them in one line what is said of each; below those that are too long.

    Args:
        rows: the names and what is said of them.
        column: where that begins.
    """
    lines = []
    for name, said in rows:
        head, rest = f"  {name}", cut(said, WIDTH - column)
        if len(head) > column - 2 and rest:
            lines += [head, " " * column + rest]
        else:
            lines.append(f"{head:<{column}}{rest}".rstrip())
    return "\n".join(lines)


def entries(rows: Iterable[tuple[str, str]]) -> str:
    """Names, each on a line of its own, and what is said of them below, in full."""
    return "\n".join(
        "\n".join([f"  {name}", *([paragraph(said, 6)] if said else [])]) for name, said in rows
    )


def page(*parts: str) -> str:
    """Parts with an empty line between them."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
