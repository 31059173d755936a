"""Faulty pairs by a two-component Gaussian mixture of the histories."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_integer
from .mining import has_spread, history_statistics

_UNIFORM_BIMODALITY = 5 / 9

# Shares of the values below the cuts to start from: an upper component of 50 % down to 3 %.
_START_SHARES = (0.5, 0.75, 0.9, 0.97)


def faulty_posterior(history: Tensor) -> Tensor:
    """Posterior of being faulty of each pair, (N,) float64 in [0, 1]; 0 where the history is NaN.

    It is :func:`gaussian_mixture_posterior` of the finite histories (N,), made to rise with the
    history: of two components the wider claims both ends, and the lower end is what was learnt. A
    mixture always divides; so where the histories have one mode, by :func:`bimodality` of at most
    5/9, no pair is faulty and all are 0: before bad pairs stand out, and where there are none.

    Source: Huang et al., NeurIPS 2021, Learning with Noisy Correspondence: division of the pairs.
    """
    used = torch.isfinite(history)
    posterior = torch.zeros_like(history, dtype=torch.float64)
    values, order = history[used].sort()
    if float(bimodality(values)) > _UNIFORM_BIMODALITY:
        of_values = gaussian_mixture_posterior(values)
        # From its least value in the lower half on the posterior may only rise.
        lowest = of_values[: len(values) // 2 + 1].argmin()
        of_values[:lowest] = of_values[lowest]
        posterior[used] = torch.empty_like(of_values).index_copy_(0, order, of_values.cummax(0)[0])
    return posterior


def bimodality(values: Tensor) -> Tensor:
    r"""Sarle's bimodality coefficient of values (N,), a float64 scalar in (0, 1]; 0 of no spread.

    .. math:: b = \frac{\gamma^2 + 1}{\kappa}

    with the skewness :math:`\gamma` and the kurtosis :math:`\kappa` (3 of a Gaussian). It is 1/3 of
    a Gaussian, 5/9 of a uniform distribution and 1 of two points: above 5/9 values are taken for
    bimodal. NaN is left out.

    Source: Pfister et al. 2013, Good things peak in pairs: a note on the bimodality coefficient.
    """
    values = values[torch.isfinite(values)].double()
    mean, std = history_statistics(values)
    if not bool(has_spread(mean, std)):
        return values.new_zeros(())
    z = (values - mean) / std
    return ((z**3).mean().square() + 1) / (z**4).mean()


def gaussian_mixture_posterior(
    values: Tensor,
    *,
    variance_floor: float = 1e-3,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    max_points: int = 1 << 17,
) -> Tensor:
    r"""Posterior of the higher-mean component of a two-component Gaussian mixture on the line.

    .. math:: p_k = \frac{\pi_1 \mathcal N(m_k; \mu_1, s_1^2)}
                         {\sum_{j \in \{0, 1\}} \pi_j \mathcal N(m_k; \mu_j, s_j^2)},
              \qquad \mu_0 \le \mu_1

    The parameters are the maximum of the likelihood found by expectation-maximisation on the
    standardised values in float64, the best of four starts: the sorted values cut in two at four
    quantiles. Of more than `max_points` values, that many spaced order statistics are fitted.

    Of values (N,), all finite, it returns (N,) float64 in [0, 1]; all 0 where there are fewer than
    two values or they do not differ. ``variance_floor`` is the share of the values' variance added
    to each component's, so that none can shrink onto one point; the fit stops when the mean
    log-likelihood gains less than ``tolerance``.

    Raises:
        ValueError: values not (N,) or not finite, or an option out of range.

    Source: as of :func:`faulty_posterior`.
    """
    if values.ndim != 1:
        raise ValueError(f"values must have shape (N,), got {tuple(values.shape)}")
    if not variance_floor > 0:
        raise ValueError(f"variance_floor must be above 0, got {variance_floor!r}")
    check_integer("max_iterations", max_iterations, 1)
    check_integer("max_points", max_points, 2)
    values = values.detach().double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("values must be finite, got NaN or infinity")
    mean, std = history_statistics(values)
    if not bool(has_spread(mean, std)):
        return torch.zeros_like(values)
    values = (values - mean) / std
    points = values.sort().values
    if len(points) > max_points:
        rank = torch.linspace(0, len(points) - 1, max_points, dtype=torch.float64)
        points = points[rank.round().long().to(points.device)]
    share, centre, variance = _fit(points, variance_floor, max_iterations, tolerance)
    posterior = torch.softmax(_log_joint(values, share, centre, variance), dim=0)
    return posterior[1] if centre[1] >= centre[0] else posterior[0]


def _fit(
    points: Tensor, variance_floor: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return share, centre and variance, (2,) each, of the likeliest mixture of sorted points."""
    cuts = (points.new_tensor(_START_SHARES) * len(points)).round()
    rank = torch.arange(len(points), device=points.device)
    upper = (rank >= cuts[:, None]).double()  # (starts, points): posterior of component 1
    previous = torch.full_like(cuts, -torch.inf)
    for _ in range(max_iterations):
        part = torch.stack([1.0 - upper, upper])
        # A component without a point (the cut at 97 % of a few) would divide by 0.
        mass = part.sum(dim=-1) + 10 * torch.finfo(points.dtype).eps
        centre = (part @ points) / mass
        squares = (points - centre[..., None]).square()
        variance = (part * squares).sum(dim=-1) / mass + variance_floor
        share = mass / mass.sum(dim=0)
        joint = _log_joint(points, share, centre, variance)
        total = torch.logsumexp(joint, dim=0)
        upper = torch.exp(joint[1] - total)
        likelihood = total.mean(dim=-1)
        if bool((likelihood - previous < tolerance).all()):
            break
        previous = likelihood
    best = int(likelihood.argmax())
    return share[:, best], centre[:, best], variance[:, best]


def _log_joint(points: Tensor, share: Tensor, centre: Tensor, variance: Tensor) -> Tensor:
    """Log of share times density of each component at each point."""
    squares = (points - centre[..., None]).square() / variance[..., None]
    constant = share.log() - 0.5 * (2.0 * torch.pi * variance).log()
    return constant[..., None] - 0.5 * squares
