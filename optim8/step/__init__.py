"""A step of any subset of parameters: options, overrides, gathering, running."""
