"""Exact transport on a line: one sort, no iteration."""
