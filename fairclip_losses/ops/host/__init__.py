"""The solvers for problems on a line whose tensors lie on the CPU, in NumPy and SciPy."""

from .entropic import marginal_error_on_host, solve_on_host, suits_host_solver

__all__ = ["marginal_error_on_host", "solve_on_host", "suits_host_solver"]
