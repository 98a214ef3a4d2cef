"""Memory of a training: planned before it, and profiled in it."""

from optim8.memory.planner import plan
from optim8.memory.plans import Plan

__all__ = ["Plan", "plan"]
