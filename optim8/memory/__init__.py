"""Memory of a training: planned before it, and profiled in it."""

from optim8.memory.planner import plan
from optim8.memory.plans import Plan
from optim8.memory.profiler import profile
from optim8.memory.profiles import Profile, Record

__all__ = ["Plan", "Profile", "Record", "plan", "profile"]
