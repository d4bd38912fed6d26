"""What a run does, logs and writes beside its loss."""

from rotopo.callbacks.compilation import CompileLayers
from rotopo.callbacks.finite import Finite
from rotopo.callbacks.generations import Generations
from rotopo.callbacks.geometry import Geometry
from rotopo.callbacks.orthogonality import Orthogonality
from rotopo.callbacks.pair_metrics import Displacement, ImplicitRewards
from rotopo.callbacks.pair_scores import PairScores
from rotopo.callbacks.perplexity import Perplexity
from rotopo.callbacks.predictions import PredictionWriter
from rotopo.callbacks.progress import ProgressLine
from rotopo.callbacks.reference import CacheReference
from rotopo.callbacks.speed import Speed
from rotopo.callbacks.yardstick import Yardstick

__all__ = [
    "CacheReference",
    "CompileLayers",
    "Displacement",
    "Finite",
    "Generations",
    "Geometry",
    "ImplicitRewards",
    "Orthogonality",
    "PairScores",
    "Perplexity",
    "PredictionWriter",
    "ProgressLine",
    "Speed",
    "Yardstick",
]
