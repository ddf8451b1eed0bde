"""Bugs that the simulator must find, applied from outside; `registry` holds them by name."""
