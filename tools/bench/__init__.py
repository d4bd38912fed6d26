"""Benchmarks, run from the repository's root, each with --help:

python -m tools.bench                   steps beside those of peers, their growth, where their time
                                        goes
python -m tools.bench.scoring           a round's scoring in ROPO's procedure beside a reference
                                        pass
python -m tools.bench.memory            what each rank holds under FSDP2
python -m tools.bench.adapter_memory    what adapters keep until the backward pass
python -m tools.bench.plan              rotopo plan's figures beside measured ones
"""
