"""The Gaussian mixture of the histories against scikit-learn's, and the miner that uses it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis, norm, skew
from sklearn.mixture import GaussianMixture

from fairclip_losses import BadPairMiner
from fairclip_losses import functional as F


def two_modes(seed, size, share, gap, width):
    generator = np.random.default_rng(seed)
    upper = generator.random(size) < share
    values = np.where(upper, generator.normal(gap, width, size), generator.normal(0, 1, size))
    return 5.0 + 0.3 * values, upper


@pytest.mark.parametrize("size", [60, 3000])
@pytest.mark.parametrize(
    "share,gap,width", [(0.5, 6, 1), (0.3, 5, 0.5), (0.1, 7, 1.5), (0.04, 9, 1)]
)
def test_mixture_equals_scikit_learn(size, share, gap, width):
    values, upper = two_modes(0, size, share, gap, width)
    posterior = F.gaussian_mixture_posterior(torch.from_numpy(values), tolerance=1e-10).numpy()
    z = ((values - values.mean()) / values.std())[:, None]
    model = GaussianMixture(2, reg_covar=1e-3, tol=1e-10, max_iter=2000, n_init=5, random_state=0)
    expected = model.fit(z).predict_proba(z)[:, np.argmax(model.means_)]
    np.testing.assert_allclose(posterior, expected, atol=2e-3)
    assert ((posterior >= 0.5) == upper).mean() > 0.97


@pytest.mark.parametrize("family", ["normal", "exponential", "wide", "crossing"])
@pytest.mark.parametrize("size", [12, 40, 200])
def test_mixture_is_as_likely_as_the_best_of_scikit_learn(family, size):
    for seed in (4, 12, 88, 90):
        generator = np.random.default_rng(seed)
        if family in ("wide", "crossing"):
            values = [generator.normal(0, 0.1, size), generator.normal(-0.2, 3, size // 3)]
            if family == "wide":  # else the component that starts above ends below
                values.append(generator.normal(6, 1, size // 20))
            values = np.concatenate(values)
        else:
            values = getattr(generator, f"standard_{family}")(size)
        z = (values - values.mean()) / values.std()
        upper = F.gaussian_mixture_posterior(
            torch.from_numpy(values), tolerance=1e-7, max_iterations=20_000
        ).numpy()
        part = np.stack([1 - upper, upper])
        mass = part.sum(1)
        centre = part @ z / mass
        assert mass.min() > 0 and centre[1] >= centre[0]
        scale = np.sqrt((part * (z - centre[:, None]) ** 2).sum(1) / mass + 1e-3)
        density = norm.pdf(z, centre[:, None], scale[:, None]) * (mass / len(z))[:, None]
        model = GaussianMixture(2, reg_covar=1e-3, tol=1e-7, max_iter=20_000, random_state=0)
        expected = model.fit(z[:, None]).score(z[:, None])
        assert np.log(density.sum(0)).mean() >= expected - 0.01


def test_mixture_fits_many_values_on_a_part_of_them():
    values, _ = two_modes(1, 20_000, 0.1, 6, 1)
    whole = F.gaussian_mixture_posterior(torch.from_numpy(values))
    part = F.gaussian_mixture_posterior(torch.from_numpy(values), max_points=2000)
    assert part.shape == whole.shape
    torch.testing.assert_close(part, whole, atol=0.02, rtol=0)


@settings(max_examples=100)
@given(
    values=st.lists(
        st.one_of(st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, 1.0])), max_size=25
    ),
    scale=st.sampled_from([1.0, 2.0**-30, 2.0**40]),
)
def test_mixture_posterior_is_a_probability_for_any_values(values, scale):
    values = torch.tensor(values, dtype=torch.float64)
    posterior = F.gaussian_mixture_posterior(values * scale)
    assert posterior.shape == values.shape and posterior.dtype == torch.float64
    assert bool(((posterior >= 0) & (posterior <= 1)).all())
    torch.testing.assert_close(posterior, F.gaussian_mixture_posterior(values), atol=1e-6, rtol=0)
    # The order of the pairs does not matter, nor does a second call differ.
    torch.testing.assert_close(
        F.gaussian_mixture_posterior(values.flip(0) * scale).flip(0), posterior, atol=1e-6, rtol=0
    )
    assert torch.equal(F.gaussian_mixture_posterior(values * scale), posterior)


@pytest.mark.parametrize("num_pairs", [500, None])
def test_mixture_detector(num_pairs):
    values, upper = two_modes(2, 400, 0.1, 8, 1)
    miner = BadPairMiner(num_pairs, detector="mixture", noisy_sigma=1.2)
    miner(torch.from_numpy(values), torch.arange(400))
    summary, report = miner.end_epoch(), miner.report()
    assert ((report.kind == "faulty") == upper).mean() > 0.99
    assert summary.faulty == report.counts()["faulty"] > 0
    history = torch.from_numpy(report.history)
    noisy = F.bad_pair_kinds(history, *F.history_statistics(history), 1.2, math.inf)
    assert ((report.kind == "noisy") == (noisy == F.NOISY).numpy()).all()


def test_a_wide_upper_component_does_not_make_low_histories_faulty():
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(0, 0.1, 300), generator.normal(0.5, 3.0, 60)])
    history = torch.from_numpy(values)
    assert bool((F.gaussian_mixture_posterior(history)[history < -2] > 0.9).any())
    posterior = F.faulty_posterior(history)
    assert float(posterior[history < history.mean()].max()) < 0.5


@given(
    values=st.lists(st.floats(-100, 100), min_size=2, max_size=40),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_bimodality_by_scipys_moments(values, scale):
    values = np.asarray(values) * scale
    assume(values.std() > 1e-3 * scale)
    expected = (skew(values) ** 2 + 1) / kurtosis(values, fisher=False)
    history = torch.from_numpy(np.append(values, np.nan))
    np.testing.assert_allclose(float(F.bimodality(history)), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [1e3, 9.0])  # of a gamma distribution: skewness 0.06 and 0.7
def test_of_one_mode_no_pair_is_faulty(shape):
    values = np.random.default_rng(1).gamma(shape, size=2000)
    history = torch.from_numpy((values - values.mean()) / values.std() + 5.0)
    assert int((F.gaussian_mixture_posterior(history) > 0.5).sum()) > 0  # it always divides
    assert bool((F.faulty_posterior(history) == 0).all())
    two = torch.cat([history, history[:200] + 9.0])
    assert 190 < int((F.faulty_posterior(two) > 0.5).sum()) < 210


@given(values=st.lists(st.floats(-1e3, 1e3), max_size=40), absent=st.integers(0, 3))
@example(values=[0.0, 0.1, 0.2, 5.0, -5.0], absent=1)
def test_the_posterior_rises_with_the_history(values, absent):
    history = torch.tensor(values + [math.nan] * absent, dtype=torch.float64)
    posterior = F.faulty_posterior(history)
    assert posterior.shape == history.shape and bool((posterior[history.isnan()] == 0).all())
    assert bool(((posterior >= 0) & (posterior <= 1)).all())
    order = history[: len(values)].argsort()
    assert bool((posterior[order].diff() >= 0).all())


def posterior_miner(**options):
    """Return a miner that weighs by posterior, with the losses of one epoch recorded."""
    values, upper = two_modes(2, 400, 0.1, 8, 1)
    miner = BadPairMiner(400, detector="mixture", weighting="posterior", **options)
    miner(torch.from_numpy(values), torch.arange(400))
    return miner, torch.from_numpy(values), upper


def test_weights_are_posteriors_of_being_clean():
    miner, values, upper = posterior_miner()
    assert bool((miner(values, torch.arange(400), record=False) == 1).all())  # before the flags
    miner.end_epoch()
    # Whatever the current losses are: the flags speak of the histories.
    weights = miner(values.flip(0), torch.arange(400), record=False)
    torch.testing.assert_close(weights, 1 - F.faulty_posterior(values.float().double()))
    assert weights[upper].max() < 0.01 and weights[~upper].min() > 0.9
    np.testing.assert_allclose(miner.report().weight, weights, rtol=1e-6, atol=1e-30)


def test_noisy_pairs_weigh_by_their_loss_also_beside_posteriors():
    miner, values, _ = posterior_miner(noisy_sigma=0.5)
    miner.end_epoch()
    noisy = torch.from_numpy(miner.report().kind == "noisy")
    weights = miner(values, torch.arange(400), record=False)[noisy]
    z = (values[noisy] - miner.memory.mean) / miner.memory.std
    torch.testing.assert_close(weights, torch.exp(-0.5 * z * z))
    assert len(weights) > 10


def test_posteriors_are_saved_and_the_weighting_may_change():
    miner, values, upper = posterior_miner()
    miner.end_epoch()
    state, ids = miner.state_dict(), torch.arange(400)
    again = BadPairMiner(400, detector="mixture", weighting="posterior")
    again.load_state_dict(state)
    assert torch.equal(again(values, ids, record=False), miner(values, ids, record=False))
    relative = BadPairMiner(400, detector="mixture")
    relative.load_state_dict(state)
    back = BadPairMiner(400, detector="mixture", weighting="posterior")
    back.load_state_dict(relative.state_dict())
    weights = back(values, ids, record=False)
    assert ((weights < 0.5).numpy() == upper).mean() > 0.99
