"""Benchmarks, run from the repository's root, each with --help, as ``python -m tools.bench``:

tools.bench                  steps beside those of peers, their growth, where their time goes
tools.bench.scoring          a round's scoring in ROPO's procedure beside a reference pass
tools.bench.generation       tokens a second beside transformers' own generation
tools.bench.memory           what each rank holds under FSDP2
tools.bench.adapter_memory   what adapters keep until the backward pass
tools.bench.plan             rotopo plan's figures beside measured ones
"""
