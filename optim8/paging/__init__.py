"""Optimizer state that lives where you choose, within a budget that you set. docs/paging.md shows how."""

from optim8.paging.pager import Pager, as_bytes
from optim8.paging.placement import Place, Placement
from optim8.paging.store import Store
from optim8.paging.tiers import Plan, plan

__all__ = ["Pager", "Place", "Placement", "Plan", "Store", "as_bytes", "plan"]
