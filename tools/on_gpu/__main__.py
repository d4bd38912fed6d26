"""All that a machine with one GPU can tell of rotopo in a few minutes.

Parts, in the order of their value, each in a process of its own that is killed at its limit:
{parts}
Each prints one line. In --output: results.json, all cases with what they found and, of those that
failed, the traceback's end; summary.txt, the lines; failures.txt, all that failed parts said. A
part that fails stops no other, nor a case that kills its process the part's other cases. The exit
status is 0 if all that ran passed, 1 if something did not, 2 after wrong settings.

On one GPU:                        tools/gpu --output gpu
the same in small on a processor:  tools/gpu --device cpu --tiny --output gpu
What takes a GPU is then skipped, by name. Models are made here, of random weights: no network.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.on_gpu.runner import Part, run

DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Known:
    """A part's limit in seconds, what it does, and variables of its environment."""

    seconds: float
    what: str
    environment: dict[str, str] = field(default_factory=dict)


KNOWN = {
    "versions": Known(40, "what is there: card, driver, CUDA, torch, packages, compilers"),
    "exactness": Known(110, "log-probs and gradients against float64 on the processor"),
    # What cuBLAS needs to be deterministic; it slows products down, so it is for this part only.
    "fits": Known(140, "whole fits by the command line", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    "speed": Known(150, "training steps beside a plain one and TRL's: pairs/s, MFU, memory"),
    "kernels": Known(60, "where the time of the fastest step goes"),
    "memory": Known(60, "peak memory of full fine-tuning, LoRA and the rotation"),
}
# Nothing is looked for on the network.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(args: Sequence[str] | None = None) -> None:
    parts = "".join(
        f"  {name:<11}{known.what} ({known.seconds:.0f} s)\n" for name, known in KNOWN.items()
    )
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="tools/gpu",
        description=__doc__.format(parts=parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    add("--parts", default=",".join(KNOWN), metavar="A,B", help="these only (default: all)")
    add("--minutes", type=float, default=8.0, help="for all of it (default: %(default)g)")
    add("--device", choices=DEVICES, default="cuda", help="(default: %(default)s)")
    add("--tiny", action="store_true", help="tiny models and fewer cases: a minute or two")
    arguments = parser.parse_args(args)
    names = list(dict.fromkeys(arguments.parts.split(",")))
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(KNOWN)}")
    if not arguments.minutes > 0:
        parser.error("--minutes: has to be above zero")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu takes --tiny: models of full size would take hours")
    if arguments.device == "cuda" and not _gpu_is_there():
        parser.error("torch finds no GPU here; --device cpu --tiny runs without one")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {arguments.output}: {error.strerror}")

    # Parts are process groups of their own, which end with this one only if it ends in order.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    where = [arguments.device, *(["--tiny"] if arguments.tiny else [])]
    with tempfile.TemporaryDirectory(prefix="on_gpu-") as scratch:
        caches = {name: f"{scratch}/{name}" for name in ("ROTOPO_CACHE", "HF_DATASETS_CACHE")}
        prepared = [
            Part(
                name,
                [sys.executable, "-m", "tools.on_gpu.part", name, *where],
                # The limits are a GPU's; a processor that others use too may take longer.
                arguments.minutes * 60 if arguments.tiny else KNOWN[name].seconds,
                _OFFLINE | caches | KNOWN[name].environment,
            )
            for name in names
        ]
        if arguments.tiny:  # a second thread would only wait, and for long when others compute too
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        facts = {
            "began": time.strftime("%Y-%m-%d %H:%M:%S"),
            "device": arguments.device,
            "tiny": arguments.tiny,
            "minutes": arguments.minutes,
        }
        passed = run(prepared, arguments.minutes * 60, arguments.output, facts, Path(scratch))
    sys.exit(0 if passed else 1)


def _gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
