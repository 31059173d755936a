"""Entropic transport on a line for p = 2: few points stand for all, and few costs matter."""
