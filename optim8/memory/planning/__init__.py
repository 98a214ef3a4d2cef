"""Planning: the bytes that a training will take, by kind and tier."""
