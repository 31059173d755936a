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
    MEMORIES,
    MINING,
    NO_PART,
    SHARDED,
    SIGLIP_FORMS,
    STEPS,
    WRONG,
    Towers,
    data,
    everything,
    mined,
    miner_of,
    scaled,
    train,
)
from processes import spread

from fairclip_losses import BadPairMiner
from fairclip_losses.distributed import Processes
from fairclip_losses.functional import caption_pair_losses

pytestmark = pytest.mark.filterwarnings("default")

PARTS = (NO_PART, MINING, FAIRNESS, BOTH)
CASES = [
    *itertools.product(("clip", "coca", "distill"), PARTS, (False, True), (False, True)),
    *itertools.product(("siglip",), PARTS, (False,), SIGLIP_FORMS),
    *itertools.product(("clip",), (SHARDED,), (False, True), (False, True)),
    ("siglip", SHARDED, False, "bidir"),
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
            if part is not SHARDED:
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


# ------------------------------ no process waits in vain


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", WRONG)
def test_what_one_process_refuses_all_refuse(name, world_size):
    messages = [rank["refusals"][0].get(name) for rank in processes(world_size)]
    assert len(set(messages)) == 1
    with pytest.raises(ValueError, match=WRONG[name]):
        raise ValueError(messages[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_after_a_refusal_the_processes_are_in_step(world_size):
    for _, untouched, total, recorded in (rank["refusals"] for rank in processes(world_size)):
        assert untouched and np.isfinite(total) and recorded == 4 * world_size


@pytest.mark.parametrize("world_size", [2, 4])
def test_exchanges_do_not_depend_on_the_data(world_size):
    for found, flagged in (rank["exchanges"] for rank in processes(world_size)):
        assert flagged > 0
        assert all(counts == found[0] for counts in found)


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


# ------------------------------ the memory in shards


@functools.cache
def whole(name):
    miner = miner_of(name)
    return (*mined(miner, name), miner)


def assert_same_report(found, wanted, tolerance=1e-12):
    for column in ("ids", "visits", "history", "kind"):
        np.testing.assert_array_equal(getattr(found, column), getattr(wanted, column))
    for column in ("z_score", "weight"):
        np.testing.assert_allclose(
            getattr(found, column), getattr(wanted, column), atol=tolerance, rtol=1e-6
        )


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", MEMORIES)
def test_shards_are_the_whole_memory(name, world_size):
    weights, summaries, report, _ = whole(name)
    assert any(summary.noisy and summary.faulty for summary in summaries)
    ids = []
    for rank, found in enumerate(processes(world_size)):
        their_weights, their_summaries, their_report, for_one, state = found["shards"][name]
        torch.testing.assert_close(their_weights, weights, atol=0, rtol=1e-6)
        for theirs, mine in zip(their_summaries, summaries, strict=True):
            assert (theirs.epoch, theirs.seen, theirs.noisy, theirs.faulty) == (
                mine.epoch, mine.seen, mine.noisy, mine.faulty,
            )  # fmt: skip
            assert theirs.mean == pytest.approx(mine.mean, rel=1e-12)
            assert theirs.std == pytest.approx(mine.std, rel=1e-12)
        assert_same_report(their_report, report)
        own = report.ids % world_size == rank
        np.testing.assert_array_equal(for_one.ids, report.ids if rank == 0 else report.ids[own])
        slots = (
            own.sum() if MEMORIES[name]["num_pairs"] is None else len(range(rank, 41, world_size))
        )
        assert len(state["loss_sum"]) == len(state["kind"]) == slots
        ids.extend(report.ids[own])
    assert sorted(ids) == report.ids.tolist()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shards_are_taken_up_by_another_number_of_processes(name, world_size, count):
    """Back to the whole, bit for bit; to other shards, those that the whole would be cut into."""
    states = [found["shards"][name][-1] for found in processes(world_size)]
    original = whole(name)[-1].state_dict()
    for rank in range(count):
        miner = miner_of(name, Processes(rank, count))
        miner.load_shards(reversed(states))
        cut = miner_of(name, Processes(rank, count))
        cut.load_shards([original])
        for key, value in cut.state_dict().items():
            found = miner.state_dict()[key]
            if key in ("mean", "std"):
                torch.testing.assert_close(found, value, atol=0, rtol=1e-12)
            else:
                assert (
                    torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
                )
        if count == 1:
            assert torch.equal(miner.memory.loss_sum, original["loss_sum"])
            assert_same_report(miner.report(), whole(name)[2])


def test_shards_that_are_not_all_there_are_refused_and_change_nothing():
    states = [found["shards"]["dense"][-1] for found in processes(2)]
    miner = miner_of("dense", Processes(1, 4))
    before = {k: v.clone() for k, v in miner.state_dict().items() if k != "_extra_state"}
    other = miner_of("linear").state_dict()
    for given, message in (
        ([], "no shard"),
        (states[:1], r"expected all shards, \[1\] of 2 missing"),
        ([states[0], states[0]], "each shard once, got shard 0 of 2 again"),
        ([other], "history='linear'"),
        ([miner_of("streaming").state_dict()], "num_pairs=None"),
    ):
        with pytest.raises(ValueError, match=message):
            miner.load_shards(given)
    for key, value in before.items():
        assert torch.equal(miner.state_dict()[key], value)
    with pytest.raises(
        RuntimeError, match=r"shard 0 of 2, this miner's is shard 1 of 4: give load_shards"
    ):
        miner.load_state_dict(states[0])


def test_a_shard_needs_a_pair():
    with pytest.raises(ValueError, match=r"at least the number of shards, got num_pairs=3 and 4"):
        BadPairMiner(3, processes=Processes(0, 4))


# ------------------------------ a gradient scaler


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_skipped_in_one_process_enters_no_shard(world_size):
    """The fifth batch overflows in one process: as if it had never come."""
    weights, report, queue, _ = scaled(0, 1, (0, 1, 2, 3, 5))
    for found in (rank["scaled"] for rank in processes(world_size)):
        their_weights, their_report, their_queue, scale = found
        assert scale == 2.0**9
        assert their_report.visits.tolist() == [2] * BATCH + [3] * BATCH
        assert_near(their_weights, weights, 1e-5, "weights")
        np.testing.assert_array_equal(their_report.kind, report.kind)
        np.testing.assert_allclose(their_report.history, report.history, atol=1e-4)
        torch.testing.assert_close(their_queue, queue, atol=1e-4, rtol=0, equal_nan=True)
