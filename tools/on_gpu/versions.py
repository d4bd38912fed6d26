"""What is there: without it no other number says anything."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from tools.on_gpu.journal import Case, Ended, WrongResultError
from tools.on_gpu.part import Place

NEEDED = ("torch", "transformers", "peft", "lightning", "datasets", "jsonargparse")
OTHERS = ("triton", "trl", "accelerate", "liger-kernel", "bitsandbytes", "flash-attn")
PROGRAMS = ("nvcc", "g++", "nvidia-smi")


def cases(place: Place) -> dict[str, Case]:
    return {"packages": packages, "device": lambda: device(place)}


def line(ended: list[Ended]) -> str:
    found = {case.name: case.values for case in ended}
    versions = found["packages"]
    absent = [name for name in (*OTHERS, *PROGRAMS) if versions.get(name) is None]
    texts = [f"torch {versions.get('torch')}"]
    if "device" in found:
        texts = [*found["device"].values(), *texts][:3]
    return ", ".join(map(str, texts)) + (f"; without {', '.join(absent)}" if absent else "")


def packages() -> dict[str, Any]:
    found = {name: _version(name) for name in (*NEEDED, *OTHERS)}
    found |= {name: shutil.which(name) for name in PROGRAMS}
    found |= {"python": platform.python_version(), "cores": os.cpu_count()}
    lacking = [name for name in NEEDED if found[name] is None]
    if lacking:
        raise WrongResultError(f"without {', '.join(lacking)} nothing else runs", found)
    return found


def device(place: Place) -> dict[str, Any]:
    if not place.on_gpu:
        return {"card": platform.processor() or platform.machine()}
    facts = torch.cuda.get_device_properties(0)
    return {
        "card": facts.name,
        "memory": f"{facts.total_memory / 2**30:.0f} GiB",
        "cuda": f"CUDA {torch.version.cuda}",
        "capability": f"sm_{facts.major}{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": _driver(),
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()
