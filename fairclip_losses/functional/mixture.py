"""Faulty pairs by a two-component Gaussian mixture of the histories."""

from __future__ import annotations

import torch
from torch import Tensor

from ..validation import check_integer, check_share
from .mining import FAULTY, bad_pair_kinds, has_spread, history_statistics, seen_mask

__all__ = ["gaussian_mixture_posterior", "mixture_pair_kinds"]

# Shares of the values below the cuts to start from: an upper component of 50 % down to 3 %.
_START_SHARES = (0.5, 0.75, 0.9, 0.97)


def mixture_pair_kinds(
    history: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    noisy_sigma: float = 3.0,
    mixture_threshold: float = 0.5,
    seen: Tensor | None = None,
) -> Tensor:
    r"""Kind of each pair: faulty by a two-component Gaussian mixture, noisy by its threshold.

    faulty: the posterior of the mixture's higher-mean component, by
    :func:`gaussian_mixture_posterior` of the histories seen, is `mixture_threshold` or more, and
    :math:`m_k > \mu` (a wide upper component also claims the lowest histories, which are not the
    badly learnt ones). noisy and clean: as :func:`bad_pair_kinds`. A mixture always divides: it
    flags the upper part of the histories even where they have one mode.

    Args:
        history: :math:`m_k`, shape (N,).
        mean: :math:`\mu`, a scalar.
        std: :math:`\sigma`, a scalar.
        noisy_sigma: :math:`\beta_n`, 0 or more.
        mixture_threshold: least posterior of a faulty pair, in (0, 1].
        seen: (N,) bool, as for :func:`bad_pair_kinds`.

    Returns:
        (N,) int8 of the codes `CLEAN`, `NOISY`, `FAULTY`.

    Raises:
        ValueError: as :func:`bad_pair_kinds`, and for a mixture_threshold outside (0, 1].

    Source: Huang et al., NeurIPS 2021, Learning with Noisy Correspondence: division of the pairs.
    """
    check_share("mixture_threshold", mixture_threshold)
    kinds = bad_pair_kinds(history, mean, std, noisy_sigma, torch.inf, seen)
    used = seen_mask(history, seen)
    values = history[used]
    upper = gaussian_mixture_posterior(values) >= mixture_threshold
    kinds[used] = kinds[used].masked_fill(upper & (values > mean), FAULTY)
    return kinds


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

    Args:
        values: (N,) floating point, all finite.
        variance_floor: fraction of the values' variance that is added to each component's, so that
            none can shrink onto one point.
        max_iterations: most iterations of expectation-maximisation.
        tolerance: it stops when the mean log-likelihood gains less than this.
        max_points: most values to fit (five parameters need no more).

    Returns:
        (N,) float64 in [0, 1]; all 0 where there are fewer than two values or they do not differ.

    Raises:
        ValueError: for values that are not one-dimensional or not finite, a variance_floor of 0 or
            less, max_iterations below 1 or max_points below 2.

    Source: Huang et al., NeurIPS 2021, Learning with Noisy Correspondence: division of the pairs.
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
