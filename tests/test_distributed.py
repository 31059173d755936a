"""n processes train as one: DistributedDataParallel over gloo against one process, same batches."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from distributed_scenarios import (
    BATCH,
    BOTH,
    FAIRNESS,
    MINING,
    NO_PART,
    OWN_EPOCHS,
    SIGLIP_FORMS,
    STEPS,
    Towers,
    data,
    everything,
    own_example,
    train,
)
from processes import spread

from fairclip_losses.functional import caption_pair_losses

pytestmark = pytest.mark.filterwarnings("default")

PARTS = (NO_PART, MINING, FAIRNESS, BOTH)
CASES = [
    *itertools.product(("clip",), PARTS, (False, True), (False, True)),
    *itertools.product(("coca", "distill"), (BOTH,), (False, True), (False, True)),
    *itertools.product(("siglip",), (FAIRNESS, BOTH), (False,), SIGLIP_FORMS),
    *itertools.product(("siglip",), (NO_PART, MINING), (False,), ("bidir",)),
]


@functools.cache
def processes(world_size):
    """What every process found; all tests look at one start of them."""
    return spread(everything, world_size, CASES)


def in_one_process(local_loss, gather_with_grad, world_size):
    """What one process has to do to train as open_clip's own loss does over several.

    With gather_with_grad, and in every form of SigLIP, that is nothing. Without it open_clip's
    gradients are not those of the global batch: each process has only that of its own features,
    and the average over processes is 1/W of it (the logit scale's is whole); with local_loss also
    not that of its features in the other processes' rows.
    """
    if gather_with_grad:
        return "exact", world_size
    return ("keys" if local_loss else "features"), world_size


@functools.cache
def expected(kind, part, alike):
    return train(kind, part, 0, 1, alike=alike)


def assert_near(found, wanted, tolerance, where):
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance, rtol=tolerance, equal_nan=True,
            msg=lambda message, name=name: f"{where} {name}: {message}",
        )  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["clip", "coca", "distill", "siglip"])
def test_processes_train_as_one(kind, world_size):
    """After k steps, and with the same numbers shown; open_clip's own loss (NO_PART) likewise."""
    for number, case in enumerate(CASES):
        _, part, local, form = case
        if case[0] != kind:
            continue
        weights, values, state = expected(kind, part, in_one_process(local, form, world_size))
        for rank in range(world_size):
            where = f"{kind} {part} local_loss={local} {form} rank={rank}"
            found, _, memory = processes(world_size)[rank]["training"][number]
            assert_near(found, weights, 1e-5, where)
            assert_near(memory, state, 1e-4, where)
        for step in range(STEPS):
            for name, value in values[step].items():
                seen = [
                    processes(world_size)[rank]["training"][number][1][step][name]
                    for rank in range(world_size)
                ]
                assert np.mean(seen) == pytest.approx(value, abs=1e-5), (case, step, name)


def test_the_one_process_forms_differ():
    """Else the comparisons above would hold whatever the gradients are."""
    for kind in ("clip", "distill"):
        forms = [
            expected(kind, BOTH, (form, 2))[0]["image.weight"]
            for form in ("exact", "features", "keys")
        ]
        for one, other in itertools.combinations(forms, 2):
            assert (one - other).abs().max() > 1e-3
    for part in (MINING, FAIRNESS, BOTH):
        plain, fair = (
            expected("clip", p, ("exact", 2))[0]["image.weight"] for p in (NO_PART, part)
        )
        assert (plain - fair).abs().max() > 1e-3


@pytest.mark.parametrize("world_size", [2, 4])
def test_captions_are_averaged_by_process_as_upstream_averages_them(world_size):
    """open_clip's caption loss is a mean over each process's own tokens, then over processes."""
    images, texts, tokens, _ = data()
    local = BATCH // world_size
    for row in range(BATCH):
        tokens[row, 1 + (row // local) % 2 :] = 0
    model = Towers("coca")
    out = model(images[:BATCH], texts[:BATCH], tokens[:BATCH])
    grad, weights = processes(world_size)[0]["captions"]
    assert (weights < 0.9).any()
    total = 0.0
    for rank in range(world_size):
        rows = slice(rank * local, (rank + 1) * local)
        terms = caption_pair_losses(out["logits"][rows], tokens[rows])
        total = total + 2.0 * (weights[rows] * terms).mean() / world_size
    (mine,) = torch.autograd.grad(total, model.caption.weight)
    torch.testing.assert_close(grad, mine, atol=1e-6, rtol=1e-5)


# ------------------------------ exchanges


@pytest.mark.parametrize("world_size", [2, 4])
def test_exchanges_are_few_and_do_not_depend_on_the_data(world_size):
    """The features once; then one gathering of ids and groups, one of losses, one of scores."""
    for alone, found, flagged in (rank["exchanges"] for rank in processes(world_size)):
        assert flagged > 0
        alone["all_gather"] += 3
        assert all(counts == alone for counts in found)


# ------------------------------ SigLIP


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("form", SIGLIP_FORMS)
def test_siglip_terms_hold_one_block_of_the_global_matrix(form, world_size):
    """32 pairs a process: a block is 32 x 32; what waits for the backward pass is the features."""
    for rank in processes(world_size):
        largest, waiting = rank["siglip"][form]
        # `gather` holds all features besides; 32 * 32 * world_size would be a strip of blocks.
        features = 2 * 32 * 5 * (world_size if form == "gather" else 1)
        assert largest == max(32 * 32, features)
        assert waiting == 2 * 32 * 5 + 2


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("form", SIGLIP_FORMS)
def test_siglip_terms_have_upstreams_value_and_gradients(form, world_size):
    for rank in processes(world_size):
        assert rank["siglip gradients"][form, "double"] < 1e-12
        assert rank["siglip gradients"][form, "autocast"] < 0.02


# ------------------------------ a loss of one's own


def test_processes_train_the_example_of_an_own_loss_as_one():
    model, loss, mismatched = own_example().train(OWN_EPOCHS)
    for world_size in (2, 4):
        for weights, memory, refusal in (rank["own"] for rank in processes(world_size)):
            assert_near(weights, model.state_dict(), 1e-5, "own loss")
            state = {k: v for k, v in loss.state_dict().items() if isinstance(v, torch.Tensor)}
            assert_near(memory, state, 1e-4, "own loss")
            assert f"{world_size} processes train, and Silent does not say which" in refusal
    faulty = loss.miner.report().kind == "faulty"
    assert faulty[mismatched.numpy()].sum() > 0.5 * faulty.sum() > 0  # mining took part


# ------------------------------ losses of other processes than there are


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_loss_that_is_built_for_other_processes_is_refused_with_the_remedy(world_size):
    everything = ", local_loss=True, gather_with_grad=True"
    remedies = {
        "clip": ("ClipLoss", everything),
        "siglip": ("SigLipLoss", ""),
        "coca": ("CoCaLoss", everything),
        "distill": ("DistillClipLoss", everything),
        "own terms": ("OwnTerms", everything),
        "next rank": ("ClipLoss", everything),
        "more": ("ClipLoss", everything),
    }
    for rank, found in enumerate(processes(world_size)):
        refusals, alone, ids = found["misplaced"]
        assert refusals.keys() == remedies.keys() and alone
        for name, (loss, options) in remedies.items():
            mining, fairness = refusals[name]
            assert mining == fairness and f"process {rank} of {world_size}" in mining
            place = f"rank={rank}, world_size={world_size}"
            assert mining.endswith(f"build it as {loss}({place}{options})")
        assert ids.tolist() == list(range(4 * world_size))  # every process has seen all pairs


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_broadcast_overwrites_what_a_process_remembers(world_size):
    for found in processes(world_size):
        assert len(found["broadcast"]) > 40 and all(found["broadcast"])
