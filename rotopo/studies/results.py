"""Where a study puts its tables and pictures."""

from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from rotopo.errors import InputError
from rotopo.files import writing_whole
from rotopo.report.figures import save


def check(output: Path) -> None:
    """See that results can be put there, before they are computed.

    Raises:
        InputError: it is a file.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file: name a folder.")


def write(
    output: Path, tables: dict[str, pd.DataFrame], figures: dict[str, Figure], summary: str
) -> None:
    """Write tables (csv) and pictures (png) by name, and print a summary.

    Files appear only when all of them are complete.
    """
    with ExitStack() as complete:
        for name, table in tables.items():
            stream = complete.enter_context(writing_whole(output / f"{name}.csv"))
            table.to_csv(stream, index=False)
        for name, figure in figures.items():
            stream = complete.enter_context(writing_whole(output / f"{name}.png"))
            save(figure, stream, "png")
    print(summary)
    print(
        f"In {output}: {', '.join(sorted(f'{n}.csv' for n in tables))}; "
        f"{', '.join(sorted(f'{n}.png' for n in figures))}"
    )
