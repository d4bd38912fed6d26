"""One part, in a process of its own: ``-m tools.on_gpu.part NAME DEVICE [--tiny] JOURNAL``."""

import sys
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tools.on_gpu.journal import Journal, NotHereError

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


def require(need: str, place: Place) -> None:
    """Refuse a ``GPU``, a ``policy.SETTING`` or a package that is not there."""
    if need == "GPU":
        if not place.on_gpu:
            raise NotHereError("needs a GPU")
    elif need.startswith("policy."):
        from rotopo.models.settings import PolicyConfig

        if need.partition(".")[2] not in {field.name for field in fields(PolicyConfig)}:
            raise NotHereError(f"there is no {need}")
    elif find_spec(need) is None:
        raise NotHereError(f"{need} is not installed")


def main() -> None:
    name, device, *tiny, file = sys.argv[1:]
    place = Place(device, bool(tiny), Path(file))
    module = import_module(f"tools.on_gpu.{name}")

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
