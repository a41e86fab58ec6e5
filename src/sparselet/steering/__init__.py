"""Steering: one vector added to the residual stream of a decoder while it answers."""

from sparselet.steering.switch import Steering, steered
from sparselet.steering.vector import SteeringVector

__all__ = ["Steering", "SteeringVector", "steered"]
