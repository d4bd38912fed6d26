"""rotopo: preference optimisation of language models on Lightning.

A preference pair flows one way: row → preference → tokens → batch → log-probs → loss.
Every sub-package is one step of that way and imports only from the steps before it.
"""

import logging

# Said when peft is imported, on some processors: a kernel for 4-bit weights on a CPU that is not
# installed, where nobody has asked for 4-bit weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "Failed to load CPU gemm_4bit_forward" not in record.getMessage()
)

__version__ = "0.1.0"
