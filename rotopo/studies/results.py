"""Where a study puts its tables and pictures."""

import os
import tempfile
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from rotopo.errors import InputError


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
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as folder:
        for name, table in tables.items():
            table.to_csv(Path(folder) / f"{name}.csv", index=False)
        for name, figure in figures.items():
            figure.savefig(Path(folder) / f"{name}.png", dpi=150)
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, output / file.name)
    print(summary)
    print(
        f"In {output}: {', '.join(sorted(f'{n}.csv' for n in tables))}; "
        f"{', '.join(sorted(f'{n}.png' for n in figures))}"
    )
