"""Checkpoints for other libraries. Theirs are read by every optimizer's `load_state_dict`."""

from optim8.optim.report import Report, Row, report

__all__ = ["Report", "Row", "report"]
