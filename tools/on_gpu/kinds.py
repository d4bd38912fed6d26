"""What GPU kernels do, by their names, and how long at least one of them runs."""

import re

# The first that a kernel's name fits.
KINDS = {
    "attention": r"flash|fmha|attention|flex",
    "matmul": r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|splitk|triton_tem.*mm",
    "nccl": r"nccl",
    "optimiser": r"multi_tensor|adam",
    "softmax": r"softmax",
    "norm": r"norm|rsqrt|rms",
    "element-wise, compiled": r"triton_",
    "copies": r"memcpy|memset|copy|catarray|index|gather|scatter|embedding|fillfunctor",
    "reductions": r"reduce",
    "element-wise": r"elementwise",
    "other": r"",
}


def kind(kernel: str) -> str:
    return next(name for name, pattern in KINDS.items() if re.search(pattern, kernel.lower()))


def union(spans: list[tuple[float, float]]) -> float:
    """How long at least one of the spans lasts."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
