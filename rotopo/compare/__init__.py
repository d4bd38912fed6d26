"""Is A better than B? Outcomes of several policies at equal distances from their reference.

In the order of a comparison: ``frontiers`` (a run's outcomes by how far it has moved),
``differences`` (whether two arms can be told apart).
"""
