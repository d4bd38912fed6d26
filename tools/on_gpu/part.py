"""One part, in a process of its own: ``python -m on_gpu.part NAME DEVICE [--tiny] JOURNAL``."""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from on_gpu.journal import Journal

# The exit status of a process that has more to run and cannot: CUDA does not go on in it.
GO_ON_IN_ANOTHER = 75


@dataclass(frozen=True)
class Place:
    """Where a part runs.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: a few seconds' worth of it, on models of a few thousand weights.
        journal: the part's; those of the parts before it lie beside it.
    """

    device: str
    tiny: bool
    journal: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def main() -> None:
    name, device, *tiny, file = sys.argv[1:]
    place = Place(device, bool(tiny), Path(file))
    module = import_module(f"on_gpu.{name}")

    def broken() -> bool:
        """Whether CUDA is: after an error in a kernel it answers every call with that error."""
        if not place.on_gpu:
            return False
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    if Journal(place.journal).run(module.cases(place), module.line, broken):
        sys.exit(GO_ON_IN_ANOTHER)


if __name__ == "__main__":
    main()
