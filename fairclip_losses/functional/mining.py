"""Dynamic bad pair mining as pure functions: histories, thresholds, weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..validation import check_choice, is_number

__all__ = [
    "CLEAN",
    "FAULTY",
    "KIND_NAMES",
    "NOISY",
    "bad_pair_kinds",
    "bad_pair_weights",
    "gaussian_mixture_posterior",
    "history_statistics",
    "history_z_score",
    "mixture_pair_kinds",
    "pair_history",
    "visit_weight",
]

CLEAN, NOISY, FAULTY = 0, 1, 2
"""Codes of a pair's kind, as :func:`bad_pair_kinds` returns them."""

KIND_NAMES: tuple[str, str, str] = ("clean", "noisy", "faulty")
"""Name of each kind; the code is the position."""

History = Literal["mean", "linear"]
Weighting = Literal["relative", "density"]

MIXTURE_POINTS = 1 << 17
"""Most values that a Gaussian mixture is fitted on."""

# A spread below this fraction of the mean is rounding of the float32 loss sums, not a spread.
_ROUNDING = 2.0**-20


def visit_weight(epoch: int | Tensor, history: History = "mean") -> float | Tensor:
    r"""Weight of a visit in its pair's history.

    ``mean``: :math:`1`. ``linear``: :math:`1 + e`, with `e` the number of epochs that were over at
    the visit.

    Args:
        epoch: `e`, an int or a tensor of integers.
        history: ``"mean"`` or ``"linear"``.

    Returns:
        1.0 for ``mean``; for ``linear`` ``1 + epoch``, a tensor where the epoch is one.

    Raises:
        ValueError: for an unknown history.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), the weighted loss history.
    """
    check_choice("history", history, ("mean", "linear"))
    if history == "mean":
        return 1.0
    return epoch + 1 if isinstance(epoch, Tensor) else float(epoch + 1)


def pair_history(
    loss_sum: Tensor,
    visits: Tensor,
    weight_sum: Tensor | None = None,
    *,
    total_epochs: int | None = None,
) -> Tensor:
    r"""History of each pair: the weighted mean of its losses over its visits.

    .. math:: m_k = \frac{\sum_v u_v \, l_{k,v}}{\sum_v u_v}

    with :math:`u_v` from :func:`visit_weight`. With `total_epochs` = `E` it is instead what the
    published code computes, :math:`m_k = \frac{1}{V_k} \sum_v \frac{u_v}{E} l_{k,v}`,
    which is not normalised: after `e` epochs at one loss `l` it is :math:`l (e + 1) / 2E`.

    Args:
        loss_sum: :math:`\sum_v u_v l_{k,v}`, shape (N,).
        visits: number of visits :math:`V_k`, shape (N,).
        weight_sum: :math:`\sum_v u_v`, shape (N,); None where every weight is 1 (then it is
            `visits`).
        total_epochs: `E` for the form without normalisation, None for the weighted mean.

    Returns:
        (N,) float64; NaN for a pair without a visit.

    Raises:
        ValueError: for shapes that differ, or total_epochs below 1.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), the weighted loss history.
    """
    _check_same_shape("loss_sum", loss_sum, "visits", visits)
    if weight_sum is not None:
        _check_same_shape("loss_sum", loss_sum, "weight_sum", weight_sum)
    if total_epochs is None:
        divisor = (visits if weight_sum is None else weight_sum).double()
    elif total_epochs < 1:
        raise ValueError(f"total_epochs must be 1 or more, got {total_epochs!r}")
    else:
        divisor = visits.double() * total_epochs
    history = loss_sum.double() / divisor
    return torch.where(visits > 0, history, torch.full_like(history, torch.nan))


