"""Health of the quantized state: how much of each moment the codes keep, watched while training."""

from optim8.health.measures import Advice, MomentHealth, ParameterHealth
from optim8.health.monitor import Monitor, monitor

__all__ = ["Advice", "MomentHealth", "Monitor", "ParameterHealth", "monitor"]
