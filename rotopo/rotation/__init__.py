"""RoPO's weight rotation as a PEFT tuner; importing this registers the type ROTATION with PEFT."""

from rotopo.rotation.tuner import RotationConfig, RotationLayer, RotationModel

__all__ = ["RotationConfig", "RotationLayer", "RotationModel"]
