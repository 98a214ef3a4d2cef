"""The bytes that a training will take, by kind and tier."""
