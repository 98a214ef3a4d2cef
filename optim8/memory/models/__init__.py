"""Models: names, shapes and dtypes of parameters, read from a config, from files or from the module itself."""
