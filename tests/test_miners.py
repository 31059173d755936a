"""BadPairMiner and its functions against plain loops, scikit-learn and their own limits."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import LoopMiner
from no_read_back import NoReadBack

from fairclip_losses import functional as F
from fairclip_losses.miners import BadPairMiner, EpochSummary, MinerReport, pair_memory


def random_run(seed, pairs=40, epochs=3, batch=8, bad=4, missing=0.2):
    """Shuffled epochs of (ids, losses) batches: some pairs missing, some there twice, a bad few."""
    generator = np.random.default_rng(seed)
    level = generator.normal(2.0, 0.3, pairs)
    level[:bad] = 5.0
    level[bad : 2 * bad] = 0.5
    run = []
    for _ in range(epochs):
        ids = np.flatnonzero(generator.random(pairs) >= missing)
        ids = np.concatenate([ids, generator.choice(pairs, 5)])
        generator.shuffle(ids)
        losses = np.float32(level[ids] + generator.normal(0, 0.1, len(ids)))
        ids, losses = torch.from_numpy(ids), torch.from_numpy(losses)
        run.append(list(zip(ids.split(batch), losses.split(batch), strict=True)))
    return run


def play(miner, run, rename=None):
    """All weights of a run, one tensor."""
    weights = []
    for epoch in run:
        for ids, losses in epoch:
            weights.append(miner(losses, ids if rename is None else rename[ids]))
        miner.end_epoch()
    return torch.cat(weights)


def assert_same_report(left, right):
    for name in MinerReport.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def small_logs(monkeypatch, size=4):
    """Make streaming miners join their log to the table every few visits."""
    monkeypatch.setattr(pair_memory, "_MIN_LOG_VISITS", size)


# ------------------------------ module against the loop

losses_drawn = st.one_of(
    st.floats(0.0, 8.0, width=32),
    st.sampled_from([0.0, 0.5, 6.0, math.inf, -math.inf, math.nan]),
)
visits_drawn = st.lists(st.tuples(st.integers(0, 11), losses_drawn), max_size=9)
sigmas_drawn = st.sampled_from([0.5, 1.0, 1.7, math.inf])
run_drawn = st.lists(st.lists(visits_drawn, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=100)
@given(
    run=run_drawn,
    streaming=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "total_epochs": st.just(4),
            "warmup_epochs": st.integers(0, 3),
            "noisy_sigma": sigmas_drawn,
            "faulty_sigma": sigmas_drawn,
            "history": st.sampled_from(["mean", "linear"]),
            "renormalize": st.booleans(),
            "weighting": st.sampled_from(["relative", "density"]),
            "record": st.sampled_from(["raw", "weighted"]),
        }
    ),
)
def test_module_equals_the_double_loop(run, streaming, options):
    loop, miner = LoopMiner(**options), BadPairMiner(None if streaming else 12, **options)
    # Names far apart, in another order than the numbers, negative ones and the extremes among them.
    names = torch.arange(12)
    if streaming:
        names = (names * 5 % 12 - 6) * 2**60
        names[3], names[4] = 2**63 - 1, -(2**63)
    for epoch in run:
        for batch in epoch:
            ids = [pair for pair, _ in batch]
            losses = [loss for _, loss in batch]
            weights = miner(torch.tensor(losses).float(), names[torch.tensor(ids).long()])
            np.testing.assert_allclose(weights, loop.visit(ids, losses), rtol=2e-3, atol=1e-12)
        summary = miner.end_epoch()
        loop.end_epoch()
        if loop.near or (0 < loop.std < 1e-2):
            return  # float32 sums decide on which side of a threshold such a history falls
        report, histories = miner.report(), loop.histories()
        pairs = sorted(loop.log, key=lambda pair: int(names[pair]))
        kinds = [loop.kinds.get(pair, "clean") for pair in pairs]
        bad = [int(names[p]) for p, kind in zip(pairs, kinds, strict=True) if kind != "clean"]
        assert report.flagged().ids.tolist() == bad
        assert report.ids.tolist() == [int(names[pair]) for pair in pairs]
        assert report.visits.tolist() == [len(loop.log[pair]) for pair in pairs]
        assert report.kind.tolist() == kinds
        history = np.array([histories[pair] for pair in pairs])
        np.testing.assert_allclose(report.history, history, rtol=1e-5, atol=1e-6)
        last = [loop.weight(pair, loop.log[pair][-1][1]) for pair in pairs]
        np.testing.assert_allclose(report.weight, last, rtol=2e-3, atol=1e-12)
        if loop.std:
            z_score = (history - loop.mean) / loop.std
            np.testing.assert_allclose(report.z_score, z_score, rtol=1e-3, atol=1e-3)
        assert (summary.epoch, summary.seen) == (loop.epoch, len(pairs))
        assert (summary.noisy, summary.faulty) == (kinds.count("noisy"), kinds.count("faulty"))
        assert (summary.mean, summary.std) == pytest.approx((loop.mean, loop.std), abs=1e-5)


# ------------------------------ flags and weights


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_equal_histories_are_never_flagged(sigma):
    miner = BadPairMiner(5, noisy_sigma=sigma, faulty_sigma=sigma)
    # 0.1 has no exact float32 sum: the histories differ by rounding alone.
    for repeat in range(3):
        for _ in range(repeat):
            miner(torch.full((3,), 0.1), torch.arange(3) + repeat - 1)
        miner(torch.full((5,), 0.1), torch.arange(5))
    summary = miner.end_epoch()
    assert (summary.noisy, summary.faulty) == (0, 0)
    assert summary.std < 1e-6
    assert miner.report().z_score.tolist() == [0.0] * 5


@pytest.mark.parametrize("detector", ["threshold", "mixture"])
@pytest.mark.parametrize("num_pairs", [3, None])
def test_no_pair_or_one_pair(detector, num_pairs):
    miner = BadPairMiner(num_pairs, noisy_sigma=0.0, faulty_sigma=0.0, detector=detector)
    assert miner.end_epoch() == EpochSummary(1, 0, 0, 0, 0.0, 0.0)
    report = miner.report()
    assert len(report) == 0 and report.counts() == {"clean": 0, "noisy": 0, "faulty": 0}
    assert report.ids.dtype == report.visits.dtype == np.int64
    assert report.history.dtype == report.z_score.dtype == report.weight.dtype == np.float64
    miner(torch.tensor([2.0]), torch.tensor([1]))
    assert miner.end_epoch() == EpochSummary(2, 1, 0, 0, 2.0, 0.0)
    assert miner(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("num_pairs", [9, None])
def test_report_before_the_first_end_epoch(num_pairs):
    miner = BadPairMiner(num_pairs)
    miner(torch.tensor([2.0, 4.0]), torch.tensor([7, 7]))
    report = miner.report()
    assert (report.ids.tolist(), report.visits.tolist()) == ([7], [2])
    assert (report.kind.tolist(), report.weight.tolist()) == (["clean"], [1.0])
    assert np.isnan(report.z_score).all()
    miner(torch.tensor([6.0]), torch.tensor([7]))
    assert report.history.tolist() == [3.0]  # a report is a copy
    report.ids[0] = report.visits[0] = 8
    assert miner.report().ids.tolist() == [7]


def test_relative_weight_is_in_zero_one_and_density_may_exceed_one():
    kinds = torch.tensor([F.CLEAN, F.NOISY, F.FAULTY, F.FAULTY])
    losses = torch.tensor([1.0, 1.0, 1.1, 1e6])
    relative = F.bad_pair_weights(losses, kinds, 1.0, 0.1)
    assert relative[:2].tolist() == [1.0, 1.0]
    assert relative[2].item() == pytest.approx(math.exp(-0.5))
    assert relative[3].item() == torch.finfo(torch.float32).tiny  # exp underflows
    density = F.bad_pair_weights(losses, kinds, 1.0, 0.1, "density")
    assert density[1].item() == pytest.approx(3.98942, rel=1e-5)
    double = F.bad_pair_weights(losses.double(), kinds, torch.tensor(1.0), torch.tensor(0.1))
    assert double.dtype == torch.float64 and double[3] > 0
    assert F.bad_pair_weights(losses, kinds, 1.0, 0.0).tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_pairs", [5, None])
def test_dtypes(dtype, num_pairs):
    miner = BadPairMiner(num_pairs, faulty_sigma=1.5)
    losses = torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0], dtype=dtype, requires_grad=True)
    for ids in (torch.arange(5), torch.arange(5, dtype=torch.int32)):
        weights = miner(losses, ids)
        assert weights.dtype == torch.promote_types(dtype, torch.float32)
        assert not weights.requires_grad
        miner.end_epoch()
    assert weights[4] < 1 and bool((weights[:4] == 1).all())
    (weights * losses).sum().backward()
    torch.testing.assert_close(losses.grad, weights.to(dtype))


# ------------------------------ what is recorded


@pytest.mark.parametrize("num_pairs", [6, None])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_loss_that_is_not_finite_leaves_no_trace(num_pairs, bad):
    clean = BadPairMiner(num_pairs, faulty_sigma=1.2, noisy_sigma=1.2, history="linear")
    dirty = copy.deepcopy(clean)
    ids = torch.tensor([0, 1, 2, 3, 4, 4])
    losses = torch.tensor([1.0, 2.0, 3.0, 9.0, 2.0, 2.5], dtype=torch.float64)
    for _ in range(2):
        expected = clean(losses, ids)
        weights = dirty(torch.cat([losses, torch.tensor([bad, bad])]), torch.tensor([*ids, 5, 3]))
        assert torch.equal(weights[:6], expected)
        assert weights[6] == 1
        assert math.isfinite(weights[7])
        dirty(torch.tensor([bad, bad], dtype=torch.float64), torch.tensor([2, 5]))
        assert clean.end_epoch() == dirty.end_epoch()
        assert_same_report(clean.report(), dirty.report())
    assert clean.report().counts()["faulty"] == 1


@pytest.mark.parametrize("num_pairs", [40, None])
@pytest.mark.parametrize("log", [4, 1 << 16])
def test_inference_mode(num_pairs, log, monkeypatch):
    small_logs(monkeypatch, log)
    # Every pair comes in the first epoch, so that later ones write where inference mode allocated.
    run = random_run(2, missing=0.0)
    expected = BadPairMiner(num_pairs, faulty_sigma=1.5)
    weights = play(expected, run)
    mixed = BadPairMiner(num_pairs, faulty_sigma=1.5)
    with torch.inference_mode():
        first = play(mixed, run[:1])
    second = play(mixed, run[1:])
    assert torch.equal(torch.cat([first, second]), weights)

    moved = warmed(40)
    with torch.inference_mode():
        moved(torch.rand(4, device="meta"), torch.arange(4), record=False)
    moved(torch.rand(4, device="meta"), torch.arange(4))


# ------------------------------ streaming


@pytest.mark.parametrize("history", ["mean", "linear"])
@pytest.mark.parametrize("log", [4, 30, 1 << 16])
def test_streaming_equals_dense_bit_for_bit(history, log, monkeypatch):
    small_logs(monkeypatch, log)
    run = random_run(4, epochs=4)
    dense = BadPairMiner(40, faulty_sigma=1.5, noisy_sigma=1.5, history=history)
    stream = BadPairMiner(faulty_sigma=1.5, noisy_sigma=1.5, history=history)
    names = torch.arange(40) * 10**15 - 7 * 10**15
    assert torch.equal(play(dense, run), play(stream, run, names))
    strided = torch.stack([names, names], 1)[:, 1]  # ids of any layout
    losses = torch.arange(40.0)
    assert torch.equal(dense(losses, torch.arange(40)), stream(losses, strided))
    left, right = dense.report(), stream.report()
    assert_same_report(dataclasses.replace(left, ids=names.numpy()[left.ids]), right)


@pytest.mark.parametrize(
    "num_pairs,history,limit", [(10_000, "mean", 13), (None, "mean", 23), (None, "linear", 27)]
)
def test_bytes_for_each_pair(num_pairs, history, limit, monkeypatch):
    small_logs(monkeypatch, 64)
    miner = BadPairMiner(num_pairs, history=history)
    for part in torch.arange(10_000).split(500):
        miner(torch.rand(500), part)
        miner.end_epoch()
    size = sum(value.nbytes for value in miner.memory.state().values())
    assert size - 5 * 8 <= limit * 10_001  # less the five scalars


# ------------------------------ save and resume


def test_thresholds_may_change_on_resuming():
    miner = BadPairMiner(40, faulty_sigma=1.0)
    play(miner, random_run(7))
    changed = {"noisy_sigma": math.inf, "weighting": "density", "detector": "mixture"}
    other = BadPairMiner(40, faulty_sigma=2.0, warmup_epochs=5, **changed)
    other.load_state_dict(miner.state_dict())
    np.testing.assert_array_equal(other.report().history, miner.report().history)
    assert other.report().counts() == miner.report().counts() != {"clean": 40}
    assert other.end_epoch().faulty == 0  # its warm-up is not over
    assert other.end_epoch().faulty > 0


@pytest.mark.parametrize(
    "saved,mine,message",
    [
        ({"num_pairs": 5}, {"num_pairs": 6}, "num_pairs=5"),
        ({"num_pairs": 5}, {}, "num_pairs=5"),
        ({}, {"num_pairs": 5}, "num_pairs=None"),
        ({"history": "linear"}, {}, "history='linear'"),
        ({"num_pairs": 5, "record": "weighted"}, {"num_pairs": 5}, "record='weighted'"),
    ],
)
def test_another_kind_of_memory_is_refused_whole(saved, mine, message):
    source, target = BadPairMiner(**saved), BadPairMiner(**mine)
    source(torch.tensor([1.0, 5.0]), torch.tensor([0, 1]))
    source.end_epoch()
    target(torch.tensor([2.0]), torch.tensor([3]))
    before = target.report()
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(source.state_dict())
    assert_same_report(target.report(), before)
    assert int(target.memory.epoch) == 0
    with pytest.raises(ValueError, match=message):
        target.memory.set_extra_state(source.memory.get_extra_state())


def test_a_state_without_its_settings_or_of_another_shape():
    miner, states = BadPairMiner(5), [BadPairMiner(size).state_dict() for size in (5, 6)]
    for state in states:
        del state["memory._extra_state"]
    with pytest.raises(RuntimeError, match="_extra_state"):
        miner.load_state_dict(states[0])
    miner.load_state_dict(states[0], strict=False)
    with pytest.raises(RuntimeError, match=r"loss_sum.*\[7\]"):
        miner.load_state_dict(states[1], strict=False)


# ------------------------------ no wait for the device, no blow-up


def warmed(num_pairs, **arguments):
    miner = BadPairMiner(num_pairs, faulty_sigma=1.0, validate=False, **arguments)
    miner(torch.tensor([1.0, 1.0, 1.0, 9.0]), torch.arange(4))
    miner.end_epoch()
    return miner


@pytest.mark.parametrize("num_pairs", [1000, None])
@pytest.mark.parametrize("history", ["mean", "linear"])
@pytest.mark.parametrize("weighting", ["relative", "density"])
@pytest.mark.parametrize("record", ["raw", "weighted"])
def test_forward_never_waits_for_the_device(num_pairs, history, weighting, record):
    miner = warmed(num_pairs, history=history, weighting=weighting, record=record)
    with NoReadBack() as watch:
        miner(torch.rand(64, dtype=torch.float64), torch.arange(64, dtype=torch.int32))
        miner(torch.full((3,), math.nan), torch.tensor([-5, 10**9, 3]))
    assert watch.calls


def test_forward_costs_nothing_for_more_pairs_or_samples():
    seen = set()
    for num_pairs, batch in itertools.product((100, 1_000_000), (8, 50)):
        miner = warmed(num_pairs)
        with NoReadBack() as watch:
            miner(torch.rand(batch), torch.arange(batch))
        seen.add(tuple(watch.calls.items()))
        assert watch.largest <= batch + 1  # nothing of the memory's size is made
    assert len(seen) == 1  # the same operations, whatever the sizes


@pytest.mark.parametrize("num_pairs", [6, None])
def test_the_memory_follows_the_losses(num_pairs):
    miner = warmed(num_pairs)
    weights = miner(torch.rand(4, device="meta"), torch.arange(4))
    assert weights.device.type == "meta"
    assert {value.device.type for value in miner.memory.state().values()} == {"meta"}


@pytest.mark.parametrize("detector", ["threshold", "mixture"])
def test_a_device_without_float64(detector, monkeypatch):
    run = random_run(8)
    arguments = {"faulty_sigma": 1.5, "noisy_sigma": 1.5, "detector": detector}
    expected = BadPairMiner(40, **arguments)
    weights = play(expected, run)
    monkeypatch.setattr("fairclip_losses.state._NO_FLOAT64", frozenset({"cpu"}))
    miner = BadPairMiner(40, **arguments).to("cpu")
    assert miner.memory.mean.dtype == miner.memory.std.dtype == torch.float32
    torch.testing.assert_close(play(miner, run), weights, rtol=1e-5, atol=1e-6)
    assert miner.report().kind.tolist() == expected.report().kind.tolist()
    monkeypatch.undo()
    assert miner.to("cpu").memory.mean.dtype == torch.float64


@pytest.mark.parametrize(
    "num_pairs,history,record",
    [(40, "mean", "raw"), (40, "linear", "weighted"), (None, "mean", "raw")],
)
def test_compiles(num_pairs, history, record):
    """Into one graph with num_pairs; its masks do what the checks at once do, to the last bit."""
    run = random_run(9)
    arguments = {"faulty_sigma": 1.5, "history": history, "record": record}
    plain, miner = BadPairMiner(num_pairs, **arguments), BadPairMiner(num_pairs, **arguments)
    compiled = torch.compile(miner, fullgraph=num_pairs is not None, backend="eager")
    for epoch in run:
        for ids, losses in epoch:
            assert torch.equal(compiled(losses, ids), plain(losses, ids))
        assert miner.end_epoch() == plain.end_epoch()
    assert_same_report(miner.report(), plain.report())
    if num_pairs is not None:  # a graph cannot raise on a value: the ids are counted
        compiled(torch.ones(8), torch.full((8,), 40))
        with pytest.raises(ValueError, match="got 8 outside"):
            miner.end_epoch()


# ------------------------------ bad input


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"num_pairs": 0}, "num_pairs must be an integer of 1 or more, got 0"),
        ({"num_pairs": 2.0}, "num_pairs"),
        ({"num_pairs": True}, "num_pairs"),
        ({"total_epochs": 0}, "total_epochs must be an integer of 1 or more, got 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be an integer of 0 or more, got -1"),
        ({"noisy_sigma": -0.1}, "noisy_sigma must be a number of 0 or more .*, got -0.1"),
        ({"noisy_sigma": "3"}, "noisy_sigma must be a number of 0 or more .*, got '3'"),
        ({"faulty_sigma": True}, "faulty_sigma must be a number of 0 or more .*, got True"),
        ({"faulty_sigma": math.nan}, "faulty_sigma"),
        ({"history": "median"}, "history must be one of mean, linear, got 'median'"),
        ({"weighting": "hard"}, "weighting must be one of relative, density"),
        ({"record": "none"}, "record must be one of raw, weighted"),
        ({"detector": "svm"}, "detector must be one of threshold, mixture"),
        ({"mixture_threshold": 0.0}, r"mixture_threshold must be a number in \(0, 1\], got 0.0"),
        ({"mixture_threshold": "a"}, r"mixture_threshold must be a number in \(0, 1\], got 'a'"),
        ({"mixture_threshold": 1.1}, "mixture_threshold"),
        ({"history": "linear", "renormalize": False}, "needs total_epochs"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        BadPairMiner(**arguments)


def test_constructor_takes_numpy_integers_and_infinite_thresholds():
    miner = BadPairMiner(np.int64(5), noisy_sigma=math.inf, faulty_sigma=math.inf)
    assert type(miner.num_pairs) is int
    miner(torch.tensor([1.0, 1.0, 100.0]), torch.arange(3))
    assert miner.end_epoch().faulty == 0
    assert "num_pairs=5" in repr(miner) and "faulty_sigma=inf" in repr(miner)
    assert "mixture_threshold=0.5" in repr(BadPairMiner(detector="mixture"))


@pytest.mark.parametrize("num_pairs", [4, None])
@pytest.mark.parametrize(
    "losses,ids,message",
    [
        (torch.rand(2), torch.tensor([0.0, 1.0]), "pair_ids must be integers .* torch.float32"),
        (torch.rand(2), torch.tensor([True, False]), "pair_ids must be integers .* torch.bool"),
        (torch.rand(2), torch.tensor([0, 1]).to(torch.uint64), "pair_ids .* torch.uint64"),
        (torch.rand(2), [0, 1], "pair_ids must be a tensor, got list"),
        ([0.5], torch.tensor([0]), "pair_losses must be a tensor, got list"),
        (torch.tensor([1, 2]), torch.tensor([0, 1]), "pair_losses must be floating point"),
        (torch.rand(2), torch.tensor([0, 1, 2]), r"\(2,\) and \(3,\)"),
        (torch.rand(2, 1), torch.tensor([0, 1]), r"\(2, 1\) and \(2,\)"),
        (torch.rand(2), torch.tensor([[0], [1]]), r"\(2,\) and \(2, 1\)"),
        (torch.tensor(0.5), torch.tensor(1), r"\(\) and \(\)"),
    ],
)
def test_forward_errors(num_pairs, losses, ids, message):
    miner = BadPairMiner(num_pairs)
    with pytest.raises(ValueError, match=message):
        miner(losses, ids)
    assert len(miner.report()) == 0


@pytest.mark.parametrize("bad", [-1, 4, 2**62, -(2**63)])
@pytest.mark.parametrize("call", [BadPairMiner.forward, BadPairMiner.check])
def test_ids_out_of_range_on_the_cpu(bad, call):
    miner = BadPairMiner(4)
    with pytest.raises(ValueError, match=rf"0\.\.3, got {bad} at position 2"):
        call(miner, torch.rand(4), torch.tensor([0, 3, bad, 99]))
    assert miner.check(torch.rand(2), torch.tensor([0, 1])) is None
    assert len(miner.report()) == miner.end_epoch().seen == 0


def test_ids_out_of_range_where_they_are_not_checked():
    expected, miner = BadPairMiner(4, faulty_sigma=1.0), warmed(4)
    expected(torch.tensor([1.0, 1.0, 1.0, 9.0]), torch.arange(4))
    expected.end_epoch()
    for ids in ([0, 3, -7, 4], [3, 1, -2, -(2**63)]):
        losses = torch.tensor([1.0, 8.0, 50.0, 60.0])
        weights = miner(losses, torch.tensor(ids))
        assert torch.equal(weights[:2], expected(losses[:2], torch.tensor(ids[:2])))
        assert weights[2:].tolist() == [1.0, 1.0]
    before = miner.report()
    with pytest.raises(ValueError, match=r"0\.\.3, got 4 outside .* \(the largest is 4\)"):
        miner.end_epoch()
    assert int(miner.memory.epoch) == 1
    assert_same_report(miner.report(), before)
    assert miner.end_epoch() == expected.end_epoch()  # the second call goes on without them
    assert_same_report(miner.report(), expected.report())
    miner(torch.ones(1), torch.tensor([-3]), record=False)  # weighed, not recorded: no error
    miner.end_epoch()
    miner(torch.ones(2), torch.tensor([-3, -9]))
    with pytest.raises(ValueError, match="the largest is -3"):
        miner.end_epoch()


# ------------------------------ functions


def test_histories():
    history = F.pair_history(torch.tensor([4.0, 0.0]), torch.tensor([2, 0]))
    assert history[0] == 2 and torch.isnan(history[1]) and history.dtype == torch.float64
    weighted = F.pair_history(torch.tensor([4.0]), torch.tensor([2]), torch.tensor([8.0]))
    assert weighted.tolist() == [0.5]
    published = F.pair_history(torch.tensor([6.0]), torch.tensor([3]), total_epochs=4)
    assert published.tolist() == [0.5]
    assert F.visit_weight(3) == 1.0 and F.visit_weight(3, "linear") == 4.0
    assert torch.equal(F.visit_weight(torch.tensor([0, 2]), "linear"), torch.tensor([1, 3]))
    assert F.history_z_score(torch.tensor([1.0, 2.0]), 1.0, 0.5).tolist() == [0.0, 2.0]
    assert F.history_z_score(torch.tensor([1.0, 2.0]), 1.0, 0.0).tolist() == [0.0, 0.0]


@settings(max_examples=100)
@given(
    values=st.lists(st.tuples(st.floats(-50, 50), st.booleans()), max_size=30),
    noisy=st.sampled_from([0.0, 0.7, 1.5, math.inf]),
    faulty=st.sampled_from([0.0, 0.7, 1.5, math.inf]),
)
def test_statistics_and_kinds_equal_numpy(values, noisy, faulty):
    history = np.array([value for value, _ in values] + [math.nan, math.inf])
    seen = np.array([keep for _, keep in values] + [True, True])
    used = history[seen & np.isfinite(history)]
    mean, std = F.history_statistics(torch.from_numpy(history), torch.from_numpy(seen))
    assert float(mean) == pytest.approx(used.mean() if len(used) else 0.0, abs=1e-12)
    assert float(std) == pytest.approx(used.std() if len(used) else 0.0, abs=1e-12)
    arguments = noisy, faulty, torch.from_numpy(seen)
    kinds = F.bad_pair_kinds(torch.from_numpy(history), mean, std, *arguments)
    numbers = float(mean), float(std)
    assert torch.equal(kinds, F.bad_pair_kinds(torch.from_numpy(history), *numbers, *arguments))
    mean, std = numbers
    judged = seen & np.isfinite(history) & (std > 2.0**-20 * abs(mean))
    expected = np.where(judged & (history <= mean - noisy * std), F.NOISY, F.CLEAN)
    expected = np.where(judged & (history >= mean + faulty * std), F.FAULTY, expected)
    assert kinds.dtype == torch.int8
    np.testing.assert_array_equal(kinds, expected)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: F.visit_weight(0, "last"), "history"),
        (lambda: F.pair_history(torch.zeros(2), torch.zeros(3)), r"\(2,\) and \(3,\)"),
        (lambda: F.pair_history(torch.zeros(2), torch.zeros(2), torch.zeros(1)), "weight_sum"),
        (lambda: F.pair_history(torch.zeros(2), torch.zeros(2), total_epochs=0), "total_epochs"),
        (lambda: F.history_statistics(torch.zeros(2), torch.ones(3, dtype=torch.bool)), "seen"),
        (lambda: F.bad_pair_kinds(torch.zeros(2), 0.0, 1.0, -1.0), "noisy_sigma"),
        (lambda: F.bad_pair_kinds(torch.zeros(2), 0.0, 1.0, 1.0, math.nan), "faulty_sigma"),
        (lambda: BadPairMiner(2, weighting="posterior"), "needs detector='mixture'"),
        (lambda: F.bad_pair_weights(torch.zeros(2), torch.zeros(2), 0.0, 1.0, "x"), "weighting"),
        (lambda: F.bad_pair_weights(torch.zeros(2), torch.zeros(3), 0.0, 1.0), "kinds"),
        (lambda: F.gaussian_mixture_posterior(torch.zeros(2, 2)), r"\(N,\), got \(2, 2\)"),
        (lambda: F.gaussian_mixture_posterior(torch.tensor([1.0, math.nan])), "finite"),
        (lambda: F.gaussian_mixture_posterior(torch.zeros(2), variance_floor=0.0), "floor"),
        (lambda: F.gaussian_mixture_posterior(torch.zeros(2), max_iterations=0), "iterations"),
        (lambda: F.gaussian_mixture_posterior(torch.zeros(2), max_points=1), "max_points"),
    ],
)
def test_function_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
