"""Entropic transport on a line for p = 1: the kernel is that of a Markov process."""
