"""Is A better than B? Outcomes of several policies at equal distances from their reference.

In the order of a comparison: ``settings`` (what its file says), ``runs`` (the trainings), each of
them with ``measuring`` (points on the way, by ``sequence_kl``), ``curves`` (points read again),
``frontiers`` (a run's outcomes by how far it has moved), ``differences`` (whether two arms can be
told apart), ``results`` (all of them), ``plots`` and ``page``; ``command`` does one after another.
"""
