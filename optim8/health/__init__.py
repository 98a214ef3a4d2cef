"""Health of the quantized state: how much of each moment the codes keep, watched while training."""

from optim8.health.measures import MomentHealth, ParameterHealth
from optim8.health.monitor import Monitor, monitor

__all__ = ["MomentHealth", "Monitor", "ParameterHealth", "monitor"]
