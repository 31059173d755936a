"""Dynamic bad pair mining as pure functions: histories, thresholds, weights.

The symbols and the options are those of `BadPairMiner`. Source of all: Lan et al., ICLR 2024
(arXiv:2302.03357).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..validation import check_choice, check_integer, check_same_shape, check_sigma

CLEAN, NOISY, FAULTY = 0, 1, 2
"""Codes of a pair's kind, as :func:`bad_pair_kinds` returns them."""

KIND_NAMES: tuple[str, str, str] = ("clean", "noisy", "faulty")
"""Name of each kind; the code is the position."""

History = Literal["mean", "linear"]
Weighting = Literal["relative", "density"]  # of flagged pairs at their current loss

# A spread below this fraction of the mean is rounding of the float32 loss sums, not a spread.
_MIN_SPREAD = 2.0**-20


def visit_weight(epoch: int | Tensor, history: History = "mean") -> float | Tensor:
    """Weight of a visit in its pair's history: 1.0 for ``"mean"``, ``1 + epoch`` for ``"linear"``.

    ``epoch``, an int or an integer tensor, is the number of epochs that were over at the visit; of
    a tensor the linear weight is one too.

    Raises:
        ValueError: for an unknown history.
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
    r"""History of each pair, (N,) float64: the weighted mean of its losses over its visits.

    .. math:: m_k = \frac{\sum_v u_v \, l_{k,v}}{\sum_v u_v}

    with :math:`u_v` from :func:`visit_weight`. With `total_epochs` = `E` it is instead what the
    published code computes, :math:`m_k = \frac{1}{V_k} \sum_v \frac{u_v}{E} l_{k,v}`,
    which is not normalised: after `e` epochs at one loss `l` it is :math:`l (e + 1) / 2E`.

    All three are (N,): ``loss_sum`` is :math:`\sum_v u_v l_{k,v}`; ``visits`` the numbers of visits
    :math:`V_k`, a pair without one having the history NaN; ``weight_sum`` is :math:`\sum_v u_v`,
    None where every weight is 1.

    Raises:
        ValueError: for shapes that differ, or total_epochs below 1.
    """
    check_same_shape("loss_sum", loss_sum, "visits", visits)
    if weight_sum is not None:
        check_same_shape("loss_sum", loss_sum, "weight_sum", weight_sum)
    if total_epochs is None:
        divisor = (visits if weight_sum is None else weight_sum).double()
    else:
        divisor = visits.double() * check_integer("total_epochs", total_epochs, 1)
    return torch.where(visits > 0, loss_sum.double() / divisor, torch.nan)


def history_statistics(history: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Mean and population standard deviation of the histories of the pairs seen.

    .. math:: \mu = \frac{1}{|S|} \sum_{k \in S} m_k, \qquad
              \sigma^2 = \frac{1}{|S|} \sum_{k \in S} (m_k - \mu)^2

    `S` are the pairs of finite history (N,), of those ``seen``, (N,) bool, where it is given. Both
    are float64 scalars, 0 where no pair was seen.

    Raises:
        ValueError: for shapes that differ.
    """
    values = history[seen_mask(history, seen)].double()
    if not len(values):
        values = values.new_zeros(1)
    return values.mean(), values.std(correction=0)


def bad_pair_kinds(
    history: Tensor,
    mean: Tensor | float,
    std: Tensor | float,
    noisy_sigma: float = 3.0,
    faulty_sigma: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    r"""Kind of each pair by two thresholds on its history, (N,) int8: CLEAN, NOISY or FAULTY.

    noisy (learnt too easily): :math:`m_k \le \mu - \beta_n \sigma`;
    faulty (never learnt): :math:`m_k \ge \mu + \beta_f \sigma`; clean otherwise.
    A threshold of infinity is never met. Where both are met (both betas 0) the pair is faulty.
    No pair is flagged where :math:`\sigma` is 0 or of rounding size beside :math:`|\mu|` (2^-20),
    nor a pair of a history that is not finite or, where ``seen`` (N,) bool is given, not seen.

    Raises:
        ValueError: for a negative or NaN beta, or shapes that differ.
    """
    check_sigma("noisy_sigma", noisy_sigma)
    check_sigma("faulty_sigma", faulty_sigma)
    candidate = seen_mask(history, seen) & has_spread(mean, std)
    kinds = torch.full_like(history, CLEAN, dtype=torch.int8)
    kinds = kinds.masked_fill(candidate & (history <= mean - noisy_sigma * std), NOISY)
    return kinds.masked_fill(candidate & (history >= mean + faulty_sigma * std), FAULTY)


def history_z_score(history: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    r"""Standardised history :math:`z_k = (m_k - \mu) / \sigma`, (N,) in the history's dtype.

    It is 0 where :math:`\sigma` is 0 or of rounding size beside :math:`|\mu|` (2^-20), since the
    histories then do not differ.
    """
    spread = torch.as_tensor(has_spread(mean, std), device=history.device)
    return torch.where(spread, (history - mean) / std, 0.0)


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

    Current losses `l` (B,), floating point, and kinds (B,) give weights (B,), detached, in the
    losses' dtype (float32 for half precision). A weight that would underflow is the smallest normal
    number of the dtype instead, so that no weight is 0. A loss that is not finite weighs 1, and
    every pair does where :math:`\sigma` is 0.

    Raises:
        ValueError: for an unknown weighting, or shapes that differ.
    """
    check_choice("weighting", weighting, ("relative", "density"))
    check_same_shape("losses", losses, "kinds", kinds)
    losses = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
    flagged = (kinds != CLEAN) & torch.isfinite(losses) & (std > 0)
    return flagged_weights(losses, flagged, mean, std, weighting)


def flagged_weights(
    losses: Tensor, flagged: Tensor, mean: Tensor | float, std: Tensor | float, weighting: Weighting
) -> Tensor:
    """`bad_pair_weights` of what is checked: a Gaussian where `flagged`, else 1."""
    weights = torch.exp(-0.5 * ((losses - mean) / std).square())
    if weighting == "density":
        weights = weights / (std * (2.0 * torch.pi) ** 0.5)
    return torch.where(flagged, weights.clamp(min=torch.finfo(losses.dtype).tiny), 1.0)


def has_spread(mean: Tensor | float, std: Tensor | float) -> Tensor | bool:
    """Whether a deviation is more than rounding beside the mean."""
    size = mean.abs() if isinstance(mean, Tensor) else abs(mean)
    return std > _MIN_SPREAD * size


def seen_mask(history: Tensor, seen: Tensor | None) -> Tensor:
    """Pairs of finite history, of those `seen`."""
    if seen is None:
        return torch.isfinite(history)
    check_same_shape("history", history, "seen", seen)
    return torch.isfinite(history) & seen
