"""The parameters of a model, read from its config, its files or the module itself."""