def history_statistics(
    history: Tensor,
    seen: Tensor | None = None,
    *,
    total: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Mean and population standard deviation of the histories of the pairs seen.

    .. math:: \mu = \frac{1}{|S|} \sum_{k \in S} m_k, \qquad
              \sigma^2 = \frac{1}{|S|} \sum_{k \in S} (m_k - \mu)^2

    Args:
        history: (N,) floating point.
        seen: (N,) bool, the pairs of `S`; None = those of finite history. A pair whose history is
            not finite is never counted.
        total: sums a tensor over processes, of which each passes a part of the pairs; None where
            all are here.

    Returns:
        :math:`(\mu, \sigma)`, two float64 scalars; both 0 where no pair was seen.

    Raises:
        ValueError: for shapes that differ.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), mean and deviation of the histories.
    """
    values = history[_seen_mask(history, seen)].double()
    if total is not None:
        count, summed = total(torch.stack([torch.ones_like(values).sum(), values.sum()]))
        mean = summed / count.clamp(min=1)
        return mean, (total((values - mean).square().sum()) / count.clamp(min=1)).sqrt()
    if values.numel() == 0:
        zero = torch.zeros((), dtype=torch.float64, device=history.device)
        return zero, zero.clone()
    return values.mean(), values.std(correction=0)


def bad_pair_kinds(
    history: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    noisy_sigma: float = 3.0,
    faulty_sigma: float = 3.0,
    seen: Tensor | None = None,
) -> Tensor:
    r"""Kind of each pair by two thresholds on its history.

    noisy (learnt too easily): :math:`m_k \le \mu - \beta_n \sigma`;
    faulty (never learnt): :math:`m_k \ge \mu + \beta_f \sigma`; clean otherwise.
    A threshold of infinity is never met. Where both are met (both betas 0) the pair is faulty.
    No pair is flagged where :math:`\sigma` is 0 or of rounding size beside :math:`|\mu|` (2^-20).

    Args:
        history: :math:`m_k`, shape (N,).
        mean: :math:`\mu`, a scalar.
        std: :math:`\sigma`, a scalar.
        noisy_sigma: :math:`\beta_n`, 0 or more.
        faulty_sigma: :math:`\beta_f`, 0 or more.
        seen: (N,) bool; the others are clean. None = those of finite history; a pair whose history
            is not finite is always clean.

    Returns:
        (N,) int8 of the codes `CLEAN`, `NOISY`, `FAULTY`.

    Raises:
        ValueError: for a negative or NaN beta, or shapes that differ.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), the conditions on noisy and faulty pairs.
    """
    check_sigma("noisy_sigma", noisy_sigma)
    check_sigma("faulty_sigma", faulty_sigma)
    candidate = _seen_mask(history, seen) & _has_spread(mean, std)
    kinds = torch.full_like(history, CLEAN, dtype=torch.int8)
    kinds = kinds.masked_fill(candidate & (history <= mean - noisy_sigma * std), NOISY)
    return kinds.masked_fill(candidate & (history >= mean + faulty_sigma * std), FAULTY)


def mixture_pair_kinds(
    history: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    noisy_sigma: float = 3.0,
    mixture_threshold: float = 0.5,
    seen: Tensor | None = None,
    *,
    sample: Tensor | None = None,
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
        seen: (N,) bool; as for :func:`bad_pair_kinds`.
        sample: (M,) histories to fit the mixture to, where these are a part of them; None = those
            seen.

    Returns:
        (N,) int8 of the codes `CLEAN`, `NOISY`, `FAULTY`.

    Raises:
        ValueError: for a negative or NaN beta, a mixture_threshold outside (0, 1], or shapes that
            differ.

    Source: Huang et al., NeurIPS 2021, Learning with Noisy Correspondence: division of the pairs.
    """
    check_mixture_threshold(mixture_threshold)
    kinds = bad_pair_kinds(history, mean, std, noisy_sigma, torch.inf, seen)
    used = _seen_mask(history, seen)
    values = history[used]
    upper = gaussian_mixture_posterior(values, sample=sample) >= mixture_threshold
    kinds[used] = kinds[used].masked_fill(upper & (values > mean), FAULTY)
    return kinds


