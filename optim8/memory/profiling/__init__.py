"""Profiling: the bytes that a training takes, measured while it runs."""
