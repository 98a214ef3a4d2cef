"""The parts of `rare_updates.py`: what is trained, with which optimizers, and the report."""