def history_z_score(history: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    r"""Standardised history :math:`z_k = (m_k - \mu) / \sigma`.

    Args:
        history: :math:`m_k`, shape (N,).
        mean: :math:`\mu`, a scalar.
        std: :math:`\sigma`, a scalar.

    Returns:
        (N,) in the history's dtype; 0 where :math:`\sigma` is 0 or of rounding size beside
        :math:`|\mu|` (2^-20), since the histories then do not differ.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), in the weight of a bad pair.
    """
    z = (history - mean) / std
    distinct = torch.ones_like(z, dtype=torch.bool) & _has_spread(mean, std)
    return torch.where(distinct, z, torch.zeros_like(z))


def bad_pair_weights(
    losses: Tensor,
    kinds: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    weighting: Weighting = "relative",
) -> Tensor:
    r"""Weight of each pair in the batch: a Gaussian at its current loss where flagged, else 1.

    ``density``: :math:`w = \mathcal N(l; \mu, \sigma^2)`, the published form; its peak
    :math:`1 / (\sigma \sqrt{2 \pi})` exceeds 1 where :math:`\sigma < 0.399`, so it can weigh a bad
    pair up. ``relative``: the density over its peak, :math:`w = \exp(-z^2 / 2)`,
    :math:`z = (l - \mu) / \sigma`, always in (0, 1].

    A weight that would underflow is the smallest normal number of the dtype instead, so that no
    weight is 0. A loss that is not finite weighs 1, and every pair does where :math:`\sigma` is 0.

    Args:
        losses: current losses `l`, shape (B,), floating point.
        kinds: (B,) codes, as of :func:`bad_pair_kinds`.
        mean: :math:`\mu`, a scalar.
        std: :math:`\sigma`, a scalar.
        weighting: ``"relative"`` or ``"density"``.

    Returns:
        (B,) detached, in the losses' dtype; float32 for half precision.

    Raises:
        ValueError: for an unknown weighting, or shapes that differ.

    Source: Lan et al., ICLR 2024 (arXiv:2302.03357), the weight of a bad pair.
    """
    check_choice("weighting", weighting, ("relative", "density"))
    _check_same_shape("losses", losses, "kinds", kinds)
    losses = losses.detach()
    dtype = torch.promote_types(losses.dtype, torch.float32)
    losses = losses.to(dtype)
    weights = torch.exp(-0.5 * ((losses - mean) / std).square())
    if weighting == "density":
        weights = weights / (std * (2.0 * torch.pi) ** 0.5)
    weights = weights.clamp(min=torch.finfo(dtype).tiny)
    flagged = (kinds != CLEAN) & torch.isfinite(losses) & (std > 0)
    return torch.where(flagged, weights, torch.ones_like(weights))


def gaussian_mixture_posterior(
    values: Tensor,
    *,
    variance_floor: float = 1e-3,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    max_points: int = MIXTURE_POINTS,
    sample: Tensor | None = None,
) -> Tensor:
    r"""Posterior of the higher-mean component of a two-component Gaussian mixture on the line.

    .. math:: p_k = \frac{\pi_1 \mathcal N(m_k; \mu_1, s_1^2)}
                         {\sum_{j \in \{0, 1\}} \pi_j \mathcal N(m_k; \mu_j, s_j^2)},
              \qquad \mu_0 \le \mu_1

    The parameters are the maximum of the likelihood found by expectation-maximisation on the
    standardised values in float64. It is deterministic: it starts from the sorted values cut in two
    at four quantiles, and keeps the best of the four solutions. More than `max_points` values are
    fitted on that many of their evenly spaced order statistics; the posterior is computed for all.

    Args:
        values: (N,) floating point, all finite.
        variance_floor: fraction of the values' variance that is added to each component's variance,
            so that a component cannot shrink onto one point.
        max_iterations: most iterations of expectation-maximisation.
        tolerance: it stops when the mean log-likelihood gains less than this.
        max_points: most values to fit on.
        sample: (M,) finite values to fit on; None = `values`.

    Returns:
        (N,) float64 in [0, 1]; all 0 where there are fewer than two values to fit on or they do not
        differ.

    Raises:
        ValueError: for values that are not one-dimensional or not finite, a variance_floor of 0 or
            less, max_iterations below 1 or max_points below 2.

    Source: Huang et al., NeurIPS 2021, Learning with Noisy Correspondence: division of the pairs.
    """
    if values.ndim != 1:
        raise ValueError(f"values must have shape (N,), got {tuple(values.shape)}")
    if not variance_floor > 0:
        raise ValueError(f"variance_floor must be above 0, got {variance_floor!r}")
    if max_iterations < 1 or max_points < 2:
        raise ValueError(
            "max_iterations must be 1 or more and max_points 2 or more, "
            f"got {max_iterations!r} and {max_points!r}"
        )
    values = values.detach().double()
    sample = values if sample is None else sample.detach().double()
    if not bool(torch.isfinite(values).all() & torch.isfinite(sample).all()):
        raise ValueError("values must be finite, got NaN or infinity")
    mean, std = history_statistics(sample)
    if not bool(_has_spread(mean, std)):
        return torch.zeros_like(values)
    values = (values - mean) / std

    points = order_statistics((sample - mean) / std, max_points)
    cuts = torch.tensor([0.5, 0.75, 0.9, 0.97], dtype=values.dtype, device=values.device)
    cuts = (cuts * points.numel()).round()
    rank = torch.arange(points.numel(), device=values.device)
    upper = (rank >= cuts[:, None]).double()  # (starts, points): posterior of component 1
    previous = torch.full_like(cuts, -torch.inf)
    for _ in range(max_iterations):
        share, centre, variance = _mixture_parameters(points, upper, variance_floor)
        joint = _mixture_log_joint(points, share, centre, variance)
        total = torch.logsumexp(joint, dim=0)
        upper = torch.exp(joint[1] - total)
        likelihood = total.mean(dim=-1)
        if bool((likelihood - previous < tolerance).all()):
            break
        previous = likelihood
    best = int(likelihood.argmax())
    joint = _mixture_log_joint(
        values, share[:, best, None], centre[:, best, None], variance[:, best, None]
    )
    posterior = torch.softmax(joint, dim=0)[:, 0]
    return posterior[1] if centre[1, best] >= centre[0, best] else posterior[0]


def order_statistics(values: Tensor, most: int) -> Tensor:
    """Return the values sorted, or where there are more than ``most``, that many evenly spaced."""
    values = values.sort().values
    if values.numel() <= most:
        return values
    rank = torch.linspace(0, values.numel() - 1, most, dtype=torch.float64)
    return values[rank.round().long().to(values.device)]


def _mixture_parameters(
    points: Tensor, upper: Tensor, variance_floor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, centres and variances (2, starts); `upper` is component 1's posterior."""
    part = torch.stack([1.0 - upper, upper])
    # The tiny mass keeps a component without a point (the cut at 97 % of a few) from dividing by 0.
    mass = part.sum(dim=-1) + 10 * torch.finfo(points.dtype).eps
    centre = (part @ points) / mass
    variance = (part * (points - centre[..., None]).square()).sum(dim=-1) / mass + variance_floor
    return mass / mass.sum(dim=0), centre, variance


def _mixture_log_joint(points: Tensor, share: Tensor, centre: Tensor, variance: Tensor) -> Tensor:
    """Log of share times density, (2, starts, points)."""
    squares = (points - centre[..., None]).square() / variance[..., None]
    constant = share.log() - 0.5 * (2.0 * torch.pi * variance).log()
    return constant[..., None] - 0.5 * squares


def _has_spread(mean: Tensor | float, std: Tensor | float) -> Tensor | bool:
    size = mean.abs() if isinstance(mean, Tensor) else abs(mean)
    return std > _ROUNDING * size


def _seen_mask(history: Tensor, seen: Tensor | None) -> Tensor:
    finite = torch.isfinite(history)
    if seen is None:
        return finite
    _check_same_shape("history", history, "seen", seen)
    return finite & seen


def _check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, "
            f"got {tuple(value.shape)} and {tuple(other.shape)}"
        )


def check_sigma(name: str, value: float) -> None:
    """Refuse a number of standard deviations that is no number, negative or NaN."""
    if not is_number(value) or not value >= 0:
        raise ValueError(f"{name} must be a number of 0 or more (infinity = never), got {value!r}")


def check_mixture_threshold(value: float) -> None:
    """Refuse a posterior that is no number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"mixture_threshold must be a number in (0, 1], got {value!r}")
