"""The solvers for problems on a line whose tensors lie on the CPU, in NumPy and SciPy."""

from .entropic import marginal_error_on_host, solve_on_host, suits_host_solver
from .exact.inputs import suits_host, to_tensor
from .exact.solve import solve_exact_on_host

__all__ = [
    "marginal_error_on_host",
    "solve_exact_on_host",
    "solve_on_host",
    "suits_host",
    "suits_host_solver",
    "to_tensor",
]
