"""The memory that a training takes: planned before it starts, and profiled while it runs."""

from optim8.memory.planning.planner import plan
from optim8.memory.planning.plans import Plan
from optim8.memory.profiling.profiler import profile
from optim8.memory.profiling.profiles import Profile, Record

__all__ = ["Plan", "Profile", "Record", "plan", "profile"]
