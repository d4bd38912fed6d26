"""rotopo: preference optimisation of language models on Lightning.

A preference pair flows one way: row → preference → tokens → batch → log-probs → loss.
Every sub-package is one step of that way and imports only from the steps before it.
"""

__version__ = "0.1.0"
