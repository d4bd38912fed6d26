"""What a fit takes of a GPU, said before one is booked: ``rotopo plan``.

A plan is the fit's own step: the module that the settings make, its model with adapter and
reference, its objective, loss and optimiser, and torch's own FSDP2. Only, its tensors have sizes
and no values (torch's fake tensors), so that an 8B model takes no memory and needs no weights, no
data and no GPU, and its other ranks do nothing. A ledger follows every storage from its allocation
to its end, and so knows at every moment what is alive and what for.

In the order of the work:

- ``settings.py``: what of the fit's settings a plan follows from: ranks, strategy, micro-batch.
- ``load.py``: the micro-batch.
- ``fakes.py``: the module without values, from the model's configuration alone.
- ``ledger.py``: what is alive.
- ``step.py``: one step on the ledger, and what it says of models with more layers.
- ``memory.py``: :func:`~rotopo.plan.memory.planner`, which Python calls.
- ``search.py``, ``cards.py``: the largest micro-batch that fits a card.
- ``command.py``, ``text.py``: the command line.

A model whose layers are alike is not traced whole: each moment of a step is a straight line in the
number of layers, and models of a few layers say which. Where layers differ (sliding
windows, an adapter on some of them) all are traced.

What is not a processor's on a GPU is set: the size of the head's tiles, and the optimiser's
``foreach``. What no trace can tell is left to one allowance: CUDA's context, nccl's buffers, and
fragmentation; nobody has measured it yet. DDP's buckets are added by arithmetic, since its reducer
works on real tensors only. Attention is a fused kernel wherever the run has one; a GPU's may keep
some scratch memory that a processor's does not.

From Python::

    from rotopo.plan.load import Load
    from rotopo.plan.memory import Strategy, planner

    with planner(module, config, Strategy("ddp", 8), checkpointing=True) as memory:
        memory(Load(pairs=4, prompt=300, response=400)).peak  # bytes

``module`` is any that ``rotopo fit`` would train, not loaded, and ``config`` its model's
configuration; what comes out is to be compared with ``torch.cuda.max_memory_allocated``.
"""
