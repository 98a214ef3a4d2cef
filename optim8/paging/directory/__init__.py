"""A directory that keeps the state of one optimizer after its process has ended."""
