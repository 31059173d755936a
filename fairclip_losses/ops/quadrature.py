"""Fewer points for the same problem: p = 2 on a line, at a blur far above the points' spacing.

What a measure does to an entropic problem is integrate functions that are smooth at the length of
the blur. In each cell of a fraction of the blur, two points with the cell's first four moments (its
Gauss quadrature) integrate them as well, with a relative error near ``(cell / blur)^4 / 1400``. The
problem is solved between those points and its potentials are read at all of the others: the cost
falls from that of N points to that of ``6 * diameter / blur``.

Where mass branches to places far apart the plan varies faster, over ``eps / reach`` with the
distance between those places; such cells are divided once a first plan is known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import broadcast_shapes
from .options import SinkhornOptions

# Cells a blur.
_CELLS = 3.0
# Part of the points above which compressing is not worth it.
_WORTH = 0.75
# Longest cell, in units of eps / reach.
_LONGEST = 0.5


class Measure:
    """Points (*, N, 1) and weights (*, N) of sum one."""

    def __init__(self, points: Tensor, weights: Tensor, cells: Tensor | None = None) -> None:
        self.points, self.weights = points, weights
        self.log_weights = weights.log()
        self.cells = cells  # (cells,): the parts of each cell of a compressed measure


def compress(measure: Measure, blur: float, parts: Tensor | None = None) -> Measure:
    """Return a measure of fewer points with the same moments in every cell, or the same measure.

    ``parts`` says into how many each cell is divided. The diameter is read back from the device.
    """
    points = measure.points[..., 0]
    if points.numel() == 0:
        return measure
    low = points.amin()
    width = blur / _CELLS
    count = float((points.amax() - low) / width) + 1.0
    if 2.0 * (count if parts is None else float(parts.sum())) >= _WORTH * points.shape[-1]:
        return measure
    place = (points - low) / width
    cell = place.long()
    if parts is None:
        parts = torch.ones(int(count) + 1, dtype=torch.long, device=points.device)
    first = parts.cumsum(0) - parts
    part = ((place - cell) * parts[cell]).long().minimum(parts[cell] - 1)
    center = (part + 0.5) / parts[cell] - 0.5  # of the part, from that of the cell
    index, offset = first[cell] + part, place - cell - 0.5 - center
    mass, mean, square, cube = _moments(measure.weights, index, offset, int(parts.sum()))
    variance = (square - mean**2).clamp(min=0.0)
    third = cube - 3.0 * mean * square + 2.0 * mean**3
    spread = variance > 1e-12
    skew = torch.where(spread, third / torch.where(spread, variance, 1.0), 0.0)
    root = (skew**2 + 4.0 * variance).sqrt()
    above, below = 0.5 * (skew + root), 0.5 * (skew - root)  # the two points about the mean
    share = torch.where(spread, -below / torch.where(spread, root, 1.0), 0.5)
    owner = torch.repeat_interleave(parts)
    inside = (torch.arange(owner.numel(), device=points.device) - first[owner] + 0.5) / parts[owner]
    middle = owner + inside + mean
    nodes = torch.cat([middle + below, middle + above], -1) * width + low
    weights = torch.cat([mass * (1.0 - share), mass * share], -1)
    return Measure(nodes[..., None], weights, parts)


def refine(measure: Measure, light: Measure, reach: Tensor, options: SinkhornOptions) -> Measure:
    """Divide the cells of ``light``, whose points' mass reaches so far (*, K), where need be."""
    if light.cells is None:
        return light
    needed = torch.where(light.weights > 0, reach, 0.0).reshape(-1, light.points.shape[-2])
    a_cell = needed.amax(0).reshape(2, -1).amax(0)
    whole = torch.zeros(light.cells.shape, dtype=a_cell.dtype, device=a_cell.device)
    whole.scatter_reduce_(0, torch.repeat_interleave(light.cells), a_cell, "amax")
    length = options.blur / _CELLS * whole / options.epsilon
    parts = (length / _LONGEST).ceil().long().maximum(light.cells)
    if torch.equal(parts, light.cells):
        return light
    return compress(measure, options.blur, parts)


def _moments(weights: Tensor, cell: Tensor, offset: Tensor, cells: int) -> list[Tensor]:
    """Return the mass of each cell and its mean powers of ``offset`` up to the third."""
    lead = broadcast_shapes(weights.shape[:-1], cell.shape[:-1])
    rows = weights.expand(*lead, -1)
    places = cell.expand(*lead, -1)
    mass = rows.new_zeros(*lead, cells).scatter_add_(-1, places, rows)
    divisor = torch.where(mass > 0, mass, 1.0)
    moments = [mass]
    for _ in range(3):
        rows = rows * offset
        moments.append(rows.new_zeros(*lead, cells).scatter_add_(-1, places, rows) / divisor)
    return moments
