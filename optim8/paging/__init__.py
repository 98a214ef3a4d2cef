"""Optimizer state that lives where you say, under a budget that you state. docs/paging.md shows how to use it."""

from optim8.paging.pager import Pager, as_bytes
from optim8.paging.placement import Place, Placement
from optim8.paging.tiers import Plan, plan

__all__ = ["Pager", "Place", "Placement", "Plan", "as_bytes", "plan"]
