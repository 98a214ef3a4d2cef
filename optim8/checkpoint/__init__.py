"""State dicts, pickles and copies of optimizers, and the formats of other libraries."""
