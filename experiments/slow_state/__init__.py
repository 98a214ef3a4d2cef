"""What `long_run.py` is made of: cases, optimizers side by side, goals and the report."""
