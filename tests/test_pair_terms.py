"""Per-pair terms against open_clip's own losses and plain double loops."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import BASES, OwnLoss, gradients_of, model_output
from open_clip.loss import ClipLoss, CoCaLoss
from torch import nn

from fairclip_losses.distributed import Processes
from fairclip_losses.functional import (
    clip_pair_losses,
    official_scores,
    pair_logits,
    pair_similarities,
    siglip_pair_losses,
    weighted_mean,
)
from fairclip_losses.pair_terms import PairTerms, _BlockwiseSiglip, pair_terms

LOSSES = {kind: make() for kind, make in BASES.items()}

SIZES = {"count": st.integers(1, 9), "dim": st.integers(1, 6), "seed": st.integers(0, 2**31)}


def output_of(kind, count, dim=4, seed=0, dtype=torch.float64, scale=10.0):
    return model_output(kind, count, dim, seed, dtype, scale)


# ------------------------------ against open_clip


@pytest.mark.parametrize("kind", LOSSES)
@settings(max_examples=25)
@given(**SIZES, scale=st.floats(0.1, 100))
def test_means_and_gradients_are_those_of_open_clip(kind, count, dim, seed, scale):
    output = output_of(kind, count, dim, seed, scale=scale)
    expected = LOSSES[kind](**output, output_dict=True)
    terms = pair_terms(LOSSES[kind], output)
    assert list(terms.named) == list(expected)
    for name, values in terms.named.items():
        assert values.shape == (count,)
        torch.testing.assert_close(values.mean(), expected[name], rtol=1e-10, atol=1e-10)
        for got, want in zip(
            gradients_of(values.mean(), output), gradients_of(expected[name], output), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.skipif(
    "logit_bias" not in inspect.signature(ClipLoss.forward).parameters,
    reason="open_clip 2's ClipLoss takes no bias",
)
def test_clip_loss_with_a_logit_bias():
    output = output_of("clip", 5) | {"logit_bias": torch.tensor(1.5, dtype=torch.float64)}
    mean = pair_terms(ClipLoss(), output).contrastive.mean()
    torch.testing.assert_close(mean, ClipLoss()(**output))


def test_coca_records_the_unscaled_contrastive_loss():
    output = output_of("coca", 6)
    terms = pair_terms(LOSSES["coca"], output)
    torch.testing.assert_close(terms.contrastive, 2 * terms.named["contrastive_loss"])
    clip = {k: output[k] for k in ("image_features", "text_features", "logit_scale")}
    torch.testing.assert_close(terms.contrastive.mean(), ClipLoss()(**clip))


def test_coca_without_a_contrastive_part_keeps_its_nan_out():
    loss = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0)
    output = output_of("coca", 6)
    with torch.no_grad():
        output["image_features"][0] = math.nan
    named = pair_terms(loss, output).named
    assert torch.equal(named["contrastive_loss"], torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(
        named["caption_loss"].mean(), loss(**output, output_dict=True)["caption_loss"]
    )


# ------------------------------ one pass over the matrix


@pytest.mark.parametrize("function", [clip_pair_losses, siglip_pair_losses])
@pytest.mark.parametrize("entries", [1, 20, 2**18])
def test_blocks_of_rows_change_nothing(function, entries, monkeypatch):
    """Gradients by finite differences; values by double loops in test_fair_loss.py."""
    logits = torch.from_numpy(random_logits(7, 0)).requires_grad_()
    whole = function(logits)
    monkeypatch.setattr("fairclip_losses.functional.pairs.BLOCK_ENTRIES_CPU", entries)
    torch.testing.assert_close(function(logits), whole)
    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("function", [clip_pair_losses, siglip_pair_losses])
def test_what_the_symmetric_forms_refuse(function):
    for shape in ((3, 4), (3,), (2, 3, 3)):
        with pytest.raises(ValueError, match=r"logits must be \(B, B\), got"):
            function(torch.zeros(shape))
    refuses_a_second_derivative(function, function.__name__)


def test_the_blockwise_form_refuses_a_second_derivative():
    def blockwise(features):  # of one process
        one = torch.ones(())
        return _BlockwiseSiglip.apply(features, features, one, one, Processes(), "bidir")

    refuses_a_second_derivative(blockwise, "siglip_pair_losses")


def refuses_a_second_derivative(function, name):
    values = torch.randn(3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(function(values).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} is once differentiable"):
        grad.sum().backward()


@settings(max_examples=25)
@given(count=st.integers(1, 7), seed=st.integers(0, 2**31))
def test_rows_of_both_sides_are_the_symmetric_form(count, seed):
    logits = torch.from_numpy(random_logits(count, seed)).requires_grad_()
    draw = torch.randn(count, dtype=torch.float64)
    one, other = clip_pair_losses(logits), clip_pair_losses(logits, logits.t())
    torch.testing.assert_close(one, other)
    grads = [torch.autograd.grad(losses @ draw, logits)[0] for losses in (one, other)]
    torch.testing.assert_close(*grads)


# ------------------------------ scores


def random_logits(count, seed, scale=3.0):
    return np.random.default_rng(seed).normal(size=(count, count)) * scale


@settings(max_examples=30)
@given(count=st.integers(1, 7), dim=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_official_scores_and_similarities_are_diagonals(count, dim, seed):
    output = output_of("siglip", count, dim, seed)
    logits = pair_logits(**output)
    per_text = logits.T
    torch.testing.assert_close(official_scores(logits), (logits @ per_text.T).diagonal())
    torch.testing.assert_close(pair_similarities(**output), logits.diagonal())
    half = {name: value.bfloat16() for name, value in output.items()}
    assert pair_similarities(**half).dtype == torch.float32
    assert official_scores(pair_logits(**half)).dtype == torch.float32


# ------------------------------ re-weighting


@pytest.mark.parametrize("normalization", ["batch", "weights"])
@settings(max_examples=60)
@given(
    pairs=st.lists(
        st.tuples(st.floats(-100, 100), st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-6, 4))),
        min_size=1,
        max_size=12,
    )
)
def test_weighted_mean_by_a_loop(normalization, pairs):
    terms = [value if weight else math.nan for value, weight in pairs]
    terms = torch.tensor(terms, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([w for _, w in pairs], dtype=torch.float64)
    total = 0.0
    for value, weight in pairs:
        total += weight * value
    below = len(pairs) if normalization == "batch" else sum(w for _, w in pairs) or 1.0
    got = weighted_mean(terms, weights, normalization)
    assert float(got.detach()) == pytest.approx(total / below, rel=1e-9, abs=1e-9)
    got.backward()
    np.testing.assert_allclose(terms.grad, weights / below, rtol=1e-9, atol=1e-12)


def test_weighted_mean_errors():
    with pytest.raises(ValueError, match="normalization must be one of batch, weights, got 'sum'"):
        weighted_mean(torch.ones(2), torch.ones(2), "sum")
    for terms, weights in (((2,), (3,)), ((), ())):
        with pytest.raises(ValueError, match=re.escape(f"(B,), got {terms} and {weights}")):
            weighted_mean(torch.ones(terms), torch.ones(weights))


# ------------------------------ which loss is known


class WrongLoss(OwnLoss):
    def pair_terms(self, distances):
        return distances.square()


class NamesNone(OwnLoss):
    def pair_terms(self, distances):
        return PairTerms(distances, {})


class MyClipLoss(ClipLoss):
    pass


class OtherForward(ClipLoss):
    def forward(self, **model_out):
        return 2 * super().forward(**model_out)


def test_a_subclass_counts_as_its_parent():
    output = output_of("clip", 4)
    torch.testing.assert_close(
        pair_terms(MyClipLoss(), output).contrastive.mean(), ClipLoss()(**output)
    )


def test_unknown_losses_and_outputs_are_refused():
    with pytest.raises(ValueError, match=r"WrongLoss\.pair_terms must return PairTerms, got Tens"):
        pair_terms(WrongLoss(), {"distances": torch.ones(2)})
    with pytest.raises(ValueError, match="must name at least one term, got none"):
        pair_terms(NamesNone(), {"distances": torch.ones(2)})
    with pytest.raises(ValueError, match=r"OtherForward has a forward of its own, .* of ClipLoss"):
        pair_terms(OtherForward(), output_of("clip", 4))
    with pytest.raises(ValueError, match=r"expected a ClipLoss, SigLipLoss.* got Linear"):
        pair_terms(nn.Linear(2, 2), {})
    output = output_of("clip", 4)
    del output["text_features"]
    with pytest.raises(ValueError, match=r"ClipLoss needs 'text_features' .* got \['image_fea"):
        pair_terms(ClipLoss(), output)


@pytest.mark.parametrize("function", [pair_logits, pair_similarities])
def test_features_of_other_shapes_are_refused(function):
    for image, text in (((3, 2), (4, 2)), ((3, 2), (3, 4)), ((3,), (3,)), ((2, 3, 2), (2, 3, 2))):
        with pytest.raises(ValueError, match=r"must both be \(B, D\), got"):
            function(torch.zeros(image), torch.zeros(text), 1.0)
