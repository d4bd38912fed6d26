"""Preference objectives, swapped by class path."""

from rotopo.objectives.pairwise import DPO

__all__ = ["DPO"]
