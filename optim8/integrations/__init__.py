"""optim8 where a framework chooses the optimizer by a name: shims, and the launcher that installs them.

Each shim is a module of its own with `install()`. It imports no framework: it waits until the program does.
docs/trainers.md shows the line for each framework.
"""
