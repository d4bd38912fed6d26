"""Preference objectives, swapped by class path."""

from rotopo.objectives.length import LDDPO, LengthRegularizedDPO, SamPO
from rotopo.objectives.mixture import Mixture
from rotopo.objectives.noise import ROPO, DrDPO, HolderDPO, RobustDPO
from rotopo.objectives.pairwise import AOT, DPO, DPOP, EXO, IPO, DiscoPOP, SLiC
from rotopo.objectives.pointwise import APO, BCO, KTO, NCA, SFT, SPPO
from rotopo.objectives.reference_free import CPO, ORPO, TPO, AlphaPO, SimPO
from rotopo.objectives.typo import TYPO

__all__ = [
    "AOT",
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "DPOP",
    "EXO",
    "IPO",
    "KTO",
    "LDDPO",
    "NCA",
    "ORPO",
    "ROPO",
    "SFT",
    "SPPO",
    "TPO",
    "TYPO",
    "AlphaPO",
    "DiscoPOP",
    "DrDPO",
    "HolderDPO",
    "LengthRegularizedDPO",
    "Mixture",
    "RobustDPO",
    "SLiC",
    "SamPO",
    "SimPO",
]
