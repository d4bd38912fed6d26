"""ROPO as a procedure (arXiv 2404.04102): noisy pairs found, filtered out and sampled anew."""

from rotopo.robust.alternation import Alternation
from rotopo.robust.detection import NoiseDetection
from rotopo.robust.resampling import Resampling

__all__ = ["Alternation", "NoiseDetection", "Resampling"]
