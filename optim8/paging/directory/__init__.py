"""A directory that keeps the state of one optimizer beyond its process."""
