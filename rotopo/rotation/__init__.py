"""RoPO's weight rotation as a PEFT tuner; importing this registers the type ROTATION with PEFT."""

from rotopo.rotation.config import RotationConfig
from rotopo.rotation.layer import RotationLinear
from rotopo.rotation.tuner import RotationModel

__all__ = ["RotationConfig", "RotationLinear", "RotationModel"]
